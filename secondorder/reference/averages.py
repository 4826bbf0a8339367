"""Means of the inputs, and exponential averages."""

from collections.abc import Sequence

from torch import Tensor


def mean_inputs(input: Sequence[Tensor]) -> list[Tensor]:
    """Every layer's E[h]."""
    return [h.mean(0) for h in input]


def average_(new: Sequence[Tensor], old: Sequence[Tensor], share: float) -> None:
    """x <- (1 - share) x + share y for every pair of tensors."""
    for x, y in zip(new, old, strict=True):
        x.lerp_(y, share)
