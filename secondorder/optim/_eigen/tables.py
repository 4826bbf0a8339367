"""Parameters that are no maps: tables, of which a step meets some rows, and numbers that each stand for themselves."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from secondorder._tensors import device_for, local_rows, real_view
from secondorder.optim._eigen.matrices import Matrix
from secondorder.optim._eigen.state import FIRST_STEPS

# So many times as far as a weight moves a row that every step meets: its elements act alone, a weight's with all of its row.
OF_WHOLE_TABLE = 2.0
LEAST_ROW_SHARE = 0.2  # of a table's rows: fewer that a step meets move by no more

AllReduce = Callable[[Tensor], None]  # sums a tensor over all processes that have inputs, in place


class Lookups:
    """How many rows of each table forward passes have looked up since the last step."""

    def __init__(self) -> None:
        self._counts: dict[Matrix, int] = {}

    def clear(self) -> None:
        """Forgets all lookups."""
        self._counts.clear()

    def add(self, matrix: Matrix, indices: Tensor) -> None:
        """Counts a lookup's rows."""
        self._counts[matrix] = self._counts.get(matrix, 0) + indices.numel()

    def row_shares(
        self, matrices: list[Matrix], states: list[dict[str, Any]], all_reduce_: AllReduce | None
    ) -> dict[Matrix, float]:
        """Returns the share of its rows that a step meets, at most, of every table in its first steps.

        Args:
            matrices: the matrices with a gradient.
            states: their states.
            all_reduce_: sums a tensor over all processes, in place; None: this one is alone.
        """
        pairs = zip(matrices, states, strict=True)
        tables = [matrix for matrix, state in pairs if matrix.lookups and state["step"] < FIRST_STEPS]
        counts = [float(self._counts.get(matrix, 0)) for matrix in tables]
        if tables and all_reduce_ is not None:  # all ranks must take the same step
            total = torch.tensor(counts, device=tables[0].weight.device)
            all_reduce_(total)
            counts = total.tolist()
        return {m: _bounded(count / m.shape[0]) for m, count in zip(tables, counts, strict=True) if count}


def row_share_if_no_map(matrix: Matrix, most: float, all_reduce_: AllReduce | None) -> float | None:
    """Returns the share of its rows that a step meets, of a matrix whose first gradient is no map's; None if it may be one's.

    A table is met where a batch indexes it: its other rows' gradients are zero. Numbers that stand for themselves, as deviations,
    gates or pixels, have much the same gradient: half of its mean square is that of its mean. In a basis this would be one
    coordinate, and so a short step; the gradients of maps are hardly ever so. Their share is 1.

    Args:
        matrix: one that no layer is known to multiply with, [n, ...].
        most: a matrix of which more than this share of the rows is met is no table.
        all_reduce_: sums a tensor over all processes that have rows, in place; None: this one has them all.
    """
    p = matrix.weight
    if p.grad is None:
        return None
    g = real_view(local_rows(p.grad))
    g = g.to(device_for(torch.float64, g), torch.float64).flatten(1)
    sums = torch.stack([(g != 0).any(1).sum().to(g.dtype), g.sum(), g.square().sum()])
    if all_reduce_ is not None:
        all_reduce_(sums)
    met, total, squares = sums.tolist()
    if p.dim() == 2 and 0 < met <= most * len(p):
        return _bounded(met / len(p))
    return 1.0 if total**2 > 0.5 * math.prod(matrix.shape) * squares else None


def times_as_far(row_share: float) -> float:
    """Returns how many times as far as other weights a table moves, of which a step meets this share of the rows."""
    return OF_WHOLE_TABLE / _bounded(row_share)


def _bounded(row_share: float) -> float:
    return min(max(row_share, LEAST_ROW_SHARE), 1.0)
