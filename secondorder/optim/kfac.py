"""KFAC: the Fisher matrix by sampled labels and Kronecker-factored inverses (Martens & Grosse, 2015)."""

import math
from collections.abc import Callable

from torch import Tensor, nn

from secondorder.curvature import Curvature
from secondorder.optim._newton import NewtonOptimizer
from secondorder.optim._numbers import check_arguments
from secondorder.solvers import Solver, SolverOptions
from secondorder.stepping import DampingSchedule


class KFAC(NewtonOptimizer):
    """Trains a model by the sampled Fisher matrix and Kronecker-factored inverses; finds its step size, momentum and damping.

    For each layer z = W h + b with gradients B and g of the loss, the direction P is

        P = -(H + sqrt(k)/pi I)^{-1} (B + eta W) (E[h h^T] + pi sqrt(k) I)^{-1},   k = gamma + eta,   H = E[delta delta^T],

    delta = dL/dz [n_out] for labels drawn from the model, pi^2 = (tr E[h h^T] / n_in) / (tr H / n_out). Biases have a system of
    their own, (H + k I) d = -(g + eta b), rather than an input of ones. The step is delta theta = lr (c P + c' (previous step));
    c and c' minimise the quadratic model of the loss with the full Gauss-Newton matrix, damped by tau + eta. Levenberg-Marquardt
    brings tau down as in the paper; gamma is adapted every 20 steps. A step after which the loss has not fallen is taken back.

    Args:
        model: any module; its nn.Linear layers are covered.
        criterion: a module, or a function (output, target) -> scalar loss to be called as `optimizer.criterion`, and
            a likelihood for this curvature.
        lr: multiplies the step that the quadratic model gives, in [0, 2), so that every scheduler does what it says.
        curvature: "pch-abs", "pch-clip", "pch-clip-all", "gauss-newton", "kflr", "fisher-mc", "fisher-empirical", "fisher-exact",
            or a `secondorder.curvature.Curvature`.
        solver: "kfi", "kfi-rank-one", "ea-cg", "ea-cg-truncated", "kron-cg", "exact", "ea-isotropic", "auto", or a
            `secondorder.solvers.Solver`.
        tau: the start of both dampings, tau and gamma, relative to the first loss, > 0.
        weight_decay: eta, >= 0.
        factor_decay: of the factors' averages, in [0, 1).
        curvature_samples: the curvature (but for the criterion's part) and E[h h^T] are estimated from at most so many instances
            of every forward pass, >= 1; None: from all.
        inverse_every: the inverses are renewed every so many steps, >= 1, and at each of the first so many; the paper's 20.
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
