"""Tensors that are made of parameters alone: by views, constant factors and `weight_norm`, and how gradients go back to these."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from secondorder._tape.nodes import LEAF, is_leaf, kind, signed_dim
from secondorder._tensors import plain

Back = Callable[[Tensor], Tensor]  # takes m gradients of one tensor to those of another, [m, ...] to [m, ...]


class MadeOf(NamedTuple):
    """How the operand of a matrix product is made of a parameter."""

    parameter: Tensor
    flipped: bool  # whether the operand is the parameter's transpose
    back: Back | None  # takes gradients of the operand to those of the parameter; None: it was reshaped or transposed at most


def made_of(node: Node | None, index: dict[int, int]) -> list[MadeOf]:
    """Returns the parameters that a tensor is made of by views, constant factors and `weight_norm`; none if by anything else."""
    flips, steps = 0, list[Back]()  # transposes that come first, and what takes gradients back from there on
    while node is not None:
        name, saved = kind(node), node
        if name == LEAF:
            parameter: Tensor = node.variable  # type: ignore[attr-defined]
            if id(parameter) not in index or (flips and not steps and parameter.ndim != 2):
                return []
            return [MadeOf(parameter, flips % 2 == 1, None) if not steps else MadeOf(parameter, False, composed(steps))]
        if not steps and _transposes(saved, name):
            flips += 1
        else:
            steps = steps or [_flip] * (flips % 2)
            if name == "WeightNormInterfaceBackward":
                return _made_by_weight_norm(saved, index, steps)
            if name == "MulBackward" and len(node.next_functions) == 2 and all(f is not None for f, _ in node.next_functions):
                return _made_of_product(saved, index, steps)
            step = _step_back(saved, name)
            if step is None:
                return []
            steps.append(step)
        node = node.next_functions[0 if node.next_functions[0][0] is not None else -1][0]
    return []


def _made_by_weight_norm(node: Any, index: dict[int, int], steps: list[Back]) -> list[MadeOf]:
    """Returns v and g if a tensor is g v / |v| of these two parameters; none if they are no leaves."""
    leaves = [f for f, _ in node.next_functions]
    if not all(f is not None and is_leaf(f) and id(f.variable) in index for f in leaves):
        return []
    pairs = zip(leaves, _weight_norm(node), strict=True)
    return [MadeOf(f.variable, False, composed([*steps, back])) for f, back in pairs]


def _made_of_product(node: Any, index: dict[int, int], steps: list[Back]) -> list[MadeOf]:
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
        shape, factors = edge_shape(edge), made_of(edge[0], index)
        if not factors:
            return []
        aligned = (1,) * (len(edge_shape((node, 0))) - len(shape)) + tuple(shape)

        def back(gradient: Tensor, other: Tensor = other, aligned: tuple[int, ...] = aligned) -> Tensor:
            return (gradient * other).sum_to_size(len(gradient), *aligned)

        for made in factors:
            last = [_flip] if made.flipped else [] if made.back is None else [made.back]
            found.append(MadeOf(made.parameter, False, composed([*steps, back, reshaped(shape), *last])))
    return found


def _flip(gradient: Tensor) -> Tensor:
    """Transposes matrices."""
    return gradient.transpose(-1, -2)


def reshaped(shape: torch.Size) -> Back:
    """Returns what gives gradients this shape."""
    return lambda gradient: gradient.reshape(len(gradient), *shape)


def composed(steps: list[Back]) -> Back:
    """Returns what makes these steps one after another."""

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
        ones = (1,) * (len(edge_shape((node, 0))) - len(sizes))
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
        sizes, dim, step = tuple(node._saved_self_sym_sizes), signed_dim(node._saved_dim), node._saved_step
        # Functions of torch's own, such as trapezoid, leave out a start or an end.
        start, end = (v if v is None else signed_dim(v) for v in (node._saved_start, node._saved_end))
        whole = slice(start, end, step).indices(sizes[dim])
        return lambda g: torch.ops.aten.slice_backward(g, [len(g), *sizes], dim % len(sizes) + 1, *whole)
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


def edge_shape(edge: tuple[Any, int]) -> torch.Size:
    """Returns the shape of the tensor that an edge of the graph stands for."""
    node, number = edge
    return torch.Size(node._input_metadata[number].shape)
