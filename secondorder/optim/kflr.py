"""KFLR: KFRA with the exact expected Gauss-Newton blocks (Botev et al., 2017)."""

from collections.abc import Callable

from torch import Tensor, nn

from secondorder.curvature import Curvature
from secondorder.optim.kfra import KFRA
from secondorder.solvers import Solver


class KFLR(KFRA):
    """Trains a model by exact expected Gauss-Newton blocks and Kronecker-factored inverses; finds its step size and dampings.

    For each layer z = W h + b with gradients B and g of the loss, the direction P (Eq. 36) and the step delta (Eq. 40) are

        P = -(H + sqrt(k)/pi I)^{-1} (B + eta W) (E[h h^T] + pi sqrt(k) I)^{-1},   k = gamma + eta,   delta = lr c P,

    where pi^2 = (tr E[h h^T] / n_in) / (tr H / n_out). H [n_out, n_out] = E[J^T H_out J], with J the Jacobian of the network's
    output with respect to z and H_out the criterion's Hessian (Eq. 23 to 25); it takes K backward passes through the net for K
    outputs. Biases have a system of their own, (H + k I) d = -(g + eta b). c minimises the quadratic model of the loss with the
    full Gauss-Newton matrix, damped by tau + eta. `step` takes delta back if the loss does not fall.

    Args:
        model: any module; its nn.Linear layers are covered.
        criterion: a module, or a function (output, target) -> scalar loss. The loop must compute its loss by it, and call a
            function as `optimizer.criterion`. It must be convex in the network's output for every instance.
        lr: multiplies the step that the quadratic model gives; in [0, 2). Schedulers change it as they change any learning rate.
        curvature: "pch-abs", "pch-clip", "pch-clip-all", "gauss-newton", "kflr", "fisher-mc", "fisher-empirical", "fisher-exact",
            or a `secondorder.curvature.Curvature`.
        solver: "kfi", "kfi-rank-one", "ea-cg", "ea-cg-truncated", "kron-cg", "exact", "ea-isotropic", "auto", or a
            `secondorder.solvers.Solver`.
        tau: the start of the damping of the full Gauss-Newton matrix, relative to the first loss, > 0. A Levenberg-Marquardt rule
            adapts it every 5 steps.
        gamma: the start of the damping of the blocks, relative to the first loss, > 0. Every 20 steps it becomes the best of
            three values under the quadratic model.
        weight_decay: eta of the direction and of the quadratic model, >= 0.
        factor_decay: decay of the factors' exponential averages, in [0, 1); the paper's two variants are 0 and 0.9.
        curvature_samples: at most so many instances of each forward pass are used for E[h h^T] and for the curvature, except the
            criterion's Hessian, which uses all; >= 1. None: all are used.
        inverse_every: the inverses are renewed at the first inverse_every steps, and then at every inverse_every-th; >= 1.
        max_factor_elements: limit on n_in^2 of a layer, >= 0. Above it "kfi" uses "kfi-rank-one", and "auto" uses "ea-isotropic".
        max_factor_dim: limit on n_out of a layer, >= 1, since H has n_out^2 numbers; None: no limit. The fallback updates wider
            layers, and a warning names them once. A layer whose output they take gets its empirical Fisher block.
        subsample: the fraction of the batch that the quadratic model is evaluated on, in (0, 1]. It is at least 100 instances,
            and enough of them for 500 outputs. It is the whole batch where the loss is no mean or sum over the batch's rows.
        average: whether to keep averages of the parameters, for `averaged_parameters`.
        fallback: what happens to parameters that no curvature covers. "sgd": they move along their gradients, as a part of the
            quadratic model, and a warning names them once. "error": `step` raises an error.
        maximize: whether to maximise the loss: the whole step, with its curvature, is then that of the negative loss.
        nonfinite: what a step does when it meets NaN or inf: "error" raises `secondorder.NonFiniteError`; "skip" changes nothing
            and counts the step in `skipped_steps`.

    Every step reads lr, weight_decay, factor_decay and maximize from `param_groups`. The solver uses the weight_decay of the
    first group, and a layer the factor_decay of its weight's group. lr and maximize must be the same in all groups.

    Raises:
        TypeError, ValueError: an argument is not as described.
        RuntimeError: `step` finds no gradients, no recorded call of the criterion, or numbers that are not finite. It has then
            changed nothing.

    Source: Botev, Ritter & Barber, "Practical Gauss-Newton Optimisation for Deep Learning" (ICML 2017), whose equations the
    numbers from 23 on are.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[..., Tensor] | None = None,
        lr: float = 1.0,
        *,
        curvature: str | Curvature = "kflr",
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
        super().__init__(
            model, criterion, lr, curvature=curvature, solver=solver, tau=tau, gamma=gamma, weight_decay=weight_decay,
            factor_decay=factor_decay, curvature_samples=curvature_samples, inverse_every=inverse_every,
            max_factor_dim=max_factor_dim, max_factor_elements=max_factor_elements, subsample=subsample, average=average,
            fallback=fallback, maximize=maximize, nonfinite=nonfinite,
        )  # fmt: skip
