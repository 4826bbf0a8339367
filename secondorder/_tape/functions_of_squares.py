"""Monotone functions of sums of squares, as squares: sum_i c_i g(S_i) = sum_k rho_k^2 + constant, with S = b + J r^2.

J is linear and b constant. With the quotient D(T) = (g(b + T) - g(b)) / T at T = J r^2 it is rho = r sqrt(J^T (c D)), since
sum_k r_k^2 (J^T (c D))_k = sum_i c_i D_i T_i. rho is smooth where r is, also where r is zero.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from secondorder._tape.nodes import Reach, kind
from secondorder._tape.square_roots import first_order, ratio
from secondorder._tape.squares import Term, arriving, exponent, root


class Function(NamedTuple):
    """A function g of one number, at a node of the graph."""

    argument: Callable[[], Tensor]  # S, from what the node has saved
    quotient: Callable[[Tensor, Tensor], Tensor]  # (g(b + T) - g(b)) / T of T and b
    least: Callable[[Tensor], Tensor]  # g(b)
    outside: Callable[[Tensor], Tensor]  # whether it is not smooth, or not known, at b or b + T


class OfSquares(NamedTuple):
    """A node that is a function of a sum of squares."""

    node: Node
    function: Function
    argument: GradientEdge  # where S stands
    squares: list[Term]  # r of these
    constant: bool  # whether S may have a part that the squares do not show


def function_of(node: Node) -> Function | None:
    """Returns the function that a node is; None: it is none of those known."""
    saved: Any = node
    name = kind(node)
    if name in ("LogBackward", "Log1PBackward"):
        shift = float(name == "Log1PBackward")
        return Function(
            lambda: saved._saved_self,
            lambda t, b: _log(t / (b + shift)) / (b + shift),
            lambda b: (b + shift).log(),
            lambda s: s + shift <= 0,
        )
    if name in ("SqrtBackward", "RsqrtBackward", "ReciprocalBackward"):
        p = {"SqrtBackward": 0.5, "RsqrtBackward": -0.5}.get(name, -1.0)
        return _power(p, lambda: saved._saved_result ** (1 / p))
    if (p := exponent(node)) not in (0, 1):
        return _power(p, lambda: saved._saved_self)
    if name == "ExpBackward":
        return Function(
            lambda: saved._saved_result.log(),
            lambda t, b: b.exp() * _exp(t),
            torch.exp,
            lambda s: torch.zeros_like(s, dtype=torch.bool),
        )
    return None


def _power(p: float, argument: Callable[[], Tensor]) -> Function:
    """Returns the power p; of a sum of squares without a constant one that has a derivative by r at r = 0, as |r|^1.5."""

    def quotient(t: Tensor, b: Tensor) -> Tensor:
        base, above = b.where(b > 0, 1), t > torch.finfo(t.dtype).tiny ** 0.5
        log = _log(t / base)
        alone = t.where(above & (b == 0), 1) ** (p - 1) * above
        return torch.where(b > 0, p * base ** (p - 1) * log * _exp(p * log * (t / base)), alone)

    return Function(argument, quotient, lambda b: b**p, lambda s: s < 0 if p > 0.5 else s <= 0)


def of_norm(node: Node, reach: Reach) -> OfSquares | None:
    """Returns a power of absolute values or norms as one of their squares; None: it is not of these, or not smooth."""
    p = exponent(node)
    if p <= 1:
        return None
    term = root(node, reach)
    base: Tensor = node._saved_self  # type: ignore[attr-defined]
    if term.residual.grad_fn == base.grad_fn:
        return None
    return OfSquares(node, _power(p / 2, base.square), GradientEdge(node, 0), [term], False)


def expanded(found: OfSquares, c: Tensor) -> tuple[list[Term], bool] | None:
    """Returns sum_i c_i g(S_i) as squares whose coefficients are 1, and whether there is a constant beside them.

    None: the function is not smooth there, or rounding hides b.

    Args:
        found: the function.
        c: the coefficients, of the shape of S.
    """
    squares = [term.residual.square() for term in found.squares]
    u = torch.zeros_like(c, requires_grad=True)
    adjoint = arriving(found.argument, found.squares, u)

    def summed(values: list[Tensor]) -> Tensor:
        pairs = [(w, v.to(w.dtype)) for w, v in zip(adjoint, values, strict=True)]
        return torch.autograd.grad([w for w, _ in pairs], u, [v for _, v in pairs], retain_graph=True, create_graph=True)[0]

    t = summed(squares)
    function = found.function
    with torch.no_grad():
        if found.constant:
            b = _constant(found, t.detach())
        else:
            b = summed([torch.full_like(r, term.constant) for r, term in zip(squares, found.squares, strict=True)]).detach()
        if b is None or bool((function.outside(b) | function.outside(b + t)).any()):
            return None
        # Where a constant of b is taken off again, as that of log(1 + r ** 2), its rounding is left.
        beside = found.constant or any(t.constant for t in found.squares) or bool((function.least(b) * c).any())
    weights = arriving(found.argument, found.squares, c * first_order(lambda t: function.quotient(t, b), t))
    terms = []
    for term, w in zip(found.squares, weights, strict=True):
        tiny = torch.finfo(w.dtype).tiny
        # A negative coefficient is left as it is: the optimizer's own check refuses it.
        sign = torch.where(w.detach() < 0, -1.0, 1.0).to(w.dtype)
        rho = term.residual * (w * sign).clamp(min=tiny).sqrt()
        terms.append(Term(found.node, rho, weight=sign, whole=True))
    return terms, beside


def _constant(found: OfSquares, t: Tensor) -> Tensor | None:
    """Returns b = S - T, where it is known to so many digits that its rounding does not change g(b + T) - g(b).

    One b that fits all elements is taken from where T is the smallest, and has the most digits then.
    """
    s = found.function.argument().detach()
    eps = torch.finfo(s.dtype).eps
    b, rounding = s - t, 8 * eps * (s.abs() + t.abs())
    best = rounding.argmin()
    one, error = b.flatten()[best], rounding.flatten()[best]
    if bool(((b - one).abs() <= rounding + error).all()):
        b, rounding = one.expand_as(b), error.expand_as(b)
    if bool(found.function.outside(b).any()):
        return None
    change, other = (found.function.quotient(t, each) * t for each in (b, b + rounding))
    bound = (1e-9 if eps == torch.finfo(torch.float64).eps else 1e-4) * change.abs().max()
    return None if bool((change - other).abs().max() > bound) else b


def _log(u: Tensor) -> Tensor:
    """Returns log(1 + u) / u."""
    return ratio(torch.log1p, u, [(-1) ** k / (k + 1) for k in range(7)])


def _exp(v: Tensor) -> Tensor:
    """Returns (exp(v) - 1) / v."""
    return ratio(torch.expm1, v, [1 / math.factorial(k + 1) for k in range(7)])
