"""KFLR: KFRA with the exact expected Gauss-Newton blocks (Botev et al., 2017)."""

from collections.abc import Callable

from torch import Tensor, nn

from secondorder.curvature import Curvature
from secondorder.optim._docstrings import complete_docstring
from secondorder.optim.kfra import KFRA
from secondorder.solvers import Solver


@complete_docstring
class KFLR(KFRA):
    """Trains a model by exact expected Gauss-Newton blocks and Kronecker-factored inverses; finds its step size and dampings.

    For each layer z = W h + b with gradients B and g of the loss, the direction P (Eq. 36) and the step delta (Eq. 40) are

        P = -(H + sqrt(k)/pi I)^{-1} (B + eta W) (E[h h^T] + pi sqrt(k) I)^{-1},   k = gamma + eta,   delta = lr c P,

    where pi^2 = (tr E[h h^T] / n_in) / (tr H / n_out). H [n_out, n_out] = E[J^T H_out J], with J the Jacobian of the network's
    output with respect to z and H_out the criterion's Hessian (Eq. 23 to 25); it takes K backward passes through the net for K
    outputs. Biases have a system of their own, (H + k I) d = -(g + eta b). c minimises the quadratic model of the loss with the
    full Gauss-Newton matrix, damped by tau + eta. `step` takes delta back if the loss does not fall.

    Args:
        criterion: a module, or a function (output, target) -> scalar loss. The loop must compute its loss by it, and call a
            function as `optimizer.criterion`. It must be convex in the network's output for every instance.
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
