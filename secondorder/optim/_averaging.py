"""Averages of the parameters over the steps (Botev et al., Eq. 44, 45)."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from secondorder._tensors import compute_dtype


def update_averages(parameters: Iterable[Tensor], state: Mapping[Tensor, dict[str, Any]], steps: int) -> None:
    """Sets average <- beta_t average + (1 - beta_t) theta_t,   beta_t = min(0.95, 1 - 1/t), after step t.

    Before a step has covered a layer, which is what `steps` counts, the averages are the parameters themselves.
    """
    beta = min(0.95, 1 - 1 / max(steps, 1))
    for p in parameters:
        own = p.detach().to(compute_dtype(p.dtype), copy=True)
        state[p]["average"] = state[p]["average"].lerp_(own, 1 - beta) if "average" in state[p] else own


@contextmanager
def swapped_with_averages(parameters: Iterable[Tensor], state: Mapping[Tensor, dict[str, Any]]) -> Iterator[None]:
    """Gives every parameter that has an average that average, within it."""
    averaged = [p for p in parameters if "average" in state.get(p, {})]
    own = [p.detach().clone() for p in averaged]
    try:
        with torch.no_grad():
            for p in averaged:
                p.copy_(state[p]["average"])
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(averaged, own, strict=True):
                p.copy_(value)
