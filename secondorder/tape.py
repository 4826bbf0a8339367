"""What a forward and backward pass leaves behind: per linear layer its input, what follows it, and the gradients there.

A forward hook on every linear layer of the model makes a `LayerCall` and ties it to the autograd node of the layer's output;
from the graph it also reads which call made its input, and through which function. A forward hook on the criterion makes a
`LossCall` likewise. So the chain of layers is known whatever the model's `forward` looks like, and a record lives exactly as
long as its graph: a forward pass without a backward one leaves nothing behind. Gradients come from tensor hooks, which fire with
the values of before an in-place activation. The hook on the loss says that a backward pass took place, and with which factor.

Nothing is recorded in eval mode, without grad mode, or while `recording` is off.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from secondorder import activations
from secondorder.activations import Transfer, rows
from secondorder.criteria import OutputHessian, analytic_hessian, autograd_hessian


@dataclass(eq=False)
class LayerCall:
    """One call of a linear layer."""

    layer: nn.Linear
    input: Tensor  # [..., n_in]
    inputs_from: list["Link"] = field(default_factory=list)  # empty: the network's own input, or one no linear layer made
    output: Tensor | None = None  # [..., n_out], kept only until what follows is known
    version: int = 0
    used: bool = False  # by another layer or by the criterion
    grad_output: Tensor | None = None  # [..., n_out], kept only where `_keep_gradient` was called
    keeps_gradient: bool = False

    def preactivation(self) -> Tensor:
        """Z = W h + b, computed anew where an in-place activation has overwritten it."""
        if self.output is not None and self.output._version == self.version:
            return self.output
        with torch.no_grad():
            return nn.functional.linear(self.input, self.layer.weight, self.layer.bias)


@dataclass(eq=False)
class Link:
    """The way from a layer's output to the input of the next layer."""

    source: LayerCall
    transfer: Transfer | None  # None: not an elementwise function of this source alone; `obstacle` says why
    obstacle: str = ""
    grad: Tensor | None = None  # gradient w.r.t. the next layer's input, kept only for a curved transfer


@dataclass(eq=False)
class LossCall:
    """One call of the criterion."""

    sources: list[LayerCall]  # the layers whose outputs it sees
    hessian: OutputHessian | None  # w.r.t. the source's output; None if there are several
    loss: Tensor  # the scalar it returned, detached
    scale: Tensor | None = None  # d(what backward() was called on) / d(loss), summed over backward passes


@dataclass(eq=False)
class LayerRecord:
    """One linear layer over all instances since the last step: the union of its calls' batches."""

    layer: nn.Linear
    calls: list[LayerCall]
    next: "LayerRecord | None" = None  # the layer that takes this one's output, elementwise transformed
    links: list[Link] = field(default_factory=list)  # to `next`, one per call
    losses: list[LossCall] = field(default_factory=list)  # or the criterion does, one call per call
    obstacle: str = ""  # or neither, for this reason

    def input(self) -> Tensor:
        """H [m, n_in]."""
        return rows([call.input for call in self.calls])

    def grad_output(self) -> Tensor:
        """Delta [m, n_out]; recorded only for layers with an obstacle behind them, or where the tape was told to."""
        return rows([call.grad_output for call in self.calls if call.grad_output is not None])

    def transfer(self) -> Transfer:
        """What lies between this layer and `next`, over all instances [m, n_out]."""
        return activations.merge([link.transfer for link in self.links if link.transfer is not None])

    def grad_activation(self) -> Tensor | None:
        """Gradient w.r.t. the input of `next` [m, n_out]; None where sigma'' = 0."""
        grads = [link.grad for link in self.links if link.grad is not None]
        return rows(grads) if len(grads) == len(self.links) else None


class Tape:
    """Records the calls of `layers` and of `criterion`.

    Args:
        layers: the linear layers, with their names for messages.
        criterion: a module whose calls return the scalar loss.
        diagonal: whether the gradients that the recursion's diagonal needs are kept.
        grad_outputs: whether every layer's delta is kept.

    `recording` may be switched off and on at any time.
    """

    def __init__(self, layers: dict[nn.Linear, str], criterion: nn.Module, *, diagonal: bool, grad_outputs: bool = False):
        self.names = layers
        self.criterion = criterion
        self.diagonal = diagonal
        self.grad_outputs = grad_outputs
        self.recording = True
        self._key = f"secondorder.{id(self)}"  # of its calls in the metadata of the autograd nodes of layers' outputs
        self._muted = False
        self._losses: list[LossCall] = []
        self._handles: list[RemovableHandle] = [
            module.register_forward_hook(_Hook(self, method), with_kwargs=True)
            for module, method in [(layer, "_on_layer") for layer in layers] + [(criterion, "_on_criterion")]
        ]
        weakref.finalize(self, _remove, self._handles)

    def remove(self) -> None:
        """Takes all hooks off the modules."""
        _remove(self._handles)

    def clear(self) -> None:
        """Forgets every backward pass so far."""
        self._losses = []

    @property
    def losses(self) -> list[LossCall]:
        """The criterion's calls that a backward pass has gone through since the last `clear`."""
        return self._losses

    def records(self) -> list[LayerRecord]:
        """The layers that the losses so far depend on, each after the layer that takes its output: the recursion's order."""
        records: dict[nn.Linear, LayerRecord] = {}
        consumers: dict[LayerCall, list[Link | LossCall]] = {}
        for loss in self._losses:
            for call in _consumers_first(loss, consumers, self.names):
                records.setdefault(call.layer, LayerRecord(call.layer, [])).calls.append(call)
        owner = {link: records[call.layer] for record in records.values() for call in record.calls for link in call.inputs_from}
        for record in records.values():
            _connect(record, [consumers[call] for call in record.calls], owner, self.names)
        return _recursion_order(records)

    def _on_layer(self, layer: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        node = output.grad_fn
        if node is None or not layer.training or not self._active():
            return
        input = args[0] if args else kwargs["input"]
        call = LayerCall(layer, input.detach(), output=output.detach(), version=output._version)
        with self._mute():
            call.inputs_from = self._links(input)
        _metadata(node)[self._key] = call
        if self.grad_outputs:
            self._keep_gradient(node)
        if self.diagonal and any(link.transfer is not None and link.transfer.curved for link in call.inputs_from):
            (link,) = call.inputs_from
            input.register_hook(self._when_backward(lambda g: _accumulate(link, "grad", g)))

    def _links(self, input: Tensor) -> list[Link]:
        """Where a layer's input comes from."""
        if input.grad_fn is None:
            return []
        nodes = _source_nodes(input.grad_fn, self._key)
        if len(nodes) != 1:
            names = ", ".join(sorted({repr(self.names[_metadata(node)[self._key].layer]) for node in nodes}))
            return [self._blocked(node, f"is combined with other linear layers ({names})") for node in nodes]
        (node,) = nodes
        source: LayerCall = _metadata(node)[self._key]
        transfer: Transfer | None = activations.analytic(input, node, source.preactivation)
        if transfer is None:
            try:
                transfer = activations.probe(input, node, second=self.diagonal)
            except RuntimeError as error:
                return [self._blocked(node, f"goes through a function that autograd cannot differentiate twice ({error})")]
        if transfer is None:
            return [self._blocked(node, f"goes through a function that is not elementwise ({input.grad_fn.name()})")]
        self._use(node)
        source.output = None
        return [Link(source, transfer)]

    def _blocked(self, node: Node, obstacle: str) -> Link:
        self._keep_gradient(node)
        return Link(self._use(node), None, obstacle)

    def _use(self, node: Node) -> LayerCall:
        call: LayerCall = _metadata(node)[self._key]
        if call.used:
            self._keep_gradient(node)
        call.used = True
        return call

    def _keep_gradient(self, node: Node) -> None:
        call: LayerCall = _metadata(node)[self._key]
        if not call.keeps_gradient:
            call.keeps_gradient = True
            keep = self._when_backward(lambda g: _accumulate(call, "grad_output", g))
            node.register_prehook(lambda gradients: keep(gradients[0]))

    def _on_criterion(self, criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Tensor) -> None:
        node = loss.grad_fn if isinstance(loss, Tensor) else None
        if node is None or not self._active():
            return
        nodes = _source_nodes(node, self._key)
        if not nodes:
            return
        if loss.dim() != 0:
            raise ValueError(
                f"expected the criterion {criterion} to return a scalar, got shape {tuple(loss.shape)}; "
                "use reduction='mean' or 'sum', or pass a function that reduces"
            )
        call = LossCall([self._use(node) for node in nodes], None, loss.detach())
        if len(nodes) == 1:
            output = args[0] if args else None
            if isinstance(output, Tensor) and output.grad_fn is nodes[0]:
                call.hessian = analytic_hessian(criterion, output.detach(), *args[1:], **kwargs)
            if call.hessian is None:
                with self._mute():
                    call.hessian = autograd_hessian(loss, nodes[0])
        else:
            for node in nodes:
                self._keep_gradient(node)

        def backward(gradient: Tensor) -> None:
            weight = call.sources[0].layer.weight
            if weight.requires_grad and weight.grad is None:
                self.clear()  # gradients were set to None since: those that earlier records belong to are gone
            if call.scale is None:
                self._losses.append(call)
            _accumulate(call, "scale", gradient)

        loss.register_hook(self._when_backward(backward))

    def _when_backward(self, f: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        """A gradient hook that calls f in backward passes proper.

        Not in the tape's own autograd runs, and not in those that build a graph: they are derivatives inside of a loss or of
        a regulariser, not the loss's own backward pass. Nor after the tape is gone.
        """
        reference = weakref.ref(self)

        def hook(gradient: Tensor) -> None:
            tape = reference()
            if tape is not None and not tape._muted and not torch.is_grad_enabled():
                f(gradient)

        return hook

    def _active(self) -> bool:
        return self.recording and not self._muted and torch.is_grad_enabled()

    @contextmanager
    def _mute(self) -> Iterator[None]:
        """Autograd runs inside do not count as backward passes."""
        self._muted = True
        try:
            yield
        finally:
            self._muted = False


class _Hook:
    """A module hook that does not keep the tape alive, and is inert in copies of the module: those are another net's."""

    def __init__(self, tape: Tape | None, method: str):
        self.tape = None if tape is None else weakref.ref(tape)
        self.method = method

    def __call__(self, *args: Any) -> None:
        tape = self.tape and self.tape()
        if tape is not None:
            getattr(tape, self.method)(*args)

    def __reduce__(self) -> tuple[type, tuple[None, str]]:  # also what copy.deepcopy goes by
        return _Hook, (None, self.method)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def _metadata(node: Node) -> dict[str, Any]:
    return cast(dict[str, Any], node.metadata)  # torch's stub takes the attribute for a method


def _accumulate(record: Any, name: str, gradient: Tensor) -> None:
    before = getattr(record, name)
    setattr(record, name, gradient if before is None else before + gradient)


def _source_nodes(start: Node, key: str) -> list[Node]:
    """The nearest autograd nodes upstream of (or at) `start` that are outputs of recorded linear layers."""
    found, seen, stack = [], {start}, [start]
    while stack:
        node = stack.pop()
        if key in _metadata(node):
            found.append(node)
            continue
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return found


def _consumers_first(
    loss: LossCall, consumers: dict[LayerCall, list[Link | LossCall]], names: dict[nn.Linear, str]
) -> list[LayerCall]:
    """All calls that the loss depends on; fills `consumers` of each."""
    found: list[LayerCall] = []
    stack: list[tuple[LayerCall, Link | LossCall]] = [(source, loss) for source in loss.sources]
    while stack:
        call, consumer = stack.pop()
        if call not in consumers:
            consumers[call] = []
            if any(call.layer is other.layer for other in found):
                raise ValueError(
                    f"expected each linear layer to be called once per forward pass, but {names[call.layer]!r} is called more "
                    "than once; curvature of shared layers is not defined here: give each use a layer of its own, or "
                    "freeze the shared one (requires_grad_(False))"
                )
            found.append(call)
            stack += [(link.source, link) for link in call.inputs_from]
        consumers[call].append(consumer)
    return found


def _connect(
    record: LayerRecord,
    consumers: list[list[Link | LossCall]],
    owner: dict[Link, LayerRecord],
    names: dict[nn.Linear, str],
) -> None:
    """Sets what follows a record, from the consumers of each of its calls."""
    singles = [each[0] for each in consumers if len(each) == 1]
    losses = [c for c in singles if isinstance(c, LossCall)]
    links = [c for c in singles if isinstance(c, Link)]
    if len(singles) < len(consumers):
        record.obstacle = "is used in several places"
    elif len(losses) == len(consumers):
        if all(loss.hessian is not None for loss in losses):
            record.losses = losses
        else:
            record.obstacle = "enters the criterion together with other linear layers' outputs"
    elif len(links) < len(consumers) or len({id(owner[link]) for link in links}) > 1:
        record.obstacle = "is used in several places"
    elif any(link.transfer is None for link in links):
        record.obstacle = next(link.obstacle for link in links if link.transfer is None)
    else:
        record.next, record.links = owner[links[0]], links


def _recursion_order(records: dict[nn.Linear, LayerRecord]) -> list[LayerRecord]:
    ordered: dict[LayerRecord, None] = {}
    for record in records.values():
        chain = []
        current: LayerRecord | None = record
        while current is not None and current not in ordered:
            chain.append(current)
            current = current.next
        ordered.update(dict.fromkeys(reversed(chain)))
    return list(ordered)
