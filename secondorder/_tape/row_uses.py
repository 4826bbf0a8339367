"""Nodes that act on a parameter row by row: matrix products, sums and scalings.

For a product Z = A W^T the gradient of a residual r_k is the sum over its rows i of outer(G_i, A_i), where G is the gradient that
arrives at Z. So all rows of a Jacobian come from one backward pass.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional as F

from secondorder._tape.nodes import kind, signed_dim
from secondorder._tape.parameter_operands import Back, composed, edge_shape, made_of, reshaped
from secondorder._tensors import plain

_ELEMENTWISE = {"NegBackward", "MulBackward", "DivBackward", "CloneBackward", "AliasBackward", "ToCopyBackward"}
BLOCKS = 2**22  # numbers in the rows of a batch of matrices of which each has its own block of columns, at most


class Use(NamedTuple):
    """A node that acts on a parameter row by row; row i's gradient is outer(G_i, A_i), outer(A_i, G_i) or G_i."""

    node: Node  # the node at which the gradient arrives
    parameter: int  # the parameter's position
    rows: Callable[[Tensor], Tensor]  # takes the gradient that arrives to G [rows, a]
    operand: Tensor | None  # A [rows, b]; None: the parameter is a vector, and its gradient is G_i
    swapped: bool  # whether the gradient is outer(A_i, G_i)
    back: Back | None  # takes these gradients to those of the parameter; None: the two differ in shape at most
    blocks: int = 1  # a row of the operand fills one of so many blocks of columns beside zeros


# Each handler yields the positions of a node's inputs that are parameters, with their uses.
Found = Iterator[tuple[int, Use]]


def _flat(gradient: Tensor) -> Tensor:
    """Returns the rows [rows, n] of a tensor [..., n]."""
    return gradient.reshape(-1, gradient.shape[-1])


def _columns(t: Tensor) -> Tensor:
    """Returns the columns of matrices [..., n, columns] as rows [rows, n]."""
    return _flat(t.transpose(-1, -2))


def _product(node: Any, index: dict[int, int], left: int, operands: tuple[str, str], scale: float = 1.0) -> Found:
    """Handles A B for matrices or batches of them; `left`: the position of A; `operands`: the names of the saved A and B."""
    for position, other, rows in ((left + 1, operands[0], _flat), (left, operands[1], _columns)):
        for made in made_of(node.next_functions[position][0], index):
            operand = getattr(node, other)
            if operand is None or operand.layout != torch.strided:
                continue
            # dB = A^T G, one outer(A_i, G_i) a row of A; dA = G B^T, one outer(G_i, B_i) a column of B.
            swapped = (position == left + 1) != made.flipped
            scaled = rows if scale == 1 else (lambda g, rows=rows: scale * rows(g))
            yield position, Use(node, index[id(made.parameter)], scaled, rows(plain(operand).detach()), swapped, made.back)


def _mm(node: Any, index: dict[int, int]) -> Found:
    return _product(node, index, 0, ("_saved_self", "_saved_mat2"))


def _bmm(
    node: Any,
    index: dict[int, int],
    left: int = 0,
    operands: tuple[str, str] = ("_saved_self", "_saved_mat2"),
    scale: float = 1.0,
) -> Found:
    """Handles batches of one, an operand that the whole batch shares, and matrices of which each member of the batch has its own.

    Member j of the latter is block j of a matrix whose blocks stand below each other, and its operand fills block j of a row.
    """
    for position, use in _product(node, index, left, operands, scale):
        shape = edge_shape(node.next_functions[position])
        back = [] if use.back is None else [use.back]
        if shape[0] == 1 or _repeats(node.next_functions[position][0]):
            yield position, use._replace(back=composed([lambda g: g.unsqueeze(1), *back]) if back else None)
            continue
        members, operand, rows, blocks = shape[0], use.operand, use.rows, 1
        if operand is None or members * max(operand.numel(), edge_shape((node, 0)).numel()) > BLOCKS:
            continue
        if use.swapped:
            operand, blocks = _in_blocks(operand, members), members
        else:
            rows = composed([use.rows, functools.partial(_in_blocks, members=members)])
        if back:
            back = [reshaped(shape), *back]
        yield position, use._replace(operand=operand, rows=rows, back=composed(back) if back else None, blocks=blocks)


def _in_blocks(rows: Tensor, members: int) -> Tensor:
    """Returns rows [members n, a] as [members n, members a], those of member j in columns j a to (j + 1) a, beside zeros."""
    of_members = rows.reshape(members, -1, 1, rows.shape[1])
    unit = torch.eye(members, dtype=rows.dtype, device=rows.device).view(members, 1, members, 1)
    return (unit * of_members).reshape(len(rows), -1)


def _repeats(node: Any) -> bool:
    """Returns whether a batch of matrices repeats one matrix, which is expanded and at most transposed and scaled after that."""
    while (name := kind(node)) != "ExpandBackward":
        inputs = [f for f, _ in node.next_functions if f is not None]
        if name == "TransposeBackward":
            keeps = {signed_dim(node._saved_dim0) % 3, signed_dim(node._saved_dim1) % 3} == {1, 2}
        elif name == "PermuteBackward":
            keeps = signed_dim(node._saved_dims[0]) % 3 == 0
        else:
            keeps = name in _ELEMENTWISE
        if not keeps or len(inputs) != 1:
            return False
        node = inputs[0]
    sizes = node._saved_self_sym_sizes
    return math.prod(sizes[:-2]) == 1 and tuple(sizes[-2:]) == edge_shape((node, 0))[-2:]


def _addmm(node: Any, index: dict[int, int]) -> Found:
    yield from _product(node, index, 1, ("_saved_mat1", "_saved_mat2"), float(node._saved_alpha))
    yield from _vector(node, index, 0, float(node._saved_beta), None)


def _baddbmm(node: Any, index: dict[int, int]) -> Found:
    yield from _bmm(node, index, 1, ("_saved_batch1", "_saved_batch2"), float(node._saved_alpha))
    yield from _vector(node, index, 0, float(node._saved_beta), None)


def _vector(node: Any, index: dict[int, int], position: int, scale: float, other: Tensor | None) -> Found:
    """Handles a number, a vector or a tensor that is repeated for every row of the result, times `scale` and the tensor `other`.

    If it is repeated between its dimensions, as a bias [members, 1, n] is, row i of member j gives e_j x G_ji.
    """
    edge = node.next_functions[position]
    for made in made_of(edge[0], index):
        shape, whole = edge_shape(edge), edge_shape((node, 0))
        aligned = (1,) * (len(whole) - len(shape)) + tuple(shape)
        last = next(i for i in range(len(whole) + 1) if aligned[i:] == whole[i:])
        before = [i for i in range(last) if aligned[i] > 1]
        members = math.prod(whole[i] for i in before)
        alone = last == 0 and math.prod(aligned[:-1]) > 1  # it is not repeated
        if made.flipped or alone or (before and members * whole.numel() > BLOCKS):
            continue

        def rows(
            gradient: Tensor, width: int = whole[last:].numel(), before: list[int] = before, members: int = members
        ) -> Tensor:
            scaled = gradient if other is None else gradient * other
            if not before:
                return scale * scaled.reshape(-1, width)
            return _in_blocks(scale * scaled.movedim(before, list(range(len(before)))).reshape(-1, width), members)

        back = None if made.back is None else composed([reshaped(shape), made.back])
        yield position, Use(node, index[id(made.parameter)], rows, None, False, back)


def _mv(node: Any, index: dict[int, int]) -> Found:
    """Handles a matrix times a vector that is a parameter, as coefficients of basis functions are; a row gives one number."""
    for made in made_of(node.next_functions[1][0], index):
        if made.back is None and made.parameter.ndim == 1 and node._saved_self is not None:
            rows: Callable[[Tensor], Tensor] = lambda g: g.reshape(-1, 1)  # noqa: E731
            yield 1, Use(node, index[id(made.parameter)], rows, plain(node._saved_self).detach(), False, None)


def _add(node: Any, index: dict[int, int]) -> Found:
    yield from _vector(node, index, 0, 1.0, None)
    if len(node.next_functions) > 1:
        yield from _vector(node, index, 1, float(node._saved_alpha), None)


def _sub(node: Any, index: dict[int, int]) -> Found:
    yield from _vector(node, index, 0, 1.0, None)
    if len(node.next_functions) > 1:
        yield from _vector(node, index, 1, -float(node._saved_alpha), None)


def _mul(node: Any, index: dict[int, int]) -> Found:
    if len(node.next_functions) < 2:
        return
    for position, other in ((0, "_saved_other"), (1, "_saved_self")):
        value = getattr(node, other)
        if isinstance(value, Tensor):
            yield from _vector(node, index, position, 1.0, plain(value).detach())


def _convolution(node: Any, index: dict[int, int]) -> Found:
    """Handles convolutions, whose rows are the positions of the output: a gradient, and the patch that the kernel sees."""
    weight = made_of(node.next_functions[1][0], index)
    bias = made_of(node.next_functions[2][0], index) if len(node.next_functions) > 2 else []
    x = plain(node._saved_input).detach()
    if node._saved_transposed or node._saved_groups != 1 or x.ndim not in (3, 4):
        return

    def rows(gradient: Tensor) -> Tensor:
        return _columns(gradient.flatten(2))

    for made in weight:
        if made.back is None and not made.flipped:
            kernel = made.parameter.shape[2:]
            lead = (1,) * (2 - len(kernel))
            stride, padding, dilation = ((*one, *(int(v) for v in values)) for one, values in (
                (lead, node._saved_stride), ((0,) * len(lead), node._saved_padding), (lead, node._saved_dilation)))  # fmt: skip
            image = x if x.ndim == 4 else x.unsqueeze(2)
            patches = F.unfold(image, (*lead, *kernel), dilation, padding, stride)
            yield 1, Use(node, index[id(made.parameter)], rows, _columns(patches), False, None)
    for made in bias:
        if made.back is None and not made.flipped:
            yield 2, Use(node, index[id(made.parameter)], rows, None, False, None)


def _trilinear(node: Any, index: dict[int, int]) -> Found:
    """Handles `nn.Bilinear`: the product of three tensors, each given dimensions to match, summed over some of them."""
    expansions = [tuple(getattr(node, f"_saved_expand{i}")) for i in (1, 2, 3)]
    summed = tuple(node._saved_sumdim)
    for position in range(3):
        for made in made_of(node.next_functions[position][0], index):
            if expansions[position] != (0,) or made.back is not None or made.flipped:  # a weight for every row
                continue
            first, second = (
                _expanded(plain(getattr(node, f"_saved_i{i + 1}")).detach(), expansions[i]) for i in range(3) if i != position
            )

            def rows(gradient: Tensor, other: Tensor = first * second) -> Tensor:
                return (_expanded(gradient, summed) * other).flatten(1)

            yield position, Use(node, index[id(made.parameter)], rows, None, False, None)


def _expanded(t: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Returns a tensor with dimensions of size 1 at these places."""
    for dim in sorted(dims):
        t = t.unsqueeze(dim)
    return t


HANDLERS: dict[str, Callable[[Any, dict[int, int]], Found]] = {
    "MmBackward": _mm,
    "BmmBackward": _bmm,
    "BaddbmmBackward": _baddbmm,
    "MvBackward": _mv,
    "AddmmBackward": _addmm,
    "AddBackward": _add,
    "SubBackward": _sub,
    "MulBackward": _mul,
    "ConvolutionBackward": _convolution,
    "TrilinearBackward": _trilinear,
}
