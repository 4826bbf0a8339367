"""LayerwiseNewton: any curvature and solver; step size, momentum and damping from a quadratic model of the loss."""

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
class LayerwiseNewton(NewtonOptimizer):
    """Trains a model by damped Newton steps layer by layer, and finds step size, momentum and damping by itself.

        optimizer = secondorder.LayerwiseNewton(model, criterion)
        for x, y in loader:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()

    For each layer z = W h + b, with gradients B and g, bias Hessian H and input factor A ~ E[h h^T], the directions solve

        H P A + l P = -B     and     (H + l I) d = -g,

    with l the damping plus the weight decay. The step is delta = lr (c P + c' (previous delta)), where c and c' minimise the
    quadratic model of the loss,

        q(delta) = delta^T (g + eta theta) + 1/2 delta^T (G + (tau + eta) I) delta,

    with G the full Gauss-Newton matrix and eta the weight decay (Martens & Grosse, 2015, section 7). The damping tau falls while
    q predicts the loss well, and rises while it does not. A step after which the loss has not fallen is taken back. To judge a
    step, the optimizer evaluates the loss at other parameters: from what the tape has recorded or, if the loss has terms outside
    of the criterion, by the closure that `step` is given.

    Args:
        model: any module; its nn.Linear layers are covered. A layer that something else than an elementwise function follows gets
            its empirical Fisher block where the curvature is one by recursion.
        curvature: "pch-abs" (PCH-1: absolute values), "pch-clip" (PCH-2: clips in Eq. 8b, absolute values in Eq. 8a),
            "pch-clip-all" (clips in both), "gauss-newton", "kflr", "fisher-mc", "fisher-empirical", "fisher-exact", or a
            `secondorder.curvature.Curvature`, such as PCH(gamma).
        solver: "auto" ("kfi" up to n_in = 1024, else "ea-isotropic"), "ea-cg", "ea-cg-truncated", "kron-cg", "kfi",
            "kfi-rank-one", "exact", "ea-isotropic", or a `secondorder.solvers.Solver`, which has its own settings.
        max_cg: the most iterations of the solvers that use conjugate gradients, >= 1.
        eps_cg: these solvers stop once the residual is at most this times the first one, >= 0.
        weight_decay: eta, >= 0. The penalty weight_decay/2 |theta|^2 is part of the quadratic model.
        factor_decay: decay of the exponential averages of H and A over their renewals, in [0, 1); they are bias-corrected. 0: the
            last renewal alone.
        curvature_every: H and A are renewed at the first curvature_every steps, and then at every curvature_every-th; >= 1.
        curvature_samples: at most so many instances of each forward pass are used for E[h h^T] and for the curvature, except the
            criterion's Hessian, which uses all; >= 1. None: all are used. E[h] always uses all.
        inverse_every: the solver's factorisations are renewed at the first inverse_every steps, and then at every
            inverse_every-th; >= 1.
        max_factor_elements: limit on n_in^2 of a layer, >= 0. Above it "kfi" uses "kfi-rank-one"; "auto" uses "ea-isotropic"
            above the smaller of this and 1024^2.
        damping: the start of tau, relative to the first loss, > 0. None: 250 / m^2 for batches of m instances, at least 1e-4 and
            at most 1. tau stays above a tenth of its start. Where the losses of new batches average a fifth more over some 3
            steps than over some 20, tau and this bound become four times what they were, the bound at most 400 times the first
            one; else the bound falls by 1 % a step, to where it began.

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
