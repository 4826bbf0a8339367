"""Rows of a Jacobian from the factors of matrix products."""

from collections.abc import Sequence

import torch
from torch import Tensor


def jacobian_rows_(
    out: Tensor,
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    rows: Sequence[Tensor],
    start: Sequence[int],
    offset: Sequence[int],
) -> None:
    """Writes outer products into a Jacobian, row by row.

    Row start + j gets, from column `offset` on, the flattened sum over t of the outer products L[rows[j, t]] R[rows[j, t]]^T.
    Consecutive pieces with the same start and offset are added up.
    """
    before = None
    for x, y, index, row, column in zip(left, right, rows, start, offset, strict=True):
        y = x.new_ones(len(x), 1) if y.dim() == 1 else y
        index = torch.arange(len(x), device=x.device).unsqueeze(1) if index.dim() == 1 else index
        x, y = (torch.cat([t, t.new_zeros(1, t.shape[1])])[index] for t in (x, y))
        block = torch.einsum("mta,mtb->mab", x, y).flatten(1)
        target = out[row : row + len(block), column : column + block.shape[1]]
        target.copy_(target + block if (row, column) == before else block)
        before = row, column
