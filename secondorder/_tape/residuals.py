"""The residuals of a least-squares loss, found in its autograd graph: loss = sum_k c_k r_k^2 + constant."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from secondorder._tape.functions_of_squares import OfSquares, expanded, function_of, of_norm
from secondorder._tape.linear_parts import with_linear_parts
from secondorder._tape.nodes import LEAF, WRITE, Reach, adds_constant, is_leaf, kind, linear_inputs, linear_node
from secondorder._tape.squares import NEITHER, PRODUCT, Term, arriving, gradients_past, obstacle, positive, square
from secondorder._tensors import host_numbers, plain

# Of a write, which hides by what operation: one that is linear keeps the loss the sum of the squares above.
_WRITTEN = "a write to a part of a tensor, and something beside it adds a constant or may do so, so that it may not be linear"

Refuse = Callable[[Node, str], None]  # raises unless a node does not count, given what it is


class UnknownHere(RuntimeError):
    """A function of squares is outside of its domain, or its constant is not known at these parameters; it may be at others."""


class Terms(NamedTuple):
    """The squares that a loss is a combination of."""

    squares: list[Term]
    penalties: list[Term]  # the squares of parameters themselves
    constant: bool  # whether the loss may have a part that depends on no parameter


class _ObstacleError(Exception):
    """A tensor is no sum of squares."""


def find_terms(loss: Tensor, reach: Reach, owner: str) -> Terms:
    """Finds the squares that a loss is a combination of, in the order of a walk from the loss.

    Args:
        loss: a scalar with its graph.
        reach: tells which nodes depend on the parameters.
        owner: who asks, for the error.

    Raises:
        RuntimeError: the graph has a node between the loss and a parameter that is neither linear nor a square, nor one of the
            functions of squares that are known.
    """
    obstacles = dict[Node, str]()
    (squares, penalties, constant), functions = _walk(loss.grad_fn, reach, obstacles.__setitem__)
    constant |= any(term.constant for term in squares)
    nodes = list(dict.fromkeys([*(term.node for term in (*squares, *penalties)), *(f.node for f in functions)]))
    if obstacles:
        squares, taken = with_linear_parts(loss, squares, nodes, list(obstacles), reach)
        constant |= bool(taken)
        obstacles = {node: what for node, what in obstacles.items() if node not in taken}
    for node, what in obstacles.items():
        _refuse(owner, loss, node, what)
    if functions:
        gradients = dict(zip(nodes, gradients_past(loss, nodes), strict=True))
        for f in functions:
            c = gradients[f.node].detach()
            if not bool(c.any()):
                continue
            if (found := expanded(f, c)) is None:
                _refuse(owner, loss, f.node, NEITHER, UnknownHere)
                continue
            squares += found[0]
            constant |= found[1]
    if not squares:  # a loss of squares of parameters alone: they are its residuals
        squares, penalties = [term._replace(residual=term.residual.clone()) for term in penalties], []
    if not squares:
        raise RuntimeError(
            f"{owner}.step(): expected the closure to return a loss that depends on a trained parameter, got one that does not; "
            "return the scalar loss itself, neither detached nor a number, and give torch.utils.checkpoint use_reentrant=False, "
            "without which it hides parameters"
        )
    return Terms(squares, penalties, constant)


def _walk(start: Node | None, reach: Reach, refuse: Refuse, functions: bool = True) -> tuple[Terms, list[OfSquares]]:
    """Returns the squares that a tensor is a combination of, and the functions of squares.

    Args:
        start: the tensor's node.
        reach: tells which nodes depend on the parameters.
        refuse: called with what is none of these.
        functions: whether functions of squares are looked for.
    """
    squares, penalties, constant, written = list[Term](), list[Term](), False, None
    found, seen = list[OfSquares](), set[Node]()
    stack: list[Node] = [start] if start is not None else []
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if not reach(node):
            constant = True
        elif (term := square(node, reach)) is not None:
            constant |= kind(node) == "BinaryCrossEntropyWithLogitsBackward"  # the entropy of its targets
            if term.residual.is_leaf:  # a parameter, or a copy of one by hooks on saved tensors
                leaf: Any = get_gradient_edge(term.residual).node
                penalties.append(term._replace(residual=leaf.variable))
            elif term.residual.numel():
                squares.append(term._replace(residual=plain(term.residual)))
        elif (what := obstacle(node, reach)) is None:
            constant |= adds_constant(node)
            written = node if kind(node) == WRITE else written
            stack += linear_inputs(node, reach)
        elif functions and (of_squares := _of_squares(node, reach)) is not None:
            found.append(of_squares)
        elif (term := positive(node)) is not None:
            squares.append(term._replace(residual=plain(term.residual)))
        else:
            refuse(node, what)
    if written is not None and constant:
        refuse(written, _WRITTEN)
    return Terms(squares[::-1], penalties[::-1], constant), found[::-1]


def _of_squares(node: Node, reach: Reach) -> OfSquares | None:
    """Returns a node as a function of sums of squares; None: it is no such function, or one of a single sum of many squares.

    The latter has the minimum of its squares, as the root of a mean square: take these.
    """
    if (norm := of_norm(node, reach)) is not None:
        return norm
    function = function_of(node)
    if function is None:
        return None

    def refuse(_: Node, __: str) -> None:
        raise _ObstacleError

    edge = GradientEdge(*node.next_functions[0])  # type: ignore[arg-type]
    try:
        (squares, penalties, constant), _ = _walk(edge.node, reach, refuse, False)
    except _ObstacleError:
        return None
    terms = [*squares, *penalties]
    single = not node._input_metadata[0].shape and sum(term.residual.numel() for term in terms) > 1
    return None if single or not terms else OfSquares(node, function, edge, terms, constant)


# Hints what to write in place of nodes that losses often have, by the beginnings of their names.
_INSTEAD = {
    ("Abs", "L1Loss"): "In place of absolute values take nn.HuberLoss with a small delta, or (r ** 2 + eps).sqrt()",
    ("LogSoftmax",): "Cross-entropy is of class indices, without label smoothing; for soft labels take EigenAdam",
    ("Sqrt", "Log", "LinalgVectorNorm", "Norm", "Dist", "Pow"): (
        "Leave out the root, norm or logarithm around a sum of squares: the squares, as norm(u - y) ** 2, have the same minimum; "
        "where it is one of each residual, as (r ** 2 + eps).sqrt(), let eps be no less than the rounding of r ** 2"
    ),
    ("Addmm", "Mm", "Bmm"): (
        "A term is linear in u. In an energy take the equation's residual, or L-BFGS; beside a multiplier m complete the square, "
        "(r + m / 2) ** 2 in place of r ** 2 + m * r"
    ),
    (WRITE,): "Stack, join or mask the terms in place of writing them: torch.stack, torch.cat, torch.where",
    (LEAF,): "Give trained weights of the terms to another optimizer",
    ("CompiledFunction",): "Compile the net, and leave the loss out of torch.compile",
}
_FORM = "For a quadratic form, r @ A @ r, write ((r @ L) ** 2).sum() with A = L @ L.T, as torch.linalg.cholesky(A) gives it"


def _refuse(owner: str, loss: Tensor, node: Node, what: str, error: type[RuntimeError] = RuntimeError) -> None:
    """Raises an error, unless the loss has the coefficient zero there, as that of 0 * penalty; all nodes above are linear."""
    if len(node._input_metadata) == 1:
        (coefficient,) = torch.autograd.grad(loss, [GradientEdge(node, 0)], retain_graph=True)
        if not bool(coefficient.any()):
            return
    trained = [f for f, _ in node.next_functions if f is not None and is_leaf(f)]  # factors that are parameters
    names = [node.name()] if what in (NEITHER, _WRITTEN) else [f.name() for f in trained]
    hints = [text for starts, text in _INSTEAD.items() for name in names if name.startswith(starts)]
    if what == PRODUCT and _is_form(node):
        hints = [_FORM]
    hint = hints[0] + ". " if hints else ""
    raise error(
        f"{owner}.step(): expected the loss to be a sum of means or sums of squares, each times a constant, but {node.name()} "
        f"is {what}. {hint}Take squares of residuals (r ** 2, nn.functional.mse_loss), Huber's loss, smooth L1, the soft margin, "
        "binary cross-entropy with logits or cross-entropy; detach weights that are computed from residuals; or return "
        "[(residual, weight), ...] from the closure. EigenAdam takes any loss."
    )


def _is_form(product: Node) -> bool:
    """Returns whether one of two factors is a linear function of the other one, as far as the graph shows."""
    factors = [f for f, _ in product.next_functions if f is not None]
    for factor, other in zip(factors, factors[::-1], strict=True):
        stack, seen = [factor], set[Node]()
        while stack:
            node = stack.pop()
            if node is other:
                return True
            if node not in seen and linear_node(node):
                stack += [f for f, _ in node.next_functions if f is not None]
            seen.add(node)
    return False


def coefficients(loss: Tensor, terms: list[Term], owner: str) -> list[Tensor]:
    """Returns c of each term, of the residual's shape, once it is known that none is negative.

    Raises:
        RuntimeError: a coefficient is negative.
    """
    found = arriving(loss, terms)
    check_signs(host_numbers(negative(found)), owner)
    return found


def negative(found: list[Tensor]) -> list[Tensor]:
    """Returns of each term whether any c is negative."""
    return [(c < 0).any() for c in found]


def check_signs(negative: list[float], owner: str) -> None:
    """Raises RuntimeError if an entry of what `negative` returns is true."""
    if any(negative):
        raise RuntimeError(
            f"{owner}.step(): expected a sum of squares, got a negative coefficient: some square is subtracted. Take the squares "
            "of what is to vanish, as (U - V).abs() ** 2 in place of 1 - overlap.abs() ** 2; what is unbounded below has no "
            "Gauss-Newton step"
        )
