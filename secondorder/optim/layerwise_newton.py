"""LayerwiseNewton: any curvature and solver; step size, momentum and damping from a quadratic model of the loss."""

import math
from collections.abc import Callable

from torch import Tensor, nn

from secondorder.curvature import Curvature
from secondorder.optim._newton import NewtonOptimizer
from secondorder.optim._numbers import check_arguments
from secondorder.solvers import Solver, SolverOptions
from secondorder.stepping import DampingSchedule


class LayerwiseNewton(NewtonOptimizer):
    """Trains a model by damped Newton steps layer by layer, with nothing to be tuned.

        optimizer = secondorder.LayerwiseNewton(model, criterion)
        for x, y in loader:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()

    For each layer z = W h + b, with gradients B and g, bias Hessian H and input factor A ~ E[h h^T], the directions solve

        H P A + l P = -B     and     (H + l I) d = -g,

    l the damping plus weight decay. The step is delta = lr (c P + c' (previous delta)); c and c' minimise the quadratic model of
    the loss,

        q(delta) = delta^T (g + eta theta) + 1/2 delta^T (G + (tau + eta) I) delta,

    G the full Gauss-Newton matrix and eta the weight decay (Martens & Grosse, 2015, section 7). The damping tau follows how well
    q predicts the loss, and a step after which the loss has not fallen is taken back. What
    backward() is called on is evaluated anew from what was recorded or, with terms outside of the criterion, say, by a closure.

    Args:
        model: any module; its nn.Linear layers are covered wherever elementwise functions connect them (docs/design.md).
        criterion: a module, or a function (output, target) -> scalar loss to be called as `optimizer.criterion`.
        lr: multiplies the step that the quadratic model gives, in [0, 2), so that every scheduler does what it says.
        curvature: "pch-abs" (PCH-1: absolute values), "pch-clip" (PCH-2: clips in Eq. 8b, absolute values in Eq. 8a),
            "pch-clip-all" (clips in both), "gauss-newton", "kflr", "fisher-mc", "fisher-empirical", "fisher-exact", or a
            `secondorder.curvature.Curvature`, such as PCH(gamma).
        solver: "auto" ("kfi" up to n_in = 1024, else "ea-isotropic"), "ea-cg", "ea-cg-truncated", "kron-cg", "kfi",
            "kfi-rank-one", "exact", "ea-isotropic", or a `secondorder.solvers.Solver`, which has its own settings.
        max_cg: the CG solvers do at most this many iterations, >= 1.
        eps_cg: the CG solvers stop at this residual, relative to the first one, >= 0.
        weight_decay: eta, >= 0: the penalty weight_decay/2 |theta|^2 is part of the model of the loss.
        factor_decay: in [0, 1); H and A are bias-corrected exponential averages with this decay over their renewals; 0: the last
            one alone.
        curvature_every: H and A are renewed every so many steps, >= 1, and at each of the first so many.
        curvature_samples: H (but for the criterion's part) and E[h h^T] are estimated from at most so many instances of every
            forward pass, >= 1; None: from all. E[h] is the whole batch's.
        inverse_every: the solver's factorisations are renewed every so many steps, >= 1, and at each of the first so many.
        max_factor_elements: for a layer with n_in^2 above this, >= 0, "kfi" takes "kfi-rank-one" and "auto" "ea-isotropic".
        max_factor_dim: layers with more outputs than this have no curvature, since H has so many rows: the fallback updates them,
            which is said once, and a layer that leads there gets its empirical Fisher block; >= 1, None: there is no limit.
        damping: where tau starts, relative to the first loss, > 0; it stays above a tenth of that, and above more where steps do
            not generalise (`secondorder.stepping.LossTrend`). None: 250 / m^2 for m instances, from 1e-4 to 1.
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

    Source: the curvature and the solvers of Chen et al., "EA-CG" (AAAI 2019), whose equations Eq. 8a and 8b are; the steps of
    Martens & Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature" (ICML 2015).
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[..., Tensor] | None = None,
        lr: float = 1.0,
        *,
        curvature: str | Curvature = "pch-abs",
        solver: str | Solver = "auto",
        max_cg: int = 50,
        eps_cg: float = 1e-4,
        weight_decay: float = 0.0,
        factor_decay: float = 0.5,
        curvature_every: int = 5,
        curvature_samples: int | None = None,
        inverse_every: int = 5,
        max_factor_elements: int = 2**24,
        max_factor_dim: int | None = 4096,
        damping: float | None = None,
        subsample: float = 0.25,
        average: bool = False,
        fallback: str = "sgd",
        maximize: bool = False,
        nonfinite: str = "error",
    ):
        check_arguments(type(self).__name__, [("damping", damping, damping is None or 0 < damping < math.inf, "> 0")])
        super().__init__(
            model, criterion, lr, curvature=curvature, solver=solver,
            options=SolverOptions(max_cg, eps_cg, max_factor_elements), weight_decay=weight_decay, factor_decay=factor_decay,
            curvature_every=curvature_every, curvature_samples=curvature_samples, inverse_every=inverse_every,
            max_factor_dim=max_factor_dim, schedule=DampingSchedule(tau=damping, floor=0.1, momentum=True, every=1),
            subsample=subsample, average=average, fallback=fallback, maximize=maximize, nonfinite=nonfinite,
        )  # fmt: skip
