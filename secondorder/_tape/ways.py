"""The way of a tensor into the criterion: what the loop does between the model's output and the loss, found in the graph.

`criterion(model(x).squeeze(-1), y)`, `criterion(out["logits"].view(-1, k), y)`, `criterion(q.gather(1, a), y)` and the like
take a few nodes. Each is linear, and then applied by differentiating its backward pass, or one of the functions named here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from secondorder._tape.graph import MATRIX_PRODUCTS, RESHAPING, is_turning
from secondorder._tape.nodes import adds_constant, is_leaf, kind, linear_node, signed_dim

# Node -> the function that it is of its one input.
_FUNCTIONS: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "SigmoidBackward": lambda node: torch.sigmoid,
    "TanhBackward": lambda node: torch.tanh,
    "ReluBackward": lambda node: torch.relu,
    "ExpBackward": lambda node: torch.exp,
    "LogBackward": lambda node: torch.log,
    "LogSigmoidBackward": lambda node: F.logsigmoid,
    "SoftplusBackward": lambda node: lambda t: F.softplus(t, node._saved_beta, node._saved_threshold),
    "SoftmaxBackward": lambda node: lambda t: t.softmax(signed_dim(node._saved_dim)),
    "LogSoftmaxBackward": lambda node: lambda t: t.log_softmax(signed_dim(node._saved_dim)),
}

Start = TypeVar("Start")


@dataclass(frozen=True)
class LinearPiece:
    """A linear function A between two tensors of a graph, or an affine one, at any input: A t + c."""

    transposed: Tensor  # A^T u with its graph, of the input's shape
    u: Tensor
    input: Tensor  # at the time, and what came of it
    output: Tensor

    def __call__(self, t: Tensor) -> Tensor:
        with torch.enable_grad():
            change = t - self.input
            moved = torch.autograd.grad(
                self.transposed, self.u, change, retain_graph=True, create_graph=change.requires_grad, materialize_grads=True
            )
        return self.output + moved[0]


@dataclass(frozen=True)
class Way:
    """How a tensor becomes an argument of the criterion.

    Args:
        shape: of the argument.
        input_shape: of the tensor.
        pieces: applied one after another; none: the tensor itself, at most reshaped.
    """

    shape: torch.Size
    input_shape: torch.Size
    pieces: list[Callable[[Tensor], Tensor]] = field(default_factory=list)

    @property
    def by_rows(self) -> bool:
        """Tells whether it may be applied to some rows alone."""
        return not self.pieces

    @property
    def affine(self) -> bool:
        """Tells whether it is linear but for a constant."""
        return all(isinstance(piece, LinearPiece) for piece in self.pieces)

    def __call__(self, t: Tensor) -> Tensor:
        """Returns the argument, for a tensor of all rows or, where it is `by_rows`, of fewer."""
        for piece in self.pieces:
            t = piece(t)
        return t.reshape(self.shape if self.pieces or not self.shape else (-1, *self.shape[1:]))


def find_way(argument: Tensor, begins: Callable[[Node, int], tuple[Start, Tensor] | None]) -> tuple[Start, Way] | None:
    """Finds where an argument comes from, and how; None: by something else than linear nodes and known functions of one tensor.

    Args:
        argument: with its graph.
        begins: says whether an output of a node is where ways begin, by its name and its values.
    """
    node, number = argument.grad_fn, argument.output_nr
    path: list[tuple[Node, int]] = []
    while node is not None:
        start = begins(node, number)
        if start is not None:
            pieces = _pieces(path, (node, number), start[1].detach(), argument.detach())
            return None if pieces is None else (start[0], Way(argument.shape, start[1].shape, pieces))
        following = [edge for edge in node.next_functions if edge[0] is not None]
        if len(following) != 1 or not (linear_node(node) or kind(node) in _FUNCTIONS or kind(node) in RESHAPING):
            return None
        path.append((node, number))
        node, number = following[0]
    return None


# Nodes that take rows in another order, or may.
_REORDERING = {
    "PermuteBackward", "TransposeBackward", "TBackward", "IndexBackward", "IndexSelectBackward", "GatherBackward", "FlipBackward",
    "RollBackward", "SortBackward", "TakeBackward", "TakeAlongDimBackward", "UnfoldBackward",
}  # fmt: skip


def keeps_rows(argument: Any) -> bool:
    """Tells whether nothing between an argument and the matrix products before it takes rows in another order.

    In an argument of three dimensions or more a transposition puts the classes into dimension 1.
    """
    moves = {"PermuteBackward", "TransposeBackward"} if isinstance(argument, Tensor) and argument.dim() > 2 else set()
    waiting, seen = [argument.grad_fn if isinstance(argument, Tensor) else None], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or kind(node) in MATRIX_PRODUCTS:
            continue
        if kind(node) in _REORDERING - moves:
            return False
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    return True


def preactivation(output: GradientEdge) -> GradientEdge:
    """Finds where the last function with parameters before an output ends: what follows it is of one tensor, linear or known."""
    node, number = output.node, output.output_nr
    while linear_node(node) or kind(node) in _FUNCTIONS or kind(node) in RESHAPING:
        following = [edge for edge in node.next_functions if edge[0] is not None]
        if len(following) != 1 or is_leaf(following[0][0]):  # type: ignore[arg-type]
            break
        node, number = following[0]  # type: ignore[assignment]
    return GradientEdge(node, number)


# Nodes that leave some of the rows out, or repeat them.
_SELECTING = {"IndexBackward", "IndexSelectBackward", "SelectBackward", "SliceBackward", "SplitBackward", "UnbindBackward"}


def is_selecting(node: Node) -> bool:
    """Tells whether a node keeps numbers as they are, some of them, in another shape, order or dtype."""
    return is_turning(node) or kind(node) in _SELECTING


# Of these those that may repeat some.
_REPEATING = {"IndexBackward", "IndexSelectBackward", "ExpandBackward"}


class Origin(NamedTuple):
    """Tells where the tensor stands that numbers are taken from, where a dimension of theirs is in it, and if some may repeat."""

    edge: GradientEdge
    dim: int | None
    repeats: bool


def taken_from(output: GradientEdge, dim: int | None, passes: Callable[[Node], bool]) -> Origin:
    """Walks back from an output over nodes that pass, as long as its dimension `dim`, if given, stays in one place, in order."""
    node, number, repeats = output.node, output.output_nr, False
    while passes(node):
        before, place = node.next_functions[0]
        if before is None or is_leaf(before):
            break
        if dim is not None:
            dim_before = _dim_before(node, number, dim)
            if dim_before is None:
                break
            dim = dim_before
        repeats |= kind(node) in _REPEATING
        node, number = before, place
    return Origin(GradientEdge(node, number), dim, repeats)


def logits_of(log_probabilities: Tensor, classes: int, passes: Callable[[Node], bool]) -> GradientEdge | None:
    """Returns where the logits stand that log_softmax was taken of; None: the tensor comes from it by other nodes, or not at all.

    Args:
        log_probabilities: with their graph.
        classes: the dimension of their classes.
        passes: tells whether a node may stand between log_softmax and them.
    """
    if log_probabilities.grad_fn is None:
        return None
    start = GradientEdge(log_probabilities.grad_fn, log_probabilities.output_nr)
    edge, dim, _ = taken_from(start, classes % log_probabilities.dim(), passes)
    node: Any = edge.node
    if kind(node) != "LogSoftmaxBackward" or signed_dim(node._saved_dim) % len(node._input_metadata[0].shape) != dim:
        return None
    before, number = node.next_functions[0]
    return None if before is None else GradientEdge(before, number)


def _dim_before(node: Any, number: int, dim: int) -> int | None:
    """Returns where a dimension of a node's output stands in its one input; None: not in one place alone, or not in order."""
    before, place = node.next_functions[0]
    made, given = node._input_metadata[number].shape, before._input_metadata[place].shape
    if kind(node) == "TransposeBackward":
        first, second = (signed_dim(saved) % len(given) for saved in (node._saved_dim0, node._saved_dim1))
        return {first: second, second: first}.get(dim, dim)
    if kind(node) == "PermuteBackward":
        return int(signed_dim(node._saved_dims[dim])) % len(given)
    if kind(node) == "TBackward":
        return len(given) - 1 - dim
    if kind(node) in ("SelectBackward", "UnbindBackward"):
        return dim + (signed_dim(node._saved_dim) % len(given) <= dim)
    if kind(node) in ("SliceBackward", "SplitBackward", "ExpandBackward"):  # seen from the last, dimensions stay in their places
        same = dim - len(made) + len(given)
        return same if same >= 0 and given[same] == made[dim] else None
    inner = math.prod(made[dim + 1 :])
    found = [i for i, size in enumerate(given) if size == made[dim] and math.prod(given[i + 1 :]) == inner]
    return found[0] if len(found) == 1 and found[0] not in _indexed(node, len(given)) else None


def _indexed(node: Any, dims: int) -> set[int]:
    """Returns the dimensions of its input that a node takes by an index."""
    if kind(node) == "IndexSelectBackward":
        return {signed_dim(node._saved_dim) % dims}
    found, dim = set(), 0
    for index in node._saved_indices if kind(node) == "IndexBackward" else ():
        width = index.dim() if index is not None and index.dtype in (torch.bool, torch.uint8) else 1
        found |= set(range(dim, dim + width)) if index is not None else set()
        dim += width
    return found


def is_affine(output: GradientEdge, source: Node) -> bool:
    """Tells whether a tensor is linear in that of `source` alone, or so but for a constant."""
    node: Node | None = output.node
    while node is not None and node is not source:
        following = [each for each, _ in node.next_functions if each is not None]
        node = following[0] if len(following) == 1 and linear_node(node) else None
    return node is source


def _pieces(
    path: list[tuple[Node, int]], start: tuple[Node, int], values: Tensor, argument: Tensor
) -> list[Callable[[Tensor], Tensor]] | None:
    """Returns the functions along a path that goes from the argument up to `start`, in the order in which they act."""
    if all(kind(node) in RESHAPING for node, _ in path):
        return []
    # The path's runs of linear nodes, and its functions, from the start on.
    runs: list[list[tuple[Node, int]]] = []
    for edge in reversed(path):
        if kind(edge[0]) in _FUNCTIONS or not runs or kind(runs[-1][0][0]) in _FUNCTIONS:
            runs.append([edge])
        else:
            runs[-1].append(edge)
    pieces: list[Callable[[Tensor], Tensor]] = []
    begin, input = start, values
    for position, run in enumerate(runs):
        end = run[-1]
        if kind(end[0]) in _FUNCTIONS:
            piece: Callable[[Tensor], Tensor] = _FUNCTIONS[kind(end[0])](end[0])
        else:
            last = position + 1 == len(runs)
            output = argument if last else None
            if not last and any(adds_constant(node) for node, _ in run):
                output = getattr(runs[position + 1][0][0], "_saved_self", None)
                if output is None:
                    return None  # the constant is not known, for the graph keeps no tensor of what it makes
            piece = _linear_piece(begin, end, input, output)
        pieces.append(piece)
        input = piece(input)
        begin = end
    return pieces


def _linear_piece(begin: tuple[Node, int], end: tuple[Node, int], input: Tensor, output: Tensor | None) -> LinearPiece:
    """Returns the linear function between two outputs of nodes, or the affine one that takes `input` to `output`, if given."""
    made = end[0]._input_metadata[end[1]]
    with torch.enable_grad():
        u = torch.zeros(made.shape, dtype=made.dtype, device=made.device, requires_grad=True)
        (transposed,) = torch.autograd.grad(GradientEdge(*end), GradientEdge(*begin), u, create_graph=True)
    if output is not None:
        return LinearPiece(transposed, u, input, output.detach())
    zero = torch.zeros_like(input)
    return LinearPiece(transposed, u, zero, zero.new_zeros(()))
