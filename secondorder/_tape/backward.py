"""What backward passes from recorded losses leave behind: how each loss was scaled, and the gradients in between.

A backward pass counts if it reaches a recorded loss and changes the weights' gradients: `backward()` does,
`torch.autograd.grad` does not. Its records are dropped where the gradients are: by `clear`, and at the next backward pass that
finds them all None or 0.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from secondorder._layers import parameters_of
from secondorder._tape.backward_roots import backward_roots, term_outside
from secondorder._tape.graph import metadata
from secondorder._tape.records import LayerCall, Link, LossCall
from secondorder._tensors import refuse_capture, to_compute_dtype


@dataclass(eq=False, slots=True)
class _Run:
    """One run of the autograd engine."""

    id: int
    gradients: list[tuple[Tensor | None, int]]  # of the weights when it reached the first loss, with their versions
    discarded: bool  # whether they were all None or zero, though there were earlier records
    outside: str | None  # what it is of besides recorded losses
    losses: list[LossCall] = field(default_factory=list)
    events: list[tuple[Any, str, Tensor]] = field(default_factory=list)  # (record, attribute, gradient to add to it)


class BackwardLog:
    """Collects gradients into the records while the engine runs, and keeps them where the run has changed the weights' gradients.

    Gradients come from hooks on the nodes that made the tensors: they fire with the values of before an in-place activation, and
    after all hooks of the user's own on a tensor, whose changes so count.

    Args:
        layers: whose weights' gradients say whether a run counts.
        watched: where every backward pass has to be from recorded losses alone, their key in the nodes' metadata, and the
            parameters; None: what else has gradients does not matter.
    """

    def __init__(self, layers: dict[nn.Linear, str], watched: tuple[str, Sequence[Tensor]] | None = None):
        self.losses: list[LossCall] = []
        self.outside: str | None = None  # what the gradients are of besides the recorded losses
        self._layers = layers
        self._watched = watched
        self._run: _Run | None = None
        self._reference = weakref.ref(self)
        self.handles: list[RemovableHandle] = []
        if watched is not None:
            self.handles = [p.register_post_accumulate_grad_hook(self._accumulation()) for p in watched[1] if p.requires_grad]

    def watch_loss(self, call: LossCall, node: Node, output_nr: int) -> None:
        """Has backward passes that reach this loss, an output of `node`, collected from there to their end."""
        reference = self._reference

        def backward(gradients: tuple[Tensor | None, ...]) -> None:
            log, gradient = reference(), gradients[output_nr]
            if log is not None and gradient is not None:
                log._enter_run(call, _graphless(gradient))

        node.register_prehook(backward)
        if self._watched is not None:
            metadata(node)[self._watched[0]] = call

    def collect(self, record: LayerCall | Link, name: str, node: Node, output_nr: int) -> None:
        """Adds the gradient w.r.t. an output of `node` to an attribute of the record, in backward passes from a recorded loss."""
        reference = self._reference

        def hook(gradients: tuple[Tensor | None, ...]) -> None:
            log = reference()
            run = log._run if log is not None else None
            gradient = gradients[output_nr]  # None where only another output of the node is in use
            if run is not None and gradient is not None and run.id == torch._C._current_graph_task_id():
                run.events.append((record, name, _graphless(gradient)))

        node.register_prehook(hook)

    def clear(self, release: bool = False) -> None:
        """Forgets every backward pass so far; with `release` also the forward passes that they went through."""
        for loss in self.losses:
            calls = loss.calls()
            loss.clear(release)
            for call in calls:
                call.clear(release)
        self.losses, self.outside = [], None

    @contextmanager
    def rescaled(self, factor: float) -> Iterator[None]:
        """Makes the records within it those of a backward pass from `factor` times what backward() was called on."""
        calls = dict.fromkeys(call for loss in self.losses for call in loss.calls())
        fields: list[tuple[Any, str]] = [(loss, "scale") for loss in self.losses] + [(call, "grad_output") for call in calls]
        fields += [(link, "grad") for call in calls for link in call.inputs_from]
        before = [(record, name, getattr(record, name)) for record, name in fields if getattr(record, name) is not None]
        for record, name, value in before:
            setattr(record, name, to_compute_dtype(value) * factor)
        try:
            yield
        except BaseException:
            for record, name, value in before:
                setattr(record, name, value)
            raise

    def _enter_run(self, loss: LossCall, gradient: Tensor) -> None:
        """Begins to collect the gradients of a backward pass that has reached a loss, to its end.

        The loss's node is asked of the engine, since a hook that held it would keep its graph until the garbage collector runs.
        """
        run = self._run
        if run is None or run.id != torch._C._current_graph_task_id():
            gradients = list(self._gradients())
            if self.losses:
                refuse_capture("second backward pass before a step")
            discarded = bool(self.losses or self.outside) and all(g is None or not g.any() for g, _ in gradients)
            run = self._run = _Run(
                torch._C._current_graph_task_id(), gradients, discarded, self._outside(torch._C._current_autograd_node())
            )
            torch.autograd.Variable._execution_engine.queue_callback(self._finish_run)
        run.outside = run.outside or loss.outside
        run.losses.append(loss)
        run.events.append((loss, "scale", gradient))

    def _finish_run(self) -> None:
        """Keeps what a run has collected, if it has changed the weights' gradients."""
        run, self._run = self._run, None
        # torch.autograd.grad leaves the weights' gradients as they were: nothing that a step will use has come of it.
        if run is None or all(a is b and v == w for (a, v), (b, w) in zip(run.gradients, self._gradients(), strict=True)):
            return
        if run.discarded:
            self.clear()  # the gradients that earlier records belong to had been zeroed or set to None
        for record, name, gradient in run.events:
            before = getattr(record, name)
            setattr(record, name, gradient if before is None else before + gradient)
        self.losses += [loss for loss in dict.fromkeys(run.losses) if not loss.released and loss not in self.losses]
        self.outside = self.outside or run.outside

    def _accumulation(self) -> Callable[[Tensor], None]:
        """Returns a hook for parameters that notices runs which have come from no recorded loss."""
        reference = self._reference

        def accumulated(parameter: Tensor) -> None:
            log = reference()
            if log is not None and (log._run is None or log._run.id != torch._C._current_graph_task_id()):
                log.outside = log.outside or "a backward pass from something else than the criterion"

        return accumulated

    def _outside(self, loss: Node) -> str | None:
        """Returns what the run that has reached a loss is of besides recorded ones; None: nothing, or it does not matter."""
        if self._watched is None:
            return None
        key, parameters = self._watched
        roots = backward_roots(loss)
        if roots is None:
            return "what cannot be seen"
        found = term_outside(roots, lambda node: key in metadata(node), parameters)
        return None if found is None else f"a term by {found}"

    def _gradients(self) -> Iterator[tuple[Tensor | None, int]]:
        """Yields every trainable weight's gradient, and its version."""
        for layer in self._layers:
            weight, _ = parameters_of(layer)
            if weight is not None and weight.requires_grad:
                g = weight.grad
                yield g, 0 if g is None else g._version


def _graphless(gradient: Tensor) -> Tensor:
    """Returns the gradient detached, at no cost where it is so already."""
    return gradient.detach() if gradient.requires_grad else gradient
