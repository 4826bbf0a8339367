"""Rows of a Jacobian from the factors of matrix products."""

from collections.abc import Sequence

from torch import Tensor

from secondorder.ops._library import library, operator, without_tangents


@without_tangents
def jacobian_rows_(
    out: Tensor,
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    rows: Sequence[Tensor],
    start: Sequence[int],
    offset: Sequence[int],
) -> None:
    """Writes blocks of rows of a Jacobian, each a sum of outer products over its pieces and over t.

    out[start + j, offset + alpha b + beta] <- sum left[rows[j, t], alpha] right[rows[j, t], beta]

    A piece is one use of a parameter in a matrix product: the gradients that arrive there and the other operand, row by row.
    Consecutive pieces with equal `start` and `offset` are a block; they have the same m, a and b. Blocks are written one after
    another; everything else of `out` stays.

    Args:
        out: J [M, P], written in place; its rows are contiguous and do not overlap, and it shares no memory with the others.
        left: [R, a] of every piece.
        right: [R, b] of every piece; [0] where the parameter is a vector: then b = 1 and all are ones.
        rows: int64 [m, T] of every piece, the rows of the product that are of each residual, in [0, R], where R stands for
            none; [0] where row j is of residual j: then m = R and T = 1.
        start: the first row in `out` of every piece.
        offset: the first column in `out` of every piece.

    On a GPU the entries of `rows` are not checked here, since that would wait for it.
    """
    library.jacobian_rows_(out, list(left), list(right), list(rows), list(start), list(offset))


@operator("jacobian_rows_(Tensor(a!) out, Tensor[] left, Tensor[] right, Tensor[] rows, int[] start, int[] offset) -> ()")
def _(*args: object) -> None:
    return None
