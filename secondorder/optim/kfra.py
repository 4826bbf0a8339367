"""KFRA: recursive Gauss-Newton blocks, Kronecker-factored inverses and adapted dampings (Botev et al., 2017)."""

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
class KFRA(NewtonOptimizer):
    """Trains a model by recursive Gauss-Newton blocks and Kronecker-factored inverses; finds its step size and dampings.

    For each layer z = W h + b with gradients B and g of the loss, the direction P (Eq. 36) and the step delta (Eq. 40) are

        P = -(H + sqrt(k)/pi I)^{-1} (B + eta W) (E[h h^T] + pi sqrt(k) I)^{-1},   k = gamma + eta,   delta = lr c P,

    where pi^2 = (tr E[h h^T] / n_in) / (tr H / n_out). H [n_out, n_out] goes from layer to layer, backwards from the criterion's
    Hessian, by the recursion H <- (W^T H W) * E[d1 d1^T] with d1 the activation's derivative (Eq. 26). Biases have a system of
    their own, (H + k I) d = -(g + eta b). c minimises the quadratic model of the loss with the full Gauss-Newton matrix, damped
    by tau + eta. `step` takes delta back if the loss does not fall.

    Args:
        criterion: a module, or a function (output, target) -> scalar loss. The loop must compute its loss by it, and call a
            function as `optimizer.criterion`. It must be convex in the network's output for this curvature.
        tau: the start of the damping of the full Gauss-Newton matrix, relative to the first loss, > 0. A Levenberg-Marquardt rule
            adapts it every 5 steps.
        gamma: the start of the damping of the blocks, relative to the first loss, > 0. Every 20 steps it becomes the best of
            three values under the quadratic model.
        factor_decay: decay of the factors' exponential averages, in [0, 1); the paper's two variants are 0 and 0.9.
        inverse_every: the inverses are renewed at the first inverse_every steps, and then at every inverse_every-th; >= 1.
        max_factor_elements: limit on n_in^2 of a layer, >= 0. Above it "kfi" uses "kfi-rank-one"; "auto" uses "ea-isotropic"
            above the smaller of this and 1024^2.

    Source: Botev, Ritter & Barber, "Practical Gauss-Newton Optimisation for Deep Learning" (ICML 2017), whose equations the
    numbers from 23 on are.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[..., Tensor] | None = None,
        lr: float = 1.0,
        *,
        curvature: str | Curvature = "gauss-newton",
        solver: str | Solver = "kfi",
        tau: float = 0.01,
        gamma: float = 0.01,
        weight_decay: float = 1e-5,
        factor_decay: float = 0.9,
        curvature_samples: int | None = None,
        inverse_every: int = 1,
        max_factor_elements: int = 2**24,
        max_factor_dim: int | None = 4096,
        subsample: float = 1.0,
        average: bool = True,
        fallback: str = "sgd",
        maximize: bool = False,
        nonfinite: str = "error",
    ):
        check_arguments(
            type(self).__name__, [("tau", tau, 0 < tau < math.inf, "> 0"), ("gamma", gamma, 0 < gamma < math.inf, "> 0")]
        )
        super().__init__(
            model, criterion, lr, curvature=curvature, solver=solver,
            options=SolverOptions(max_factor_elements=max_factor_elements), weight_decay=weight_decay, factor_decay=factor_decay,
            curvature_every=1, curvature_samples=curvature_samples, inverse_every=inverse_every, max_factor_dim=max_factor_dim,
            schedule=DampingSchedule(tau=tau, gamma=gamma), subsample=subsample, average=average,
            fallback=fallback, maximize=maximize, nonfinite=nonfinite,
        )  # fmt: skip
