"""KFAC: the Fisher matrix by sampled labels and Kronecker-factored inverses (Martens & Grosse, 2015)."""

from collections.abc import Callable

from torch import Tensor, nn

from secondorder.curvature import Curvature
from secondorder.damping import Adaptation
from secondorder.optim.layerwise import LayerwiseOptimizer


class KFAC(LayerwiseOptimizer):
    """The directions of Eq. 12 of Chen et al. with the sampled Fisher matrix; step size and momentum from the quadratic model.

    Levenberg-Marquardt brings the damping down as in the paper; gamma is adapted every 20 steps, and the
    inverses are renewed every 20. Biases have a system of their own, (H + k I) d = -g, rather than an input of ones.

    Args:
        model: see `LayerwiseOptimizer`.
        criterion: see there; a likelihood for this curvature.
        lr: None for the quadratic model's step; a number fixes it, with the damping `alpha` of the groups.
        curvature: see there.
        solver: see there.
        tau: the start of both dampings, relative to the first loss, > 0.
        weight_decay: eta, >= 0.
        factor_decay: of the factors' averages, in [0, 1).
        curvature_samples: see there.
        inverse_every: see there; the paper's 20.
        max_factor_elements: see there.
        subsample: see there; the paper's products are on a fraction of the batch, too.
        average: see there.
        fallback: see there.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[..., Tensor],
        lr: float | None = None,
        *,
        curvature: str | Curvature = "fisher-mc",
        solver: str = "kfi",
        tau: float = 0.001,
        weight_decay: float = 1e-5,
        factor_decay: float = 0.95,
        curvature_samples: int | None = None,
        inverse_every: int = 20,
        max_factor_elements: int = 2**24,
        subsample: float = 0.25,
        average: bool = True,
        fallback: str = "sgd",
    ):
        super().__init__(
            model, criterion, lr, curvature=curvature, solver=solver, alpha=0.01, max_cg=50, eps_cg=1e-4, momentum=0.0,
            weight_decay=weight_decay, factor_decay=factor_decay, curvature_every=1, curvature_samples=curvature_samples,
            inverse_every=inverse_every, max_factor_elements=max_factor_elements,
            adaptation=Adaptation(tau=tau, gamma=tau, momentum=True), subsample=subsample, average=average, fallback=fallback,
        )  # fmt: skip
