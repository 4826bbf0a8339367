"""KFRA: recursive Gauss-Newton blocks, Kronecker-factored inverses and adapted dampings (Botev et al., 2017)."""

from collections.abc import Callable

from torch import Tensor, nn

from secondorder.curvature import Curvature
from secondorder.damping import Adaptation
from secondorder.optim.layerwise import LayerwiseOptimizer


class KFRA(LayerwiseOptimizer):
    """The directions of Eq. 36 with the curvature of Eq. 26, and Appendix B's step size, dampings and parameter averages.

        P = -(H + sqrt(k)/pi I)^{-1} (B + eta W) (E[h h^T] + pi sqrt(k) I)^{-1},   k = gamma + eta,   delta = c P   (Eq. 40).

    `step` checks every delta and takes it back where the loss does not fall.

    Args:
        model: see `LayerwiseOptimizer`.
        criterion: see there; convex in the network's output for this curvature.
        lr: None for the step size of Eq. 40; a number fixes it, with the damping `alpha` of the groups.
        curvature: see there.
        solver: see there.
        tau: the start of the full Gauss-Newton matrix' damping, relative to the first loss, > 0; Levenberg-Marquardt adapts it
            every 5 steps.
        gamma: the start of the blocks' damping, likewise; chosen greedily every 20 steps.
        weight_decay: eta, >= 0.
        factor_decay: of the factors' averages, in [0, 1); the paper's two variants are 0 and 0.9.
        curvature_samples: see there.
        inverse_every: see there.
        max_factor_elements: see there.
        subsample: see there; the paper's 1 is the whole batch.
        average: see there.
        fallback: see there.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[..., Tensor],
        lr: float | None = None,
        *,
        curvature: str | Curvature = "gauss-newton",
        solver: str = "kfi",
        tau: float = 0.01,
        gamma: float = 0.01,
        weight_decay: float = 1e-5,
        factor_decay: float = 0.9,
        curvature_samples: int | None = None,
        inverse_every: int = 1,
        max_factor_elements: int = 2**24,
        subsample: float = 1.0,
        average: bool = True,
        fallback: str = "sgd",
    ):
        super().__init__(
            model, criterion, lr, curvature=curvature, solver=solver, alpha=0.01, max_cg=50, eps_cg=1e-4, momentum=0.0,
            weight_decay=weight_decay, factor_decay=factor_decay, curvature_every=1, curvature_samples=curvature_samples,
            inverse_every=inverse_every, max_factor_elements=max_factor_elements,
            adaptation=Adaptation(tau=tau, gamma=gamma), subsample=subsample, average=average, fallback=fallback,
        )  # fmt: skip
