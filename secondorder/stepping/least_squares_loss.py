"""A closure's loss as sum_k c_k r_k^2 + sum_j t_j theta_j^2 + constant, at as many parameters as are asked for."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder._random import RandomState
from secondorder._tape.nodes import Reach, kind
from secondorder._tape.residuals import Terms, UnknownHere, check_signs, coefficients, find_terms, negative
from secondorder._tape.square_roots import POSITIVE
from secondorder._tape.squares import Term, arriving
from secondorder._tensors import host_numbers, plain

Closure = Callable[[], Any]


class Residuals(NamedTuple):
    """A loss at some parameters."""

    loss: Tensor  # what the closure returned, or the sum of what it listed; with its graph
    values: list[Tensor]  # r of each term, with its graph
    weights: list[Tensor]  # c of each term, of r's shape
    penalties: Tensor | None  # t [P]; None: zero
    value: float = math.nan  # of `loss`
    objective: float = math.nan  # of `values` and the parameters: the loss without its constant


class LeastSquaresLoss:
    """The loss of one batch: every call of the closure starts from the same state of the random generators.

    Args:
        owner: who asks, for errors.
        closure: returns a scalar loss, or [(residual, weight), ...], whose loss is sum of mean(weight * residual ** 2).
        parameters: what the loss is a function of.
    """

    def __init__(self, owner: str, closure: Closure, parameters: Sequence[Tensor]):
        self.owner, self.parameters = owner, parameters
        self._closure, self._random = closure, RandomState.now()
        self._after: RandomState | None = None
        self._last: tuple[Tensor, Terms] | None = None  # of the last call
        self.calling = False  # whether the closure is being called, or has failed

    def here(self, called: bool = False) -> Residuals:
        """Returns the loss at the parameters' present values, with coefficients.

        Args:
            called: whether the closure was called last at these values, and is not called again.

        Raises:
            RuntimeError: it is no sum of squares with coefficients >= 0.
        """
        result, terms = self._last if called and self._last is not None else self._called()
        weights = arriving(result, [*terms.squares, *terms.penalties])
        rounding = max(torch.finfo(t.dtype).eps for t in (result, self.parameters[0], *(term.residual for term in terms.squares)))
        values, weights = self._in_own_dtype(terms.squares), [c.to(self.parameters[0].dtype) for c in weights]
        penalties = self._penalties(terms.penalties, weights[len(values) :])
        found = Residuals(result, values, weights[: len(values)], penalties)
        value, objective, *signs = host_numbers([result, self.objective(values, found), *negative(weights)])
        check_signs(signs, self.owner)
        bound = (1e-4 if rounding > torch.finfo(torch.float64).eps else 1e-9) * (abs(value) + objective)
        bound += torch.finfo(self.parameters[0].dtype).tiny ** 0.5  # roots of criteria stay above zero where these are zero
        if abs(value - objective) > bound and not terms.constant:
            raise RuntimeError(
                f"{self.owner}.step(): expected the loss to be the sum of the squares that its graph shows, which is "
                f"{objective:.9g}, got {value:.9g}; return [(residual, weight), ...] instead"
            )
        return found._replace(value=value, objective=objective)

    def there(self, start: Residuals) -> list[Tensor]:
        """Returns the residuals at the parameters' present values, each of the shape that it had at the start.

        Where the loss is no sum of squares there, as a logarithm outside of its domain, they are NaN: no step leads there.
        """
        try:
            values = self._in_own_dtype(self._called()[1].squares)
        except UnknownHere:
            with torch.enable_grad():
                nothing = torch.stack([p.sum() for p in self.parameters]).sum() * math.nan
            return [nothing.expand(v.shape) for v in start.values]
        if [v.shape for v in values] != [v.shape for v in start.values]:
            raise RuntimeError(
                f"{self.owner}.step(): expected the closure to evaluate the same residuals at every call of a step, got shapes "
                f"{[tuple(v.shape) for v in values]} after {[tuple(v.shape) for v in start.values]}; draw the batch outside of it"
            )
        return values

    def check_same(self, here: Residuals, tolerance: float) -> None:
        """Raises RuntimeError if the closure's residuals at the present parameters are no longer these."""
        pairs = zip(here.values, self.there(here), strict=True)
        norms = host_numbers([norm for old, new in pairs for norm in ((old - new).norm(), old.norm())])
        for difference, size in zip(norms[::2], norms[1::2], strict=True):
            if not difference <= tolerance * size:
                raise RuntimeError(
                    f"{self.owner}.step(): expected the closure to evaluate the same residuals at every call of a step, "
                    "but they differ at the same parameters. Draw the batch outside of the closure, or by torch's own "
                    "generators, which start every call of a step alike; update weights of residuals after the step; layers that "
                    "change with every call, as spectral_norm does, belong in eval mode."
                )

    def again(self, start: Residuals) -> Residuals:
        """Returns the loss at the parameters' present values, with the coefficients of the start."""
        values = self.there(start)
        return start._replace(values=values, objective=float(self.objective(values, start)))

    def _in_own_dtype(self, terms: Sequence[Term]) -> list[Tensor]:
        """Residuals in the parameters' dtype: targets in float64 make those of a float32 net float64."""
        self.check_dtypes(term.residual for term in terms)
        with torch.enable_grad():
            return [term.residual.to(self.parameters[0].dtype) for term in terms]

    def check_dtypes(self, computed: Iterable[Tensor]) -> None:
        """Raises RuntimeError where something has fewer digits than the parameters."""
        own = self.parameters[0].dtype
        for t in computed:
            if t.dtype.is_floating_point and torch.finfo(t.dtype).eps > torch.finfo(own).eps:
                raise RuntimeError(
                    f"{self.owner}.step(): expected a loss that is computed in the parameters' dtype, {own}, got {t.dtype} on "
                    "the way: steps are exact. Leave out torch.autocast (mixed_precision, bf16-mixed, bf16=True), .half() and "
                    ".float()"
                )

    def objective(self, values: Sequence[Tensor], start: Residuals) -> Tensor:
        """Returns the loss without its constant, [], with the coefficients of the start."""
        terms = [(c * r.detach().square()).sum(dtype=torch.float64) for c, r in zip(start.weights, values, strict=True)]
        if start.penalties is not None:
            terms.append((start.penalties * self.flat().square()).sum(dtype=torch.float64))
        return functools.reduce(torch.add, terms)

    def flat(self) -> Tensor:
        """Returns the parameters' present values [P]."""
        return torch.cat([p.detach().flatten() for p in self.parameters])

    @torch.no_grad()
    def move(self, flat: Tensor) -> None:
        """Sets the parameters."""
        position = 0
        for p in self.parameters:
            p.copy_(flat[position : position + p.numel()].view_as(p))
            position += p.numel()

    def leave(self) -> None:
        """Leaves the random generators as one call leaves them."""
        if self._after is not None:
            self._after.restore()

    def _called(self) -> tuple[Tensor, Terms]:
        """Calls the closure; what it returned and its terms."""
        self._last = None  # of two calls' graphs one is freed before the other one is made
        result = self._call()
        with torch.enable_grad():
            self._last = result, find_terms(result, Reach(self.parameters), self.owner)
        return self._last

    def _call(self) -> Tensor:
        """Returns the closure's scalar loss."""
        if self._after is not None:
            self._random.restore()
        before = [(p._version, p.detach().clone() if p.is_cpu else None) for p in self.parameters]
        with torch.enable_grad():
            self.calling = True
            result = self._closure()
            self.calling = False
            result = plain(result)
        if written := [p for p, (v, old) in zip(self.parameters, before, strict=True) if p._version != v or _differs(p, old)]:
            raise RuntimeError(
                f"{self.owner}.step(): expected a closure that leaves the parameters as they are, but it writes to the one of "
                f"shape {tuple(written[0].shape)}. Clamp or project it after the step, or compute what it has to be, as k.exp() "
                "for a positive one"
            )
        if self._after is None:
            self._after = RandomState.now()
        if isinstance(result, Tensor):
            if result.numel() != 1 or not result.dtype.is_floating_point:
                raise RuntimeError(
                    f"{self.owner}.step(): expected the closure to return a scalar loss or [(residual, weight), ...], got a "
                    f"tensor of shape {tuple(result.shape)} and dtype {result.dtype}"
                )
            return result
        if not (isinstance(result, list | tuple) and result and all(_is_pair(pair) for pair in result)):
            raise RuntimeError(
                f"{self.owner}.step(): expected the closure to return a scalar loss or [(residual, weight), ...], got "
                f"{type(result).__name__}; {_instead(result)}"
            )
        if any(r.is_complex() for r, _ in result):
            raise RuntimeError(
                f"{self.owner}.step(): expected real residuals, got complex ones; give their parts, torch.view_as_real(residual)"
            )
        for r, weight in result:
            if isinstance(weight, Tensor) and not _expands(weight.shape, r.shape):
                raise RuntimeError(
                    f"{self.owner}.step(): expected a weight that expands to its residual's shape, {tuple(r.shape)}, got one of "
                    f"shape {tuple(weight.shape)}; reshape it, weight.view_as(residual) for one number each"
                )
            if r.ndim == 0 and self._is_loss(r):
                raise RuntimeError(
                    f"{self.owner}.step(): expected residuals, whose squares are taken, got a scalar that is a sum of squares "
                    "itself; give what it squares, (u - y, weight) for mse_loss(u, y), or return the scalar loss without a list"
                )
        with torch.enable_grad():
            return torch.stack([(plain(weight) * plain(r).square()).mean() for r, weight in result]).sum()

    def _is_loss(self, r: Tensor) -> bool:
        """Tells whether a scalar's graph shows a sum of squares and nothing beside it: neither |u|^2 - 1 nor exp(u)."""
        try:
            with torch.enable_grad():
                terms = find_terms(r, Reach(self.parameters), self.owner)
            coefficients(r, [*terms.squares, *terms.penalties], self.owner)
        except RuntimeError:
            return False
        return not terms.constant and not any(term.whole or kind(term.node) in POSITIVE for term in terms.squares)

    def _penalties(self, terms: list[Term], weights: list[Tensor]) -> Tensor | None:
        if not terms:
            return None
        each = {id(p): torch.zeros_like(p) for p in self.parameters}
        for term, c in zip(terms, weights, strict=True):
            each[id(term.residual)] += c
        return torch.cat([t.flatten() for t in each.values()])


def _expands(shape: torch.Size, target: torch.Size) -> bool:
    """Tells whether a tensor of a shape expands to another one."""
    return len(shape) <= len(target) and all(n in (1, m) for n, m in zip(shape[::-1], target[::-1], strict=False))


def _instead(result: object) -> str:
    """Returns what to return in place of what is no loss."""
    if isinstance(result, int | float):
        return "return the loss with its graph, not loss.item()"
    if result is None:
        return "end the closure with return loss"
    return "return the loss alone, and hand other values on by nonlocal names or a list"


def _is_pair(pair: object) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], Tensor)


def _differs(p: Tensor, old: Tensor | None) -> bool:
    """Tells whether a parameter has other numbers than before, as by a write to p.data, which no version counts.

    Not seen on other devices than the CPU (None), where to look would be a wait.
    """
    return old is not None and not torch.equal(p.detach().nan_to_num(), old.nan_to_num())
