"""Which methods each experiment compares, on which problems."""

from dataclasses import dataclass

import torch
from torch import nn

import secondorder as so
from bench.experiments.harness import Method, Problem, grid
from bench.experiments.problems import AUTOENCODERS, CLASSIFIERS, DIGITS, DIGITS_EPOCH, FASHION, MIXTURE, PINN, ROBUST
from secondorder.curvature import CURVATURES
from secondorder.solvers import SOLVERS


@dataclass(frozen=True)
class Study:
    """Methods compared on problems; studies with the same `results` share runs."""

    title: str
    results: str  # the file's stem
    problems: list[Problem]
    methods: list[Method]
    picture: bool = True


def _adam(model: nn.Module, _: nn.Module, lr: float, eps: float = 1e-8) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr, eps=eps, fused=True)


def _sgd(model: nn.Module, _: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9)


def _rmsprop(model: nn.Module, _: nn.Module, lr: float, eps: float) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(model.parameters(), lr, alpha=0.9, eps=eps)


def _kbfgs(model: nn.Module, criterion: nn.Module, lr: float, damping: float) -> torch.optim.Optimizer:
    return so.KBFGS(model, criterion, lr, damping=damping)


def _kbfgsl(model: nn.Module, criterion: nn.Module, lr: float, damping: float) -> torch.optim.Optimizer:
    return so.KBFGSL(model, criterion, lr, damping=damping)


def _paper(curvature: str, solver: str) -> Method:
    """Chen et al.: no momentum, no averages; learning rate and alpha from a part of their grid."""

    def make(model: nn.Module, criterion: nn.Module, lr: float, alpha: float) -> torch.optim.Optimizer:
        return so.EACG(
            model, criterion, lr, curvature=curvature, solver=solver, alpha=alpha, max_cg=20, eps_cg=1e-5, momentum=0,
            factor_decay=0,
        )  # fmt: skip

    names = {"ea-cg-truncated": "EA-CG", "kfi": "KFI", "kfi-rank-one": "KFI, Eq. 13"}
    kinds = {"pch-abs": "PCH-1", "pch-clip": "PCH-2", "gauss-newton": "Gauss-Newton", "fisher-empirical": "Fisher"}
    return Method(f"{kinds[curvature]}, {names[solver]}", make, grid(lr=[0.05, 0.2], alpha=[0.1]))


def _cell(curvature: str, solver: str) -> Method:
    """One of all pairs, all else at its default."""
    return Method(
        f"{curvature}, {solver}", lambda model, criterion: so.EACG(model, criterion, curvature=curvature, solver=solver)
    )


EACG = Method("EACG", lambda model, criterion: so.EACG(model, criterion))
KFRA = Method("KFRA", lambda model, criterion: so.KFRA(model, criterion))
KFLR = Method("KFLR", lambda model, criterion: so.KFLR(model, criterion))
# The mixture's likelihood is not convex in the logits, and none that labels are drawn from: KFRA, KFLR and KFAC refuse it.
KFRA_PCH = Method("KFRA, PCH-1", lambda model, criterion: so.KFRA(model, criterion, curvature="pch-abs"))
KFRA_FISHER = Method("KFRA, empirical Fisher", lambda model, criterion: so.KFRA(model, criterion, curvature="fisher-empirical"))
KFAC = Method("KFAC", lambda model, criterion: so.KFAC(model, criterion))
# Botev et al. search learning rates 2^-6 to 2^-13 and five periods of halving, over far longer runs.
ADAM = Method("Adam", _adam, grid(lr=[2**-7, 2**-8, 2**-9], halve=[1.0, 0.5]))
ADAM_FIXED = Method("Adam", _adam, grid(lr=[1e-3, 3e-3, 1e-2, 3e-2]))
SGD = Method("SGD", _sgd, grid(lr=[0.05, 0.1, 0.2, 0.5]))
# Goldfarb et al. search learning rates and dampings (eps, for those of first order).
KBFGS = [
    Method("K-BFGS", _kbfgs, grid(lr=[0.3], damping=[0.3, 1.0])),
    Method("K-BFGS(L)", _kbfgsl, grid(lr=[0.3], damping=[0.3, 1.0])),
    Method("RMSprop", _rmsprop, grid(lr=[3e-4, 1e-3], eps=[1e-8])),
    Method("SGD", _sgd, grid(lr=[1e-3, 3e-3])),
]
LBFGS = Method("L-BFGS", lambda model, _: torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe", history_size=50))

_CONVEX, _BOUNDED, _WIDE, _WIDE_BOUNDED = CLASSIFIERS
_EA, _KFI, _EQ13 = "ea-cg-truncated", "kfi", "kfi-rank-one"
STUDIES = {
    "figures-1-to-8": [
        Study("Figures 1 and 3: CIFAR-10, cross-entropy", "cifar", [_CONVEX], [SGD, _paper("pch-abs", _EA), _paper("gauss-newton", _EA),
              _paper("fisher-empirical", _EA), _paper("pch-abs", _KFI), _paper("gauss-newton", _KFI),
              _paper("fisher-empirical", _KFI), EACG]),
        Study("Figures 5 and 7: CIFAR-10, Eq. 14", "cifar", [_BOUNDED], [SGD, _paper("pch-abs", _EA), _paper("fisher-empirical", _EA),
              _paper("pch-abs", _KFI), _paper("fisher-empirical", _KFI), EACG]),
        Study("Figures 2 and 4: wide input, cross-entropy", "cifar", [_WIDE], [SGD, _paper("pch-abs", _EA), _paper("gauss-newton", _EA),
              _paper("fisher-empirical", _EA), _paper("pch-abs", _EQ13), _paper("gauss-newton", _EQ13),
              _paper("fisher-empirical", _EQ13), EACG]),
        Study("Figures 6 and 8: wide input, Eq. 14", "cifar", [_WIDE_BOUNDED], [SGD, _paper("pch-abs", _EA), _paper("fisher-empirical", _EA),
              _paper("pch-abs", _EQ13), _paper("fisher-empirical", _EQ13), EACG]),
    ],
    "kfra-figure-2": [Study("Autoencoders: second order at defaults", "autoencoders", AUTOENCODERS, [ADAM, KFRA, KFAC, EACG])],
    "kfra-figure-3": [Study("Mixture of two binary classifiers", "mixture", [MIXTURE], [ADAM, KFRA_PCH, KFRA_FISHER, EACG])],
    "kbfgs-figure-1": [Study("Autoencoders: everything tuned but KFAC", "autoencoders", AUTOENCODERS, [ADAM, *KBFGS, KFAC])],
    "robust-regression": [Study("Corrupted labels and targets", "robust", ROBUST, [ADAM_FIXED, EACG])],
    "pinn": [Study("Poisson's equation", "pinn", [PINN], [ADAM_FIXED, LBFGS, KFLR, EACG])],
    "defaults": [
        Study("EACG(model, criterion)", results, problems, [EACG], picture=False)
        for results, problems in (
            ("autoencoders", AUTOENCODERS), ("cifar", CLASSIFIERS), ("mixture", [MIXTURE]), ("robust", ROBUST), ("pinn", [PINN]),
            ("digits", [DIGITS, FASHION]),
        )
    ],
    "no-tuning": [Study("Classifiers without tuning", "digits", [DIGITS, FASHION], [ADAM_FIXED, EACG, KFRA, KFAC])],
    "grid": [Study("Every curvature with every solver", "grid", [DIGITS_EPOCH],
                   [_cell(c, s) for c in CURVATURES for s in SOLVERS], picture=False)],
}  # fmt: skip
