"""The papers' criteria, and what makes a plain function a criterion."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class BoundedClassificationLoss(nn.Module):
    """The non-convex criterion of Chen et al., Eq. 14: 1 / (1 + exp(delta (p_y - epsilon))), p = softmax(output).

    It lies between 0 and 1 per instance, so a wrong label costs at most 1: robust where cross-entropy is not.

    Args:
        delta: how steep it is; the paper's 5.
        epsilon: the probability at which it is 1/2; the paper's 0.2.
        reduction: "mean" or "sum" over the instances.
    """

    def __init__(self, delta: float = 5.0, epsilon: float = 0.2, reduction: str = "mean"):
        super().__init__()
        self.delta, self.epsilon, self.reduction = delta, epsilon, _checked_reduction(reduction)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """The scalar loss.

        Args:
            output: logits [m, K].
            target: class indices [m], or probabilities [m, K]: y^T p then stands for p_y.
        """
        p = output.softmax(-1)
        picked = (p * target).sum(-1) if target.is_floating_point() else p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        losses = torch.sigmoid(-self.delta * (picked - self.epsilon))
        return losses.mean() if self.reduction == "mean" else losses.sum()


class TukeyBiweightLoss(nn.Module):
    """Tukey's biweight: c^2/6 (1 - (1 - (r/c)^2)^3) for a residual |r| <= c, else c^2/6. Beyond c an outlier has no pull at all.

    Args:
        c: where it becomes flat, in units of the target; 4.685 where residuals of good data have scale 1.
        reduction: "mean" or "sum" over all elements, as in nn.MSELoss.
    """

    def __init__(self, c: float = 4.685, reduction: str = "mean"):
        super().__init__()
        if not c > 0:
            raise ValueError(f"TukeyBiweightLoss: expected c > 0, got {c}")
        self.c, self.reduction = c, _checked_reduction(reduction)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """The scalar loss.

        Args:
            output: of any shape.
            target: of the same shape.

        Raises:
            ValueError: the shapes differ.
        """
        if output.shape != target.shape:
            raise ValueError(
                f"TukeyBiweightLoss: expected a target of the output's shape {tuple(output.shape)}, got {tuple(target.shape)}"
            )
        inside = (1 - ((output - target) / self.c) ** 2).clamp(min=0)
        losses = self.c**2 / 6 * (1 - inside**3)
        return losses.mean() if self.reduction == "mean" else losses.sum()


class FunctionCriterion(nn.Module):
    """Makes a plain function (output, target, ...) -> loss a module, so that its calls can be seen.

    Args:
        function: called with the module's arguments; returns the scalar loss.
    """

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Calls the function."""
        return self.function(*args, **kwargs)

    def extra_repr(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", repr(self.function))


def _checked_reduction(reduction: str) -> str:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"expected reduction 'mean' or 'sum', got {reduction!r}")
    return reduction
