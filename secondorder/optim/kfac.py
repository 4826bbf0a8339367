"""KFAC: the Fisher matrix by sampled labels and Kronecker-factored inverses (Martens & Grosse, 2015)."""

import math
from collections.abc import Callable

from torch import Tensor, nn

from secondorder.curvature import Curvature
from secondorder.optim._docstrings import complete_docstring
from secondorder.optim._newton import NewtonOptimizer
from secondorder.optim._numbers import check_arguments
from secondorder.solvers import Solver, SolverOptions
from secondorder.stepping import DampingSchedule


@complete_docstring
class KFAC(NewtonOptimizer):
    """Trains a model by the sampled Fisher matrix and Kronecker-factored inverses; finds its step size, momentum and damping.

    For each layer z = W h + b with gradients B and g of the loss, the direction P is

        P = -(H + sqrt(k)/pi I)^{-1} (B + eta W) (E[h h^T] + pi sqrt(k) I)^{-1},   k = gamma + eta,   H = E[delta delta^T],

    where delta = dL/dz [n_out] for labels drawn from the model, and pi^2 = (tr E[h h^T] / n_in) / (tr H / n_out). Biases have a
    system of their own, (H + k I) d = -(g + eta b), rather than an input of ones. The step is lr (c P + c' (previous step)),
    where c and c' minimise the quadratic model of the loss with the full Gauss-Newton matrix, damped by tau + eta. The
    Levenberg-Marquardt rule brings tau down as in the paper; gamma is adapted every 20 steps. A step after which the loss has not
    fallen is taken back.

    Args:
        criterion: a module, or a function (output, target) -> scalar loss. The loop must compute its loss by it, and call a
            function as `optimizer.criterion`. For this curvature it must be a negative log-likelihood that labels can be drawn
            from: cross-entropy, NLL of log_softmax, MSE, BCE with logits or of a sigmoid, a `secondorder.criteria.CompositeLoss`
            of these, or one with a method sample(output) -> target.
        tau: the start of both dampings, tau and gamma, relative to the first loss, > 0.
        factor_decay: decay of the factors' exponential averages, in [0, 1).
        inverse_every: the inverses are renewed at the first inverse_every steps, and then at every inverse_every-th; >= 1. 20 in
            the paper.
        max_factor_elements: limit on n_in^2 of a layer, >= 0. Above it "kfi" uses "kfi-rank-one"; "auto" uses "ea-isotropic"
            above the smaller of this and 1024^2.

    Source: Martens & Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature" (ICML 2015).
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[..., Tensor] | None = None,
        lr: float = 1.0,
        *,
        curvature: str | Curvature = "fisher-mc",
        solver: str | Solver = "kfi",
        tau: float = 0.001,
        weight_decay: float = 1e-5,
        factor_decay: float = 0.95,
        curvature_samples: int | None = None,
        inverse_every: int = 20,
        max_factor_elements: int = 2**24,
        max_factor_dim: int | None = 4096,
        subsample: float = 0.25,
        average: bool = True,
        fallback: str = "sgd",
        maximize: bool = False,
        nonfinite: str = "error",
    ):
        check_arguments(type(self).__name__, [("tau", tau, 0 < tau < math.inf, "> 0")])
        super().__init__(
            model, criterion, lr, curvature=curvature, solver=solver,
            options=SolverOptions(max_factor_elements=max_factor_elements), weight_decay=weight_decay, factor_decay=factor_decay,
            curvature_every=1, curvature_samples=curvature_samples, inverse_every=inverse_every, max_factor_dim=max_factor_dim,
            schedule=DampingSchedule(tau=tau, gamma=tau, momentum=True), subsample=subsample, average=average,
            fallback=fallback, maximize=maximize, nonfinite=nonfinite,
        )  # fmt: skip
