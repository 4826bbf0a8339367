"""The uses of parameters in an autograd graph: where they act row by row, and where otherwise.

Derivatives that `torch.autograd.grad(..., create_graph=True)` has recorded use a weight again and again; the walk finds each use.
"""

from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.graph import Node

from secondorder._tape.nodes import LEAF, kind
from secondorder._tape.row_uses import HANDLERS, Use
from secondorder._tape.signatures import saved_places, zero_patterns


class Uses(NamedTuple):
    """How a graph uses the parameters."""

    uses: list[Use]
    others: dict[int, str]  # parameters that also enter in an unknown way, and the names of the nodes by which they do
    signature: tuple[Any, ...]  # equal for graphs of one structure, with the same indices
    by_value: bool  # whether some node sends rows by an index that is not known, so that graphs of equal signatures may differ


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
        name = kind(node)
        if name == LEAF:
            position = index.get(id(node.variable))  # type: ignore[attr-defined]
            if position is not None:
                others.setdefault(position, user)
                signature.append(position)
            continue
        if node in seen:
            continue
        seen.add(node)
        signature.append(name)
        handled: set[int] = set()
        if name in HANDLERS:
            for position, use in HANDLERS[name](node, index):
                handled.add(position)
                uses.append(use)
                signature.append((position, use.parameter))
        else:
            places, unknown = saved_places(node, name)
            signature += places
            by_value |= unknown
        if not handled:
            signature += zero_patterns(node, name)
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
