"""Tables: parameters of which a step meets some rows, each by itself, and how much farther these move."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from secondorder._tensors import here
from secondorder.optim._eigen_state import FIRST_STEPS
from secondorder.optim._matrices import Matrix

LEAST_SHARE = 0.1  # of a table's rows: fewer that a step meets move by no more

Sum = Callable[[Tensor], None]  # of a tensor over all processes that have inputs, in place


class Lookups:
    """How many rows of each table forward passes have looked up since the last step."""

    def __init__(self) -> None:
        self._counts: dict[Matrix, int] = {}

    def clear(self) -> None:
        self._counts.clear()

    def add(self, matrix: Matrix, indices: Tensor) -> None:
        """Counts a lookup's rows."""
        self._counts[matrix] = self._counts.get(matrix, 0) + indices.numel()

    def shares(self, present: list[Matrix], states: list[dict[str, Any]], sum_: Sum | None) -> dict[Matrix, float]:
        """The share of its rows that a step meets, at most, of every table in its first steps.

        Args:
            present: the matrices with a gradient.
            states: theirs.
            sum_: over all processes; None: this one is alone.
        """
        pairs = zip(present, states, strict=True)
        tables = [matrix for matrix, state in pairs if matrix.lookups and state["step"] < FIRST_STEPS]
        counts = [float(self._counts.get(matrix, 0)) for matrix in tables]
        if tables and sum_ is not None:  # all ranks must take the same step
            total = torch.tensor(counts, device=tables[0].weight.device)
            sum_(total)
            counts = total.tolist()
        return {m: _bounded(count / m.shape[0]) for m, count in zip(tables, counts, strict=True) if count}


def share_of_a_table(matrix: Matrix, most: float, sum_: Sum | None) -> float | None:
    """The share of its rows that a gradient meets, of a matrix whose gradient is that of a table; None where it is not.

    A batch that indexes a parameter leaves its other rows' gradients zero.

    Args:
        matrix: one that no layer is known to multiply with, [n, p].
        most: of its rows with a gradient, by which it is a table.
        sum_: over all processes that have rows; None: this one has them all.
    """
    p = matrix.weight
    if not matrix.eigen or matrix.modules or p.dim() != 2 or p.grad is None:
        return None
    met = (here(p.grad) != 0).any(-1).sum(dtype=torch.float32)
    if sum_ is not None:
        sum_(met)
    share = float(met) / len(p)
    return _bounded(share) if 0 < share <= most else None


def _bounded(share: float) -> float:
    return min(max(share, LEAST_SHARE), 1.0)
