"""Uses of parameters in an autograd graph: matrix products, sums and scalings whose gradient is one outer product for each row.

Derivatives that `torch.autograd.grad(..., create_graph=True)` has recorded use a weight again and again; the walk finds each use.
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

from secondorder._tape.residuals import LEAF, kind, signed_dim
from secondorder._tensors import plain

_ELEMENTWISE = {"NegBackward", "MulBackward", "DivBackward", "CloneBackward", "AliasBackward", "ToCopyBackward"}
BLOCKS = 2**22  # numbers in the rows of a batch of matrices of which each has its own block of columns, at most

Back = Callable[[Tensor], Tensor]  # takes m gradients of one tensor to those of another, [m, ...] to [m, ...]


class Use(NamedTuple):
    """A node that acts on a parameter row by row; row i's gradient is outer(G_i, A_i), outer(A_i, G_i) or G_i."""

    node: Node  # the node at which the gradient arrives
    parameter: int  # the parameter's position
    rows: Callable[[Tensor], Tensor]  # takes the gradient that arrives to G [rows, a]
    operand: Tensor | None  # A [rows, b]; None: the parameter is a vector, and its gradient is G_i
    swapped: bool  # whether the gradient is outer(A_i, G_i)
    back: Back | None  # takes these gradients to those of the parameter; None: the two differ in shape at most
    blocks: int = 1  # a row of the operand fills one of so many blocks of columns beside zeros


class Uses(NamedTuple):
    """How a graph uses the parameters."""

    uses: list[Use]
    others: dict[int, str]  # parameters that also enter in an unknown way, and the names of the nodes by which they do
    signature: tuple[Any, ...]  # equal for graphs of one structure, with the same indices
    by_value: bool  # whether some node sends rows by an index that is not known, so that graphs of equal signatures may differ


# Nodes that send rows elsewhere, and the saved values that decide where.
_POSITIONS = {
    "SliceBackward": ("_saved_dim", "_saved_start", "_saved_end", "_saved_step"),
    "SelectBackward": ("_saved_dim", "_saved_index"),
    "SplitBackward": ("_saved_dim", "_saved_split_size"),
    "RollBackward": ("_saved_shifts", "_saved_dims"),
    "FlipBackward": ("_saved_dims",),
    "PermuteBackward": ("_saved_dims",),
    "TransposeBackward": ("_saved_dim0", "_saved_dim1"),
    "CatBackward": ("_saved_dim",),
    "ViewBackward": ("_saved_self_sym_sizes",),
    "UnsafeViewBackward": ("_saved_self_sym_sizes",),
    "ReshapeAliasBackward": ("_saved_self_sym_sizes",),
    "SplitWithSizesBackward": ("_saved_dim", "_saved_split_sizes"),
    "UnfoldBackward": ("_saved_dimension", "_saved_size", "_saved_step"),
    "AsStridedBackward": ("_saved_size", "_saved_stride", "_saved_storage_offset"),
    "DiagonalBackward": ("_saved_offset", "_saved_dim1", "_saved_dim2"),
    "SumBackward": ("_saved_dim",),
    "MeanBackward": ("_saved_dim",),
    "CumsumBackward": ("_saved_dim",),
}
# The beginnings of the names of nodes that send rows by an index, and the names under which they may have saved it.
_BY_VALUE = ("Index", "Gather", "Take", "Scatter", "Masked", "Sort", "Topk", "Embedding", "Where")
_INDICES = ("_saved_indices", "_saved_index", "_saved_mask", "_saved_condition")
# Products, which send rows where a constant operand is not zero, and the names under which they have saved their operands.
_OPERANDS = {
    "MmBackward": ("_saved_self", "_saved_mat2"),
    "BmmBackward": ("_saved_self", "_saved_mat2"),
    "MvBackward": ("_saved_self", "_saved_vec"),
    "SparseAddmmBackward": ("", "_saved_mat1", "_saved_mat2"),
}


def find_uses(root: Tensor | Node, index: dict[int, int]) -> Uses:
    """Finds all uses of parameters upstream of a tensor.

    Args:
        root: a tensor with its graph, or the node whose one output the tensor is.
        index: the position of each parameter, by its id.
    """
    uses: list[Use] = []
    others: dict[int, str] = {}
    signature: list[Any] = []
    by_value = False
    seen: set[Node] = set()
    stack: list[tuple[Node, str]] = []
    if not isinstance(root, Tensor):
        stack.append((root, ""))
    else:
        signature.append(tuple(root.shape))
        if root.grad_fn is not None:
            stack.append((root.grad_fn, ""))
        if root.is_leaf and id(root) in index:
            others[index[id(root)]] = "the residual itself"
    while stack:
        node, user = stack.pop()
        if node.name() == LEAF:
            position = index.get(id(node.variable))  # type: ignore[attr-defined]
            if position is not None:
                others.setdefault(position, user)
                signature.append(position)
            continue
        if node in seen:
            continue
        seen.add(node)
        name = kind(node)
        signature.append(name)
        handled: set[int] = set()
        if name in _HANDLERS:
            for position, use in _HANDLERS[name](node, index):
                handled.add(position)
                uses.append(use)
                signature.append((position, use.parameter))
        elif name in _POSITIONS:
            signature.append(tuple(_hashable(getattr(node, a, None)) for a in _POSITIONS[name]))
        elif name.startswith(_BY_VALUE):
            known = _indices(node)
            by_value |= known is None
            signature.append((known, getattr(node, "_saved_dim", None)))
        if name in _OPERANDS and not handled:
            signature.append(_patterns(node, _OPERANDS[name]))
        stack.extend((f, name) for i, (f, _) in enumerate(node.next_functions) if f is not None and i not in handled)
    return Uses(uses, others, tuple(signature), by_value)


def frontier(root: Tensor, uses: Uses) -> list[Node] | None:
    """Returns the uses' nodes that are met first on the ways up from a tensor; None: one of them is upstream of another."""
    nodes = {use.node for use in uses.uses}
    found, seen = dict[Node, None](), set[Node]()
    stack = [] if root.grad_fn is None else [root.grad_fn]
    while stack:
        node = stack.pop()
        if node in nodes:
            found[node] = None
        elif node not in seen:
            seen.add(node)
            stack += [f for f, _ in node.next_functions if f is not None]
    stack, seen = [f for node in found for f, _ in node.next_functions if f is not None], set[Node]()
    while stack:
        node = stack.pop()
        if node in found:
            return None
        if node not in seen:
            seen.add(node)
            stack += [f for f, _ in node.next_functions if f is not None]
    return list(found)


def _indices(node: Node) -> tuple[Any, ...] | None:
    """Returns hashes of the indices by which a node sends rows; None: they are unknown, or known only after a wait."""
    found = [getattr(node, name) for name in _INDICES if hasattr(node, name)]
    tensors = [t for value in found for t in (value if isinstance(value, list | tuple) else [value]) if t is not None]
    if not tensors or not all(isinstance(t, Tensor) and t.is_cpu for t in tensors):
        return None
    return tuple(map(_hashed, tensors))


def _patterns(node: Any, operands: tuple[str, ...]) -> tuple[Any, ...]:
    """Returns hashes of where a product's constant operands are not zero, on the CPU: elsewhere to look would be a wait."""
    constant = [getattr(node, name) for name, (f, _) in zip(operands, node.next_functions, strict=True) if f is None and name]
    return tuple(_hashed(place) for t in constant if isinstance(t, Tensor) and t.is_cpu for place in _places(t))


def _places(t: Tensor) -> list[Tensor]:
    """Returns what tells where a matrix is not zero."""
    if t.layout == torch.sparse_coo:
        return [t._indices()]
    if t.layout == torch.sparse_csr:
        return [t.crow_indices(), t.col_indices()]
    return [t != 0] if t.layout == torch.strided else []


def _hashed(t: Tensor) -> tuple[Any, ...]:
    return tuple(t.shape), hash(t.detach().contiguous().numpy().tobytes())


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


# --- Tensors that are made of parameters alone ---


class _Made(NamedTuple):
    """How the operand of a matrix product is made of a parameter."""

    parameter: Tensor
    flipped: bool  # whether the operand is the parameter's transpose
    back: Back | None  # takes gradients of the operand to those of the parameter; None: it was reshaped or transposed at most


def _made_of(node: Node | None, index: dict[int, int]) -> list[_Made]:
    """Returns the parameters that a tensor is made of by views, constant factors and `weight_norm`; none if by anything else."""
    flips, steps = 0, list[Back]()
    while node is not None:
        name, saved = kind(node), node
        if node.name() == LEAF:
            parameter: Tensor = node.variable  # type: ignore[attr-defined]
            if id(parameter) not in index or (flips and not steps and parameter.ndim != 2):
                return []
            return [_Made(parameter, flips % 2 == 1, None) if not steps else _Made(parameter, False, _composed(steps))]
        if name == "WeightNormInterfaceBackward":
            leaves = [f for f, _ in node.next_functions]
            if not all(f is not None and f.name() == LEAF and id(f.variable) in index for f in leaves):  # type: ignore[attr-defined]
                return []
            steps += [_flip] * (flips % 2) if not steps else []
            both = _weight_norm(saved)
            return [
                _Made(f.variable, False, _composed([*steps, back]))  # type: ignore[union-attr]
                for f, back in zip(leaves, both, strict=True)
            ]
        if name == "MulBackward" and len(node.next_functions) == 2 and all(f is not None for f, _ in node.next_functions):
            return _made_of_both(saved, index, [*steps, *([_flip] * (flips % 2) if not steps else [])])
        if _transposes(saved, name) and not steps:
            flips += 1
        else:
            step = _step_back(saved, name)
            if step is None:
                return []
            if not steps and flips % 2:
                steps.append(_flip)
            steps.append(step)
        node = node.next_functions[0 if node.next_functions[0][0] is not None else -1][0]
    return []


def _made_of_both(node: Any, index: dict[int, int], steps: list[Back]) -> list[_Made]:
    """Returns the parameters that a product of two tensors is made of if both are made of parameters; none otherwise.

    Args:
        node: the product.
        index: the position of each parameter, by its id.
        steps: what takes gradients of the operand to those of the product.
    """
    found = []
    for edge, other in zip(
        node.next_functions, (plain(node._saved_other).detach(), plain(node._saved_self).detach()), strict=True
    ):
        shape, factors = _shape(edge), _made_of(edge[0], index)
        if not factors:
            return []
        aligned = (1,) * (len(_shape((node, 0))) - len(shape)) + tuple(shape)

        def back(gradient: Tensor, other: Tensor = other, aligned: tuple[int, ...] = aligned) -> Tensor:
            return (gradient * other).sum_to_size(len(gradient), *aligned)

        for made in factors:
            last = [_flip] if made.flipped else [] if made.back is None else [made.back]
            found.append(_Made(made.parameter, False, _composed([*steps, back, _reshape(shape), *last])))
    return found


def _flip(gradient: Tensor) -> Tensor:
    return gradient.transpose(-1, -2)


def _reshape(shape: torch.Size) -> Back:
    return lambda gradient: gradient.reshape(len(gradient), *shape)


def _composed(steps: list[Back]) -> Back:
    def back(gradient: Tensor) -> Tensor:
        for step in steps:
            gradient = step(gradient)
        return gradient

    return back


def _transposes(node: Any, name: str) -> bool:
    """Returns whether a node is the transpose of a matrix."""
    if name == "TransposeBackward":
        dims = {signed_dim(node._saved_dim0), signed_dim(node._saved_dim1)}
        return dims in ({0, 1}, {-1, -2}) and len(node._input_metadata[0].shape) == 2
    return name == "TBackward" or (name == "PermuteBackward" and tuple(node._saved_dims) in ((1, 0), (-1, -2)))


def _step_back(node: Any, name: str) -> Back | None:
    """Returns what takes gradients [m, ...] of a node's output to those of its one input; None: the node is not known."""
    if name in ("ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward", "SqueezeBackward"):
        sizes = tuple(node._saved_self_sym_sizes)
        return lambda g: g.reshape(len(g), *sizes)
    if name == "ExpandBackward":
        sizes = tuple(node._saved_self_sym_sizes)
        ones = (1,) * (len(_shape((node, 0))) - len(sizes))
        return lambda g: g.sum_to_size(len(g), *ones, *sizes).reshape(len(g), *sizes)
    if name in ("CloneBackward", "AliasBackward", "ToCopyBackward"):
        return lambda g: g  # the parameter's dtype follows in the end
    if name == "UnsqueezeBackward":
        dim = signed_dim(node._saved_dim)
        return lambda g: g.squeeze(dim + 1 if dim >= 0 else dim)
    if name == "PermuteBackward":
        dims = [signed_dim(d) % len(node._saved_dims) for d in node._saved_dims]
        order = [0] + [1 + dims.index(i) for i in range(len(dims))]
        return lambda g: g.permute(order)
    if name == "TransposeBackward":
        first, second = (signed_dim(d) for d in (node._saved_dim0, node._saved_dim1))
        return lambda g: g.transpose(first + (first >= 0), second + (second >= 0))
    if name == "TBackward":
        return _flip
    if name == "NegBackward":
        return torch.neg
    if name in ("MulBackward", "DivBackward") and (len(node.next_functions) < 2 or node.next_functions[1][0] is None):
        other = node._saved_other
        if isinstance(other, Tensor) and other.numel() > 1:
            return None
        return (lambda g: g * other) if name == "MulBackward" else (lambda g: g / other)
    if name == "SelectBackward":
        sizes, dim, chosen = tuple(node._saved_self_sym_sizes), signed_dim(node._saved_dim), signed_dim(node._saved_index)
        return lambda g: torch.ops.aten.select_backward(g, [len(g), *sizes], dim % len(sizes) + 1, chosen)
    if name == "SliceBackward":
        sizes, saved = tuple(node._saved_self_sym_sizes), (node._saved_dim, node._saved_start, node._saved_end)
        dim, start, end = (signed_dim(v) for v in saved)
        return lambda g: torch.ops.aten.slice_backward(g, [len(g), *sizes], dim % len(sizes) + 1, start, end, node._saved_step)
    return None


def _weight_norm(node: Any) -> tuple[Back, Back]:
    """Returns what takes gradients of g v / |v|, with norms over all dimensions but one, to those of v and to those of g."""
    v, g, dim = node._saved_v.detach(), node._saved_g.detach(), signed_dim(node._saved_dim)
    others = [1 + i for i in range(v.ndim) if i != dim % v.ndim]
    norms = torch.linalg.vector_norm(v, dim=[i - 1 for i in others], keepdim=True)
    unit = v / norms

    def along(gradient: Tensor) -> Tensor:
        return (gradient.view(-1, *v.shape) * unit).sum(others, keepdim=True)

    def of_v(gradient: Tensor) -> Tensor:
        gradient = gradient.reshape(-1, *v.shape)
        return (gradient - unit * along(gradient)) * (g.view_as(norms) / norms)

    return of_v, lambda gradient: along(gradient.reshape(-1, *v.shape))


# --- Nodes that act row by row: each handler yields the positions of a node's inputs that are parameters, with their uses ---

Found = Iterator[tuple[int, Use]]


def _flat(gradient: Tensor) -> Tensor:
    return gradient.reshape(-1, gradient.shape[-1])


def _columns(t: Tensor) -> Tensor:
    """Returns the columns of matrices [..., n, columns] as rows [rows, n]."""
    return _flat(t.transpose(-1, -2))


def _product(node: Any, index: dict[int, int], left: int, operands: tuple[str, str], scale: float = 1.0) -> Found:
    """Handles A B for matrices or batches of them; `left`: the position of A; `operands`: the names of the saved A and B."""
    for position, other, rows in ((left + 1, operands[0], _flat), (left, operands[1], _columns)):
        for made in _made_of(node.next_functions[position][0], index):
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
        shape = _shape(node.next_functions[position])
        back = [] if use.back is None else [use.back]
        if shape[0] == 1 or _repeats(node.next_functions[position][0]):
            yield position, use._replace(back=_composed([lambda g: g.unsqueeze(1), *back]) if back else None)
            continue
        members, operand, rows, blocks = shape[0], use.operand, use.rows, 1
        if operand is None or members * max(operand.numel(), _shape((node, 0)).numel()) > BLOCKS:
            continue
        if use.swapped:
            operand, blocks = _in_blocks(operand, members), members
        else:
            rows = _composed([use.rows, functools.partial(_in_blocks, members=members)])
        if back:
            back = [_reshape(shape), *back]
        yield position, use._replace(operand=operand, rows=rows, back=_composed(back) if back else None, blocks=blocks)


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
    return math.prod(sizes[:-2]) == 1 and tuple(sizes[-2:]) == _shape((node, 0))[-2:]


def _shape(edge: tuple[Any, int]) -> torch.Size:
    """Returns the shape of the tensor that an edge of the graph stands for."""
    node, number = edge
    return torch.Size(node._input_metadata[number].shape)


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
    edge, whole = node.next_functions[position], _shape((node, 0))
    for made in _made_of(edge[0], index):
        shape = _shape(edge)
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

        back = None if made.back is None else _composed([_reshape(shape), made.back])
        yield position, Use(node, index[id(made.parameter)], rows, None, False, back)


def _mv(node: Any, index: dict[int, int]) -> Found:
    """Handles a matrix times a vector that is a parameter, as coefficients of basis functions are; a row gives one number."""
    for made in _made_of(node.next_functions[1][0], index):
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
    weight = _made_of(node.next_functions[1][0], index)
    bias = _made_of(node.next_functions[2][0], index) if len(node.next_functions) > 2 else []
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
        for made in _made_of(node.next_functions[position][0], index):
            if expansions[position] != (0,) or made.back is not None or made.flipped:  # a weight for every row
                continue
            first, second = (
                _expanded(plain(getattr(node, f"_saved_i{i + 1}")).detach(), expansions[i]) for i in range(3) if i != position
            )

            def rows(gradient: Tensor, other: Tensor = first * second) -> Tensor:
                return (_expanded(gradient, summed) * other).flatten(1)

            yield position, Use(node, index[id(made.parameter)], rows, None, False, None)


def _expanded(t: Tensor, dims: tuple[int, ...]) -> Tensor:
    for dim in sorted(dims):
        t = t.unsqueeze(dim)
    return t


_HANDLERS: dict[str, Callable[[Any, dict[int, int]], Found]] = {
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
