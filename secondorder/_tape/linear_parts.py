"""Convex functions beside a term that is linear in what they are functions of, as squares: softplus(z) - t z, exp(z) - t z.

So a logistic loss and a Poisson likelihood are written out, and log(cosh(d)) without overflow: d + softplus(-2 d) - log(2).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from secondorder._tape.nodes import Reach, kind
from secondorder._tape.parameter_operands import edge_shape
from secondorder._tape.square_roots import bernoulli_root, first_order, poisson_root
from secondorder._tape.squares import Term, below, gradients_past
from secondorder._tensors import irregular


def _softplus(node: Any) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor], float]:
    beta = float(node._saved_beta)
    return node._saved_self, lambda z, t: bernoulli_root(beta * z, t) / beta**0.5, 1.0


# Of a node z, the root of the function less t z, and the largest t.
_FUNCTIONS: dict[str, Callable[[Any], tuple[Tensor, Callable[[Tensor, Tensor], Tensor], float]]] = {
    "SoftplusBackward": _softplus,
    "ExpBackward": lambda node: (
        node._saved_result.clamp(min=torch.finfo(node._saved_result.dtype).tiny).log(),
        poisson_root,
        float("inf"),
    ),
}


def with_linear_parts(
    loss: Tensor, squares: list[Term], nodes: list[Node], linear: list[Node], reach: Reach
) -> tuple[list[Term], set[Node]]:
    """Returns the terms, where functions have taken up what is linear in their own argument, and the nodes of what is taken up.

    Args:
        loss: a scalar with its graph.
        squares: its terms.
        nodes: all nodes that the terms and functions of squares are at.
        linear: nodes of which it is a linear function otherwise than through these.
        reach: tells which nodes depend on the parameters.
    """
    taken, terms = set[Node](), list[Term]()
    for term in squares:
        if kind(term.node) in _FUNCTIONS:
            argument = term.node.next_functions[0]
            ((node, output), *others) = below(argument, reach)
            fits = not others and output == 0 and edge_shape((node, 0)).numel() == term.residual.numel()
            if fits and node in linear and node not in taken:
                slopes = dict(zip([*nodes, *linear], gradients_past(loss, [*nodes, *linear]), strict=True))
                root = _root(term, GradientEdge(node, 0), slopes[term.node].detach(), slopes[node].detach())
                if root is not None:
                    taken.add(node)
                    term = term._replace(residual=root)
        terms.append(term)
    return terms, taken


def _root(term: Term, inner: GradientEdge, c: Tensor, slope: Tensor) -> Tensor | None:
    """Returns the root of a function with its linear part; None: t is not where that has a least value.

    Args:
        term: the function.
        inner: where x stands, of which its argument is a multiple and a constant more, z = a x + b.
        c: the coefficients of the function.
        slope: those of x.
    """
    z, root, largest = _FUNCTIONS[kind(term.node)](term.node)
    v = irregular(c)
    argument: Any = term.node.next_functions[0]
    a, av = (
        torch.autograd.grad(GradientEdge(*argument), inner, each, retain_graph=True)[0].reshape(c.shape)
        for each in (torch.ones_like(c), v)
    )
    if bool(((av - a * v).abs() > 32 * torch.finfo(v.dtype).eps * a.abs() * v.abs()).any()):
        return None
    scale = c * a
    t = -slope.reshape(c.shape) / scale.where(scale != 0, 1)
    rounding = 8 * torch.finfo(t.dtype).eps
    if bool(((t < -rounding) | (t > largest + rounding) | ((scale == 0) & (t != 0))).any()):
        return None
    return first_order(lambda z: root(z, t.clamp(0, largest)), z)
