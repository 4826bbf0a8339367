"""Rows of a Jacobian from the factors of matrix products, `jacobian_rows_`, against plain PyTorch."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench.timing import interleaved, report
from secondorder import ops


class Pieces(NamedTuple):
    """The arguments of `jacobian_rows_`."""

    out: Tensor
    left: list[Tensor]
    right: list[Tensor]
    rows: list[Tensor]
    start: list[int]
    offset: list[int]


def net_pieces(m: int, width: int, uses: int, dtype: torch.dtype) -> Pieces:
    """A net of two inputs and three hidden layers, every parameter of which is used so often for each of m residuals.

    Every other use is of a product with twice as many rows, of which the residuals have some.
    """
    torch.manual_seed(0)
    absent = torch.empty(0, dtype=torch.int64)
    left, right, rows, offset, column = list[Tensor](), list[Tensor](), list[Tensor](), list[int](), 0
    layers = [(width, 2), (width, width), (width, width), (1, width)]
    for a, b in [shape for n_out, n_in in layers for shape in ((n_out, n_in), (n_out, 0))]:  # a weight, a bias
        for use in range(uses):
            product = m if use % 2 else 2 * m
            left.append(torch.randn(product, a, dtype=dtype))
            right.append(torch.randn((product, b) if b else 0, dtype=dtype))
            rows.append(absent if use % 2 else torch.randperm(product)[:m].unsqueeze(1))
            offset.append(column)
        column += a * max(b, 1)
    return Pieces(torch.zeros(m, column, dtype=dtype), left, right, rows, [0] * len(left), offset)


def by_products(p: Pieces) -> None:
    """Plain PyTorch: rows gathered and joined, one batched product for each parameter, added to zeros."""
    p.out.zero_()

    def joined(tensors: list[Tensor], tables: list[Tensor]) -> Tensor:
        return torch.cat([t[r] if r.dim() == 2 else t.unsqueeze(1) for t, r in zip(tensors, tables, strict=True)], 1)

    for column in dict.fromkeys(p.offset):
        first = p.offset.index(column)
        block = slice(first, first + p.offset.count(column))
        x = joined(p.left[block], p.rows[block])
        vector = p.right[first].dim() == 1
        rows = x.sum(1) if vector else torch.bmm(x.mT, joined(p.right[block], p.rows[block])).flatten(1)
        p.out[:, column : column + rows.shape[1]] += rows


def main() -> None:
    rows = {}
    for m, width, uses in [(m, width, uses) for m in (300, 1000) for width in (32, 48) for uses in (6, 20)]:
        for dtype in (torch.float32, torch.float64):
            pieces = net_pieces(m, width, uses, dtype)
            functions = {"plain": partial(by_products, pieces), "fused": partial(ops.jacobian_rows_, *pieces)}
            measured = interleaved(functions, "plain", 9)
            rows[f"m = {m}, width {width}, {uses} uses, {str(dtype).removeprefix('torch.')}"] = {
                "plain ms": measured["plain"]["ms"], "fused ms": measured["fused"]["ms"], "ratio": measured["fused"]["ratio"],
            }  # fmt: skip
    report(
        "jacobian",
        f"Rows of a Jacobian, 2-width-width-width-1, {torch.get_num_threads()} threads",
        rows,
        "Uses: of every parameter. Plain: rows gathered, batched products, added to zeros. Ratio: fused to plain PyTorch, median "
        "over rounds.",
    )


if __name__ == "__main__":
    main()
