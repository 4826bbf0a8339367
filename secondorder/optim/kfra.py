"""KFRA: recursive Gauss-Newton blocks, Kronecker-factored inverses and adapted dampings (Botev et al., 2017)."""

import math
from collections.abc import Callable

from torch import Tensor, nn

from secondorder.curvature import Curvature
from secondorder.optim._newton import NewtonOptimizer
from secondorder.optim._numbers import check_arguments
from secondorder.solvers import Solver, SolverOptions
from secondorder.stepping import DampingSchedule


class KFRA(NewtonOptimizer):
    """Trains a model by recursive Gauss-Newton blocks and Kronecker-factored inverses; finds its step size and dampings.

    For each layer z = W h + b with gradients B and g of the loss, the direction P (Eq. 36) and the step delta (Eq. 40) are

        P = -(H + sqrt(k)/pi I)^{-1} (B + eta W) (E[h h^T] + pi sqrt(k) I)^{-1},   k = gamma + eta,   delta = lr c P,

    pi^2 = (tr E[h h^T] / n_in) / (tr H / n_out). H [n_out, n_out] goes back from layer to layer by the recursion H <- (W^T H W) *
    E[d1 d1^T] from the criterion's Hessian, d1 the activation's derivative (Eq. 26). Biases have a system of their own, (H + k I)
    d = -(g + eta b). c minimises the quadratic model of the loss with the full Gauss-Newton matrix, damped by tau + eta. `step`
    checks every delta and takes it back where the loss does not fall.

    Args:
        model: any module; its nn.Linear layers are covered.
        criterion: a module, or a function (output, target) -> scalar loss to be called as `optimizer.criterion`, and
            convex in the network's output for this curvature.
        lr: multiplies the step that the quadratic model gives, in [0, 2), so that every scheduler does what it says.
        curvature: "pch-abs", "pch-clip", "pch-clip-all", "gauss-newton", "kflr", "fisher-mc", "fisher-empirical", "fisher-exact",
            or a `secondorder.curvature.Curvature`.
        solver: "kfi", "kfi-rank-one", "ea-cg", "ea-cg-truncated", "kron-cg", "exact", "ea-isotropic", "auto", or a
            `secondorder.solvers.Solver`.
        tau: the start of the full Gauss-Newton matrix' damping, relative to the first loss, > 0; Levenberg-Marquardt adapts it
            every 5 steps.
        gamma: the start of the blocks' damping, relative to the first loss, > 0; chosen greedily every 20 steps.
        weight_decay: eta, >= 0.
        factor_decay: of the factors' averages, in [0, 1); the paper's two variants are 0 and 0.9.
        curvature_samples: the curvature (but for the criterion's part) and E[h h^T] are estimated from at most so many instances
            of every forward pass, >= 1; None: from all.
        inverse_every: the inverses are renewed every so many steps, >= 1, and at each of the first so many.
        max_factor_elements: for a layer with n_in^2 above this, >= 0, "kfi" takes "kfi-rank-one" and "auto" "ea-isotropic".
        max_factor_dim: layers with more outputs than this have no curvature, since H has so many rows: the fallback updates them,
            which is said once, and a layer that leads there gets its empirical Fisher block; >= 1, None: there is no limit.
        subsample: the fraction of the batch that the quadratic model is evaluated on, in (0, 1]; at least 100 instances with 500
            outputs, and the whole batch where its rows are no instances by themselves.
        average: whether averages of the parameters are kept, for `averaged_parameters`.
        fallback: what updates parameters that no curvature covers: "sgd" (warns once; here they are part of the quadratic model)
            or "error".
        maximize: whether the loss is maximised: everything, the curvature too, is then as for its negative.
        nonfinite: what a step does that meets NaN or inf: "error" raises `secondorder.NonFiniteError`, "skip" leaves everything
            as it is and counts in `skipped_steps`.

    lr, weight_decay, factor_decay and maximize are read from `param_groups` at every step: the solver's weight_decay from the
    first group, factor_decay of a layer from its weight's group; lr and maximize must be the same in all.

    Raises:
        TypeError, ValueError: an argument is not as described.
        RuntimeError: from `step`, where gradients or records are missing or numbers are not finite; nothing has changed then.

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
