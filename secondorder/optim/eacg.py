"""EACG: the positive-curvature Hessian and EA-CG (Chen et al., "EA-CG", 2019)."""

from collections.abc import Callable

from torch import Tensor, nn

from secondorder.curvature import Curvature
from secondorder.damping import Adaptation
from secondorder.optim.layerwise import LayerwiseOptimizer


class EACG(LayerwiseOptimizer):
    """Trains the linear layers of a model by damped Newton steps under the positive-curvature Hessian (PCH).

    For each layer z = W h + b, with gradients B and g of the mean loss, bias Hessian H by backward recursion (Eq. 8) and mean
    input a = E[h], the directions solve (Eq. 10, 11b)

        (1 - alpha) H P a a^T + alpha P = -B     and     ((1 - alpha) H + alpha I) d = -g,

    and the update is V <- momentum V + P, W <- (1 - lr weight_decay) W + lr V, likewise for b. The criterion may be non-convex.

        optimizer = secondorder.EACG(model, criterion)
        for x, y in loader:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()

    The paper's own method is `momentum=0, factor_decay=0, solver="ea-cg-truncated"`.

    Args:
        model: any module; its nn.Linear layers are covered wherever elementwise functions connect them (docs/design.md).
        criterion: a module, or a function (output, target) -> scalar loss to be called as `optimizer.criterion`.
        lr: step size, >= 0; or None: step and momentum from the quadratic model of the loss, and the damping adapted to how well
            that predicts each step (`LayerwiseOptimizer`); alpha and momentum are not used then.
        curvature: "pch-abs" (PCH-1, gamma = -1), "pch-clip" (PCH-2, gamma = 0), "gauss-newton", "kflr", "fisher-mc",
            "fisher-empirical", "fisher-exact", or a `secondorder.curvature.Curvature`, such as PCH(gamma).
        alpha: damping, in (0, 1): the weight of the identity against H.
        max_cg: at most this many conjugate gradient iterations, >= 1.
        eps_cg: CG stops at this residual, relative to the first one, >= 0.
        solver: "ea-cg" (exact across the mean input, CG along it; the default with a learning rate), "ea-cg-truncated" (the
            paper's iterates), "kron-cg", "kfi", "kfi-rank-one", "exact", or "ea-isotropic" (the default
            without one); see `secondorder.solvers`.
        momentum: in [0, 1).
        weight_decay: >= 0; see `decoupled_weight_decay`.
        factor_decay: in [0, 1); H and a are bias-corrected exponential averages with this decay over steps; 0: this step's alone.
        curvature_every: H and a are renewed every so many steps, >= 1; in between nothing is recorded.
        inverse_every: the solver's factorisations are renewed every so many steps, >= 1.
        max_factor_elements: "kfi" takes "kfi-rank-one" for a layer with n_in^2 above this, >= 0.
        damping: where the damping of lr=None starts, relative to the first loss, > 0.
        subsample: the fraction of the batch that the quadratic model of lr=None is evaluated on, in (0, 1]; at least 100
            instances.
        average: whether averages of the parameters are kept, for `averaged_parameters`.
        fallback: what updates parameters that no curvature covers: "sgd" (warns once) or "error".
        maximize: whether the loss is maximised: everything, the curvature too, is then as for its negative.
        decoupled_weight_decay: True: W <- (1 - lr weight_decay) W as in AdamW; False: weight_decay W is part of the gradient, as
            in SGD and Adam. With lr=None it always is, and the penalty weight_decay/2 |theta|^2 part of the model of the loss.
        nonfinite: what a step does that meets NaN or inf: "error" raises `secondorder.NonFiniteError`, "skip" leaves everything
            as it is and counts in `skipped_steps`.

    lr, alpha, momentum, weight_decay, factor_decay, maximize and decoupled_weight_decay are read from `param_groups` at every
    step; alpha and factor_decay of a layer from its weight's group, maximize must be the same in all.

    Raises:
        TypeError, ValueError: an argument is not as described.
        RuntimeError: from `step`, where gradients or records are missing or numbers are not finite; nothing has changed then.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[..., Tensor],
        lr: float | None = 0.02,
        *,
        curvature: str | Curvature = "pch-abs",
        alpha: float = 0.01,
        max_cg: int = 50,
        eps_cg: float = 1e-4,
        solver: str | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        factor_decay: float = 0.9,
        curvature_every: int = 1,
        inverse_every: int = 1,
        max_factor_elements: int = 2**24,
        damping: float = 0.001,
        subsample: float = 0.25,
        average: bool = False,
        fallback: str = "sgd",
        maximize: bool = False,
        decoupled_weight_decay: bool = True,
        nonfinite: str = "error",
    ):
        super().__init__(
            model, criterion, lr, curvature=curvature, solver=solver or ("ea-isotropic" if lr is None else "ea-cg"), alpha=alpha,
            max_cg=max_cg, eps_cg=eps_cg, momentum=momentum, weight_decay=weight_decay, factor_decay=factor_decay,
            curvature_every=curvature_every, inverse_every=inverse_every, max_factor_elements=max_factor_elements,
            adaptation=Adaptation(tau=damping, momentum=True, every=1), subsample=subsample, average=average,
            fallback=fallback, maximize=maximize, decoupled_weight_decay=decoupled_weight_decay, nonfinite=nonfinite,
        )  # fmt: skip
