"""What backward() was called on, seen from within its run of the engine, and whether the recorded losses are all of it."""

import sys
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils._pytree import tree_leaves

from secondorder._tape.nodes import Reach

_ENGINE = torch.autograd.graph._engine_run_backward.__code__


def backward_roots(loss: Node) -> list[Node] | None:
    """Returns the nodes that the run of the engine which has reached `loss` began with; None: they are not to be found.

    The engine tells nobody, but the call that has started it is still under way: in this thread or, where nodes run on a GPU, in
    another one.
    """
    own = _started(sys._getframe())
    if own is not None:
        return own
    here = threading.get_ident()
    for thread, frame in sys._current_frames().items():
        roots = None if thread == here else _started(frame)
        if roots is not None and _above(roots, lambda node: node is loss):
            return roots
    return None


def term_outside(roots: list[Node], recorded: Callable[[Node], bool], parameters: Iterable[Tensor]) -> str | None:
    """Returns the name of a node that depends on a parameter by another way than through a recorded loss; None: there is none.

    Args:
        roots: what backward() was called on.
        recorded: whether a node made a recorded loss.
        parameters: those that are trained.
    """
    above = _above(roots, recorded)
    reach = Reach(parameters)
    for node in above:
        if recorded(node):
            continue
        for following, _ in node.next_functions:
            if following is not None and following not in above and reach(following):
                return following.name()
    return next((root.name() for root in roots if root not in above and reach(root)), None)


def term_of_its_own(loss: Tensor, arguments: Any, parameters: Iterable[Tensor]) -> str | None:
    """Returns the name of a node by which a criterion's loss depends on a parameter past its arguments; None: there is none.

    A parameter among the arguments is one, too: it is no function of parameters that could be evaluated at others.
    """
    assert loss.grad_fn is not None
    made = {leaf.grad_fn for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.grad_fn is not None}
    return term_outside([loss.grad_fn], lambda node: node in made, parameters)


def upstream(start: Node) -> set[Node]:
    """Returns `start` and all nodes that it depends on."""
    found, stack = {start}, [start]
    while stack:
        new = {node for node, _ in stack.pop().next_functions if node is not None} - found
        found |= new
        stack += new
    return found


def _started(frame: FrameType | None) -> list[Node] | None:
    """Returns what the innermost run that a thread has started begins with."""
    while frame is not None:
        if frame.f_code is _ENGINE:
            outputs = frame.f_locals["t_outputs"]
            nodes = [output.node if isinstance(output, GradientEdge) else output.grad_fn for output in outputs]
            return [node for node in nodes if node is not None]
        frame = frame.f_back
    return None


def _above(roots: list[Node], sought: Callable[[Node], bool]) -> set[Node]:
    """Returns the nodes sought and those between the roots and them; the walk ends at the first of them on every path."""
    parents: dict[Node, list[Node]] = {root: [] for root in roots}
    stack, found = list(parents), []
    while stack:
        node = stack.pop()
        if sought(node):
            found.append(node)
            continue
        for following, _ in node.next_functions:
            if following is None:
                continue
            if following not in parents:
                parents[following] = []
                stack.append(following)
            parents[following].append(node)
    above: set[Node] = set()
    while found:
        node = found.pop()
        if node not in above:
            above.add(node)
            found += parents[node]
    return above
