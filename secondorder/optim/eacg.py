"""EACG: the positive-curvature Hessian and EA-CG (Chen et al., "EA-CG", 2019)."""

from collections.abc import Callable

from torch import Tensor, nn

from secondorder.curvature import Curvature
from secondorder.damping import Adaptation
from secondorder.optim.layerwise import LayerwiseOptimizer


class EACG(LayerwiseOptimizer):
    """Trains the linear layers of a model by damped Newton steps under the positive-curvature Hessian (PCH).

        optimizer = secondorder.EACG(model, criterion)
        for x, y in loader:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()

    For each layer z = W h + b, with gradients B and g of the mean loss, the curvature is a bias Hessian H by backward recursion
    (Chen et al., Eq. 8) times an input factor A ~ E[h h^T]. The criterion may be non-convex. There are two ways to step:

    - **Without a learning rate** (lr=None, the default): the directions solve the systems of the solver with the damping tau
      (`secondorder.solvers`), step size and momentum minimise the quadratic model of the loss, tau follows how well that model
      predicts, and a step that fails is taken back (`LayerwiseOptimizer`). Nothing is to be tuned. The criterion must be called
      on the very tensor that the model returned.
    - **With a learning rate** (the paper's): with a = E[h], the directions solve (Eq. 10, 11b)

          (1 - alpha) H P a a^T + alpha P = -B     and     ((1 - alpha) H + alpha I) d = -g,

      and the update is V <- momentum V + P, W <- (1 - lr weight_decay) W + lr V, likewise for b. A step costs little more than
      one of SGD. lr=0.02 is a start; the paper's own method is `momentum=0, factor_decay=0, solver="ea-cg-truncated"`.

    Args:
        model: any module; its nn.Linear layers are covered wherever elementwise functions connect them (docs/design.md).
        criterion: a module, or a function (output, target) -> scalar loss to be called as `optimizer.criterion`.
        lr: step size, >= 0; or None: no step size is to be given; alpha and momentum are not used then.
        curvature: "pch-abs" (PCH-1, gamma = -1), "pch-clip" (PCH-2, gamma = 0), "gauss-newton", "kflr", "fisher-mc",
            "fisher-empirical", "fisher-exact", or a `secondorder.curvature.Curvature`, such as PCH(gamma).
        alpha: damping, in (0, 1): the weight of the identity against H.
        max_cg: at most this many conjugate gradient iterations, >= 1.
        eps_cg: CG stops at this residual, relative to the first one, >= 0.
        solver: "ea-cg" (exact across the mean input, CG along it; the default with a learning rate), "ea-cg-truncated" (the
            paper's iterates), "kron-cg", "kfi", "kfi-rank-one", "exact", "ea-isotropic", or "auto" (the default without one);
            see `secondorder.solvers`.
        momentum: in [0, 1).
        weight_decay: >= 0; see `decoupled_weight_decay`.
        factor_decay: in [0, 1); H and a are bias-corrected exponential averages with this decay over their renewals; 0: the last
            one alone. Default: 0.9 with a learning rate, 0.5 without.
        curvature_every: H and a are renewed every so many steps, >= 1, and at each of the first so many; with a learning rate
            nothing is recorded in between. Default: 1 with a learning rate, 5 without.
        curvature_samples: H (but for the criterion's part) and E[h h^T] are estimated from at most so many instances of every
            forward pass, >= 1; None: from all. a is the whole batch's.
        inverse_every: likewise the solver's factorisations.
        max_factor_elements: "kfi" takes "kfi-rank-one" for a layer with n_in^2 above this, >= 0.
        damping: where the damping of lr=None starts, relative to the first loss, > 0; it stays above a tenth of that, and above
            more where steps do not generalise (`secondorder.damping.Watch`). None: 250 / m^2 for m instances, from 1e-4 to 1.
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
        lr: float | None = None,
        *,
        curvature: str | Curvature = "pch-abs",
        alpha: float = 0.01,
        max_cg: int = 50,
        eps_cg: float = 1e-4,
        solver: str | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        factor_decay: float | None = None,
        curvature_every: int | None = None,
        curvature_samples: int | None = None,
        inverse_every: int | None = None,
        max_factor_elements: int = 2**24,
        damping: float | None = None,
        subsample: float = 0.25,
        average: bool = False,
        fallback: str = "sgd",
        maximize: bool = False,
        decoupled_weight_decay: bool = True,
        nonfinite: str = "error",
    ):
        if solver is None:
            solver = "auto" if lr is None else "ea-cg"
        if factor_decay is None:
            factor_decay = 0.5 if lr is None else 0.9
        every = 5 if lr is None else 1
        super().__init__(
            model, criterion, lr, curvature=curvature, solver=solver, alpha=alpha, max_cg=max_cg, eps_cg=eps_cg,
            momentum=momentum, weight_decay=weight_decay, factor_decay=factor_decay,
            curvature_every=every if curvature_every is None else curvature_every, curvature_samples=curvature_samples,
            inverse_every=every if inverse_every is None else inverse_every, max_factor_elements=max_factor_elements,
            adaptation=Adaptation(tau=damping, floor=0.1, momentum=True, every=1), subsample=subsample, average=average,
            fallback=fallback, maximize=maximize, decoupled_weight_decay=decoupled_weight_decay, nonfinite=nonfinite,
        )  # fmt: skip
