"""What a closure calls backward() on, as a function of the parameters: any loss, also terms outside of the criterion."""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secondorder._distributed import RankReducer
from secondorder._tape import ForwardState, Tape, term_of_its_own, term_outside, upstream
from secondorder._tensors import Later, Transfer, all_finite, host_numbers, to_compute_dtype
from secondorder.criteria.hessians import known_form
from secondorder.criteria.known import by_position
from secondorder.stepping.gauss_newton_product import GraphQuadratic, differentiable_twice, inner
from secondorder.stepping.over_ranks import LossOverRanks
from secondorder.stepping.recorded_loss import tolerance_of

# (tensor, gradient) that backward() was called with
Roots = list[tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Closure:
    """Holds a closure that has been called once, and the state that this call began with."""

    call: Callable[[], Any]
    state: ForwardState
    # Within it backward() does nothing but note its arguments, and call what is given.
    quiet: Callable[[Callable[[], None]], AbstractContextManager[Roots]]


@dataclass
class _Graph:
    """Holds the loss with its graph, and the criterion's calls in it."""

    loss: Tensor
    value: float
    calls: list[tuple[Tensor, list[Tensor], Any]]  # the criterion's loss, its trained arguments, its known form
    outside: bool  # whether anything else depends on parameters


class ClosureLoss(LossOverRanks):
    """The loss that a closure calls backward() on, at any parameters, with the same random numbers, buffers and attributes.

    Its quadratic terms are the Gauss-Newton matrix of the criterion's calls and, for terms outside of them, the positive part of
    their own Hessian's form. The whole batch is evaluated.

    Args:
        owner: who asks, for errors.
        closure: already called at the parameters' own values.
        model: whose parameters they are.
        criterion: whose calls are seen.
        parameters: what the loss is a function of.
        instances: of the batch.
        tape: muted during the evaluations.
        sign: -1 where the loss is maximised.
        ranks: whose losses' mean it is; None: this process's alone.
    """

    def __init__(
        self, owner: str, closure: Closure, model: nn.Module, criterion: nn.Module, parameters: list[Tensor], instances: float,
        tape: Tape, sign: float = 1.0, ranks: RankReducer | None = None,
    ):  # fmt: skip
        self.owner, self.closure, self.model, self.criterion = owner, closure, model, criterion
        super().__init__(ranks, lambda: instances)
        self.parameters, self.tape, self.sign = parameters, tape, sign
        self.here = [p.detach().clone() for p in parameters]
        self._graph: _Graph | None = None
        self._terms: list[tuple[float, GraphQuadratic]] = []
        self._gradients: list[Tensor] = []
        self._curved: list[tuple[Tensor, Tensor]] = []  # of the terms outside: gradients with their graph, and the parameters

    @functools.cached_property
    def start(self) -> float:
        """Returns the loss at the parameters' own values."""
        return self._mean(lambda: self.sign * self._at_start().value)

    def value(self, parameters: list[Tensor]) -> float:
        """Returns the loss at these values; inf if they are not finite."""
        if not all_finite(parameters):
            return math.inf
        return self._mean(lambda: self.sign * float(self._evaluated(parameters).detach()))

    def _products(self, vectors: list[list[Tensor]], transfer: Transfer) -> Later[tuple[Tensor, Tensor]]:
        graph, vectors = self._at_start(), [[to_compute_dtype(t) for t in vector] for vector in vectors]
        with self._differentiating():
            self._differentiate(graph)
            terms = [(abs(scale), term.products(vectors, transfer)) for scale, term in self._terms]
            outside = self._outside(vectors, transfer)
        first = transfer.later(
            torch.stack(
                [torch.stack([(g * t.to(g.dtype)).sum().double() for g, t in zip(self._gradients, v, strict=True)]).sum()
                 for v in vectors]
            )
        )  # fmt: skip

        def sums() -> tuple[Tensor, Tensor]:
            with self._differentiating():
                zero = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device="cpu")
                return self.sign * first(), sum((scale * found()[1] for scale, found in terms), zero) + outside()

        return sums

    def _differentiate(self, graph: _Graph) -> None:
        """Differentiates the loss once, for all products."""
        if self._gradients:
            return
        losses = [loss for loss, _, _ in graph.calls]
        scales = torch.autograd.grad(graph.loss, losses, retain_graph=True, allow_unused=True) if losses else ()
        factors = host_numbers([0.0 if scale is None else scale for scale in scales])
        for (loss, arguments, known), factor in zip(graph.calls, factors, strict=True):
            if factor:
                self._terms.append((factor, GraphQuadratic(loss, arguments, self.parameters, known)))
        found = torch.autograd.grad(graph.loss, self.parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        self._gradients = [to_compute_dtype(g) for g in found]
        if graph.outside:
            with torch.enable_grad():
                rest = graph.loss - sum(factor * loss for loss, factor in zip(losses, factors, strict=True))
                gradients = torch.autograd.grad(rest, self.parameters, create_graph=True, allow_unused=True)
            pairs = zip(gradients, self.parameters, strict=True)
            self._curved = [(g, p) for g, p in pairs if g is not None and g.requires_grad]

    def _outside(self, vectors: list[list[Tensor]], transfer: Transfer) -> Later[Tensor]:
        """Returns what gives the positive part of the form of the Hessian of the terms outside of the criterion."""
        if not self._curved:
            return lambda: torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device="cpu")
        columns = []
        for vector in vectors:
            by_parameter = dict(zip(self.parameters, vector, strict=True))
            products = torch.autograd.grad(
                [g for g, _ in self._curved], self.parameters, [by_parameter[p].to(g.dtype) for g, p in self._curved],
                retain_graph=True, allow_unused=True, materialize_grads=True,
            )  # fmt: skip
            columns.append(torch.stack([inner(other, products) for other in vectors]))
        found = transfer.later(torch.stack(columns, 1))

        def positive() -> Tensor:
            form = found()
            values, basis = torch.linalg.eigh(self.sign * (form + form.T) / 2)
            return (basis * values.clamp(min=0)) @ basis.T

        return positive

    def _at_start(self) -> _Graph:
        """Returns the loss at the parameters' own values, evaluated at the first call; checks that it is the recorded one."""
        if self._graph is not None:
            return self._graph
        calls: list[tuple[Tensor, list[Tensor], Any]] = []
        made: list[Tensor] = []

        def called(criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Any) -> None:
            if isinstance(loss, Tensor) and loss.grad_fn is not None:
                made.append(loss)
                args, kwargs = by_position(criterion, args, kwargs)
                if term_of_its_own(loss, (args, kwargs), self.parameters) is not None:
                    return  # it counts as a term outside of the criterion
                trained = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
                known = None
                if len(trained) == 1 and args and args[0] is trained[0]:
                    known = known_form(criterion, trained[0].detach(), *args[1:], **kwargs)
                calls.append((loss, trained, known))

        handle = self.criterion.register_forward_hook(called, with_kwargs=True)
        try:
            loss = self._evaluated(None)
        finally:
            handle.remove()
        assert loss.grad_fn is not None
        recorded = {node for each, _, _ in calls if (node := each.grad_fn) is not None}
        outside = term_outside([loss.grad_fn], lambda node: node in recorded, self.parameters) is not None
        trained = upstream(loss.grad_fn)  # a call for a log is none of them
        own = [each for each in made if each.grad_fn in trained]
        value, *values = host_numbers([loss, *own, *(each.loss for each in self.tape.losses)])
        now, seen = math.fsum(values[: len(own)]), math.fsum(values[len(own) :])
        if abs(now - seen) > tolerance_of([loss, *self.parameters]) * (abs(now) + abs(seen)) and math.isfinite(seen):
            raise RuntimeError(
                f"{self.owner}.step(): expected the closure to evaluate the same loss at every call of a step, got {now:.9g} "
                f"after {seen:.9g} for the criterion at the same parameters. Draw the batch outside of the closure, and random "
                "numbers by torch's, NumPy's or Python's generators. No parameter and no state has changed."
            )
        self._graph = _Graph(loss, value, calls, outside)
        return self._graph

    def _evaluated(self, values: list[Tensor] | None) -> Tensor:
        """Returns what the closure calls backward() on, with its graph."""
        everything = list(dict.fromkeys([*self.model.parameters(), *self.parameters]))
        gradients = [p.grad for p in everything]

        def lend() -> None:  # copies, for a closure that clips or scales what backward() has left
            for p, gradient in zip(everything, gradients, strict=True):
                if p.grad is None and gradient is not None:
                    p.grad = gradient.clone()

        try:
            for p in everything:
                p.grad = None
            with (
                self._moved(values), self.tape.muted(), differentiable_twice(self.model), torch.enable_grad(),
                self.closure.quiet(lend) as roots, self.closure.state.restored(buffers=True),
            ):  # fmt: skip
                self.closure.call()
        finally:
            for p, gradient in zip(everything, gradients, strict=True):
                p.grad = gradient
        terms = [t if gradient is None else (t * gradient).sum() for t, gradient in roots if t.requires_grad]
        if not terms:
            raise RuntimeError(
                f"{self.owner}.step(): expected the closure to call backward() on a loss of the parameters at every call, as it "
                "did at the first"
            )
        with torch.enable_grad():
            return terms[0].reshape(()) if len(terms) == 1 else torch.stack([t.reshape(()) for t in terms]).sum()

    @contextmanager
    def _moved(self, values: list[Tensor] | None) -> Iterator[None]:
        """Gives the parameters other values within it, unseen by the version counters that graphs go by."""
        if values is None:
            yield
            return
        try:
            for p, value in zip(self.parameters, values, strict=True):
                p.data.copy_(value)
            yield
        finally:
            for p, value in zip(self.parameters, self.here, strict=True):
                p.data.copy_(value)
