"""Which methods each experiment compares, on which problems."""

from dataclasses import dataclass

import torch
from torch import nn

import secondorder as so
from bench import peers
from bench.experiments.harness import Method, Supervised, grid
from bench.experiments.problems import (
    AUTOENCODERS,
    CLASSIFIERS,
    DIGITS,
    DIGITS_500,
    DIGITS_EPOCH,
    FASHION,
    MIXTURE,
    PINN,
    PUBLISHED,
    ROBUST,
)
from secondorder.curvature import CURVATURES
from secondorder.solvers import SOLVERS


@dataclass(frozen=True)
class Study:
    """Methods compared on problems; studies with the same `results` share runs."""

    title: str
    results: str  # the file's stem
    problems: list[Supervised]
    methods: list[Method]
    picture: bool = True
    pilot: float = 1.0  # share of the seconds after which settings are chosen


def _adam(model: nn.Module, _: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr, fused=True)


def _sgd(model: nn.Module, _: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9)


def _rmsprop(model: nn.Module, _: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(model.parameters(), lr, alpha=0.9)


def _kbfgs(model: nn.Module, criterion: nn.Module, lr: float, damping: float) -> torch.optim.Optimizer:
    return so.KBFGS(model, criterion, lr, damping=damping, scale=None, max_step=None)


def _kbfgsl(model: nn.Module, criterion: nn.Module, lr: float, damping: float) -> torch.optim.Optimizer:
    return so.KBFGSL(model, criterion, lr, damping=damping, scale=None, max_step=None)


def _chen(curvature: str, solver: str) -> Method:
    """Chen et al.: no momentum, no averages; learning rate and alpha from the ends of their grid.

    Where a layer's inputs are too many, "kfi" takes Eq. 13 by itself, as the paper did for the first layer on ImageNet-10.
    """

    def make(model: nn.Module, criterion: nn.Module, lr: float, alpha: float) -> torch.optim.Optimizer:
        return so.EACG(
            model, criterion, lr, curvature=curvature, solver=solver, alpha=alpha, max_cg=20, eps_cg=1e-5, momentum=0,
            factor_decay=0, max_step=None,
        )  # fmt: skip

    curvatures = {"pch-abs": "PCH-1", "gauss-newton": "Gauss-Newton", "fisher-empirical": "Fisher"}
    solvers = {"ea-cg-truncated": "EA-CG", "kfi": "KFI"}
    return Method(f"{curvatures[curvature]}, {solvers[solver]}", make, grid(lr=[0.05, 0.2], alpha=[0.01, 0.1]))


def _curvatures_and_solvers(convex: bool) -> list[Method]:
    """Between SGD and the defaults; the Gauss-Newton matrix is for convex criteria."""
    curvatures = ["pch-abs", "gauss-newton", "fisher-empirical"] if convex else ["pch-abs", "fisher-empirical"]
    return [SGD, *(_chen(curvature, solver) for solver in ("ea-cg-truncated", "kfi") for curvature in curvatures), NEWTON]


def _cell(curvature: str, solver: str) -> Method:
    """One of all pairs, all else at its default."""
    return Method(
        f"{curvature}, {solver}",
        lambda model, criterion: so.LayerwiseNewton(model, criterion, curvature=curvature, solver=solver),
    )


def _eigen(curvature: str) -> Method:
    """EigenAdam with the bases of a bias Hessian, or of the gradient."""

    def make(model: nn.Module, criterion: nn.Module) -> torch.optim.Optimizer:
        return so.EigenAdam(model, curvature=curvature, criterion=None if curvature == "gradient" else criterion)

    return Method(f"EigenAdam, {curvature}", make)


def _cheaper(optimizer: type[torch.optim.Optimizer], **options: int) -> Method:
    """An optimizer with curvature from some instances, or now and then."""
    name = ", ".join(f"{key[10:]}={value}" for key, value in options.items())
    return Method(f"{optimizer.__name__}, {name}", lambda model, criterion: optimizer(model, criterion, **options))


NEWTON = Method("LayerwiseNewton", lambda model, criterion: so.LayerwiseNewton(model, criterion))
EACG = Method("EACG", lambda model, criterion: so.EACG(model, criterion, lr=0.02))
EACG_UNBOUNDED = Method("EACG, max_step=None", lambda model, criterion: so.EACG(model, criterion, lr=0.02, max_step=None))
KFRA = Method("KFRA", lambda model, criterion: so.KFRA(model, criterion))
KFLR = Method("KFLR", lambda model, criterion: so.KFLR(model, criterion))
# The mixture's likelihood is not convex in the logits: KFRA's own recursion refuses it.
KFRA_PCH = Method("KFRA, PCH-1", lambda model, criterion: so.KFRA(model, criterion, curvature="pch-abs"))
KFRA_FISHER = Method("KFRA, empirical Fisher", lambda model, criterion: so.KFRA(model, criterion, curvature="fisher-empirical"))
KFAC = Method("KFAC", lambda model, criterion: so.KFAC(model, criterion))
# Botev et al. search learning rates 2^-6 to 2^-13 and five periods of halving, over far longer runs.
ADAM = Method("Adam", _adam, grid(lr=[2**-6, 2**-7, 2**-8, 2**-9], halve=[1.0, 0.5]))
# Not 2^-6: the mixture's losses are so close to zero then that they are the seed's, 1e-5 to 7e-3.
ADAM_MIXTURE = Method("Adam", _adam, grid(lr=[2**-7, 2**-8, 2**-9], halve=[1.0, 0.5]))
# -log p is convex in the probability p of the label, too, and its Gauss-Newton matrix is then the empirical Fisher matrix.
MIXTURE_METHODS = [ADAM_MIXTURE, KFLR, KFAC, KFRA_FISHER, KFRA_PCH, NEWTON]
ADAM_FIXED = Method("Adam", _adam, grid(lr=[1e-3, 3e-3, 1e-2, 3e-2]))
SGD = Method("SGD", _sgd, grid(lr=[0.05, 0.1, 0.2, 0.5]))
# Goldfarb et al. search learning rates and dampings (eps, for RMSprop and Adam).
KBFGS = [
    Method("K-BFGS", _kbfgs, grid(lr=[0.1, 0.3], damping=[0.3, 1.0])),
    Method("K-BFGS(L)", _kbfgsl, grid(lr=[0.1, 0.3], damping=[0.3, 1.0])),
    Method("RMSprop", _rmsprop, grid(lr=[3e-4, 1e-3, 3e-3])),
    Method("SGD", _sgd, grid(lr=[1e-3, 3e-3, 1e-2])),
]
LBFGS = Method("L-BFGS", lambda model, _: torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe", history_size=50))
EIGEN = Method("EigenAdam", lambda model, _: so.EigenAdam(model))
ADAM_FALLING = Method("Adam", _adam, grid(lr=[1e-3, 3e-3]) + grid(lr=[1e-3, 3e-3], linear=[1.0]))
MUON = Method("Muon", lambda model, _, lr: peers.muon(model, lr), grid(lr=[3e-3, 1e-2]) + grid(lr=[3e-3, 1e-2], linear=[1.0]))
CHEAPER = [_cheaper(so.LayerwiseNewton, curvature_samples=k) for k in (100, 25)] + [
    _cheaper(so.LayerwiseNewton, curvature_every=20)
]
CHEAPER_EACG = [_cheaper(so.EACG, curvature_samples=k) for k in (100, 25)]
CHEAPER_EACG += [_cheaper(so.EACG, curvature_every=10), _cheaper(so.EACG, curvature_every=10, curvature_samples=100)]

STUDIES = {
    "figures-1-to-8": [
        Study(f"Figures {numbers}: {problem.name}", "cifar", [problem], _curvatures_and_solvers(convex))
        for numbers, problem, convex in zip(("1 and 3", "5 and 7", "2 and 4", "6 and 8"), CLASSIFIERS, (True, False) * 2)
    ],
    "kfra-figure-2": [Study("Autoencoders: second order at defaults", "autoencoders", AUTOENCODERS, [ADAM, KFRA, KFAC, NEWTON])],
    "kfra-figure-3": [Study("A mixture of two classifiers", "mixture", [MIXTURE], MIXTURE_METHODS)],
    "kbfgs-figure-1": [Study("Autoencoders: everything tuned but KFAC", "autoencoders", AUTOENCODERS, [ADAM, *KBFGS, KFAC])],
    "robust-regression": [Study("Corrupted labels and targets", "robust", ROBUST, [ADAM_FIXED, NEWTON, EACG_UNBOUNDED])],
    "pinn-papers": [Study("Poisson's equation", "pinn", [PINN], [ADAM_FIXED, LBFGS, KFLR, NEWTON])],
    "defaults": [
        Study("LayerwiseNewton(model, criterion)", results, problems, [NEWTON], picture=False)
        for results, problems in (
            ("autoencoders", AUTOENCODERS), ("cifar", CLASSIFIERS), ("mixture", [MIXTURE]), ("robust", ROBUST), ("pinn", [PINN]),
            ("digits", [DIGITS, FASHION]),
        )
    ],
    "no-tuning": [
        Study("Classifiers without tuning", "digits", [DIGITS, FASHION], [ADAM_FIXED, NEWTON, EACG_UNBOUNDED, KFRA, KFAC])
    ],
    "cheaper-curvature": [
        Study("Curvature for less: LayerwiseNewton", "cheaper", [DIGITS_500, AUTOENCODERS[0]], [NEWTON, *CHEAPER]),
        Study("Curvature for less: EACG", "cheaper", [DIGITS_500], [EACG, *CHEAPER_EACG]),
    ],
    "eigen-curvatures": [
        Study("EigenAdam's output bases", "eigen_curvatures", [DIGITS, AUTOENCODERS[0], ROBUST[0]],
              [_eigen(c) for c in ("gradient", "pch-abs", "gauss-newton", "fisher-mc", "fisher-empirical")], picture=False),
    ],
    "published-size": [
        Study(f"At its published size: {problem.name.partition(',')[0]}", "published_size", [problem],
              [ADAM_FALLING, MUON, EIGEN, *papers], pilot=0.1)
        for problem, papers in zip(PUBLISHED, ([EACG, NEWTON], [KBFGS[0], NEWTON]))
    ],
    "grid": [Study("Every curvature with every solver", "grid", [DIGITS_EPOCH],
                   [_cell(c, s) for c in CURVATURES for s in SOLVERS], picture=False)],
}  # fmt: skip
