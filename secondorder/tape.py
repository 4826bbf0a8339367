"""What a forward and backward pass leaves behind: per linear layer its input, what follows it, and the gradients there.

A forward hook on every linear layer of the model makes a `LayerCall` and ties it to the autograd node of the layer's output;
from the graph it also reads which call made its input, and through which function. A forward hook on the criterion makes a
`LossCall` likewise. So the chain of layers is known whatever the model's `forward` looks like, and a record lives exactly as
long as its graph: a forward pass without a backward one leaves nothing behind. Gradients come from hooks on the nodes that made
the tensors: they fire with the values of before an in-place activation, and after all hooks of the user's own on a tensor, whose
changes so count. The hook on the loss says that a backward pass took place, and with which factor.

Nothing is recorded in eval mode, without grad mode, or while `recording` is off.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from secondorder import activations
from secondorder.activations import Transfer, rows, sample, wide, widened
from secondorder.criteria import OutputHessian, OutputRoot, analytic_hessian, autograd_hessian


@dataclass(eq=False, slots=True)
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

    def upstream(self) -> list["LayerCall"]:
        """This call and all that it depends on."""
        found = dict.fromkeys([self])
        stack = [self]
        while stack:
            new = [link.source for link in stack.pop().inputs_from if link.source not in found]
            found.update(dict.fromkeys(new))
            stack += new
        return list(found)

    def preactivation(self) -> Tensor:
        """The preactivation z = W h + b, computed anew where an in-place activation has overwritten it."""
        if self.output is not None and self.output._version == self.version:
            return self.output
        with torch.no_grad():
            return nn.functional.linear(self.input, self.layer.weight, self.layer.bias)


@dataclass(eq=False, slots=True)
class Link:
    """The way from a layer's output to the input of the next layer."""

    source: LayerCall
    target: nn.Linear  # the next layer
    transfer: Transfer | None  # None: not an elementwise function of this source alone; `obstacle` says why
    obstacle: str = ""
    grad: Tensor | None = None  # gradient w.r.t. the next layer's input, kept only for a curved transfer


@dataclass(eq=False, slots=True)
class ModelCall:
    """The arguments of one call of the model, detached."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(eq=False, slots=True)
class LossCall:
    """One call of the criterion."""

    sources: list[LayerCall]  # the layers whose outputs it sees
    hessian: OutputHessian | None  # w.r.t. the source's output; None if there are several
    loss: Tensor  # the scalar it returned, detached
    mean: bool  # whether it is a mean over instances, rather than their sum
    instances: int | None = None  # rows of its sources, where they agree: a layer before a pooling has more rows than the loss
    inputs: ModelCall | None = None  # of the model, where the criterion's first argument is its very output
    output: Tensor | None = None  # that output, where it is also the one source's, at most reshaped
    args: tuple[Any, ...] = ()  # of the criterion after the output, kept together with `inputs`
    kwargs: dict[str, Any] = field(default_factory=dict)
    blocks: dict[LayerCall, Tensor] = field(default_factory=dict)  # sum of delta delta^T [n_out, n_out] over its columns
    scale: Tensor | None = None  # d(what backward() was called on) / d(loss), summed over backward passes
    released: bool = False

    def calls(self) -> list[LayerCall]:
        """All calls of layers that it depends on."""
        if len(self.sources) == 1:
            return self.sources[0].upstream()
        return list(dict.fromkeys(call for source in self.sources for call in source.upstream()))


# (criterion, loss, autograd node of the one linear layer's output it depends on, its arguments) -> where columns start, and they
Columns = Callable[[nn.Module, Tensor, Node | None, tuple[Any, ...], dict[str, Any]], tuple[GradientEdge, OutputRoot]]

_RELEASED = torch.empty(0)

_COMPILED = "CompiledFunctionBackward"  # the name of a compiled graph's autograd node

# What evaluates frames in the interpreter's place, where torch.compile is at work; else None.
_compiler: Callable[[], Any] = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: True)


def _compiling() -> bool:
    """Whether what is called may be compiled. Where it may not, torch.compiler.disable would only cost: in every forward pass."""
    return torch.compiler.is_compiling() or _compiler() is not None


# At most so many numbers of all layers' deltas are held at once while columns are propagated.
_COLUMN_BUDGET = 2**25


@dataclass(eq=False, slots=True)
class LayerRecord:
    """One linear layer over all instances since the last step: the union of its calls' batches."""

    layer: nn.Linear
    weight: nn.Parameter
    dtype: torch.dtype  # of H: the weight's, at least float32
    calls: list[LayerCall] = field(default_factory=list)
    origins: list[LossCall] = field(default_factory=list)  # the loss that each call is part of
    consumers: list["Link | LossCall"] = field(default_factory=list)  # of the calls' outputs
    next: "LayerRecord | None" = None  # the layer that takes this one's output, elementwise transformed
    links: list[Link] = field(default_factory=list)  # to `next`, one per call
    losses: list[LossCall] = field(default_factory=list)  # or the criterion does, in these calls
    obstacle: str = ""  # or neither, for this reason
    block: Tensor | None = None  # sum of the losses' blocks, each with its factor
    samples: int | None = None  # the curvature's expectations take at most so many instances of each call

    def input(self, samples: int | None = None) -> Tensor:
        """The inputs h [m, n_in], or those of at most `samples` instances of each call."""
        return rows([call.input for call in self.calls], samples)

    def grad_outputs(self) -> list[tuple[Tensor, LossCall]]:
        """Each call's delta [..., n_out], with its loss; recorded only with an obstacle, or where the tape was told to."""
        pairs = zip(self.calls, self.origins, strict=True)
        return [(call.grad_output, loss) for call, loss in pairs if call.grad_output is not None]

    def transfer(self) -> Transfer:
        """What lies between this layer and `next`, over the instances [m, n_out]."""
        return activations.merge([link.transfer for link in self.links if link.transfer is not None], self.samples)

    def grad_activation(self) -> Tensor | None:
        """Gradient w.r.t. the input of `next` [m, n_out], its sum over the instances standing for all; None where sigma'' = 0."""
        grads = [link.grad for link in self.links if link.grad is not None]
        return rows([_for_all(grad, self.samples) for grad in grads]) if len(grads) == len(self.links) else None


class Tape:
    """Records the calls of `layers` and of `criterion`.

    Args:
        layers: the linear layers, with their names for messages.
        criterion: a module whose calls return the scalar loss.
        diagonal: whether the gradients that the recursion's diagonal needs are kept.
        grad_outputs: whether every layer's delta is kept.
        columns: gives columns s_ic at the network's output, which are taken back to every layer, delta_ic = J_i^T s_ic, while the
            graph lives; the sum of delta_ic delta_ic^T becomes the layer's `block`. Nothing for the recursion is kept then.
        model: what the layers are part of: torch.compile leaves its forward, and the criterion's, alone in training mode.
        keep_inputs: whether the model's arguments are to be kept, and the criterion's, for evaluating them anew.
        samples: of every forward pass at most so many instances, evenly spaced, enter the curvature's expectations; None: all.

    `recording` may be switched off and on at any time.
    """

    def __init__(
        self, layers: dict[nn.Linear, str], criterion: nn.Module, *, diagonal: bool, grad_outputs: bool = False,
        columns: Columns | None = None, model: nn.Module | None = None, keep_inputs: bool = False, samples: int | None = None,
    ):  # fmt: skip
        self.names = layers
        self.criterion = criterion
        self.diagonal = diagonal
        self.grad_outputs = grad_outputs
        self.columns = columns
        self.samples = samples
        self.recording = True
        self._key = f"secondorder.{id(self)}"  # of its calls in the metadata of the autograd nodes of layers' outputs
        self._reference = weakref.ref(self)
        self._muted = False
        self._run: _Run | None = None
        self._losses: list[LossCall] = []
        self._consumer: dict[nn.Linear, nn.Module] = {}  # what took each layer's output first: a layer, or the criterion
        self._several_consumers: set[nn.Linear] = set()
        self._not_elementwise: set[tuple[nn.Linear, nn.Linear, tuple[str, ...]]] = set()
        self.handles: list[RemovableHandle | _EagerHandle] = [
            module.register_forward_hook(_Hook(self, method), with_kwargs=True)
            for module, method in [(layer, "_on_layer") for layer in layers] + [(criterion, "_on_criterion")]
        ]
        if model is not None:
            self.handles += [_EagerHandle(model), _EagerHandle(criterion)]
            if keep_inputs:
                self.handles.append(model.register_forward_hook(_Hook(self, "_on_model"), with_kwargs=True))
        weakref.finalize(self, _remove, self.handles)

    def remove(self) -> None:
        """Takes all hooks off the modules."""
        _remove(self.handles)

    def clear(self, release: bool = False) -> None:
        """Forgets every backward pass so far; with `release` also the forward passes that they went through.

        A graph that somebody still holds (by its loss, say) then keeps none of the tape's tensors alive.
        """
        for loss in self._losses:
            calls = loss.calls()
            loss.scale, loss.released = None, release
            if release:
                if loss.inputs is not None:
                    loss.inputs.args, loss.inputs.kwargs = (), {}
                loss.inputs, loss.output, loss.args, loss.kwargs = None, None, (), {}
            for call in calls:
                call.grad_output = None
                for link in call.inputs_from:
                    link.grad = None
                    link.transfer = None if release else link.transfer
                if release:
                    call.input, call.output, call.inputs_from = _RELEASED, None, []
        self._losses = []

    @contextmanager
    def rescaled(self, factor: float) -> Iterator[None]:
        """Within it the records are those of a backward pass from `factor` times what backward() was called on."""
        calls = dict.fromkeys(call for loss in self._losses for call in loss.calls())
        fields: list[tuple[Any, str]] = [(loss, "scale") for loss in self._losses] + [(call, "grad_output") for call in calls]
        fields += [(link, "grad") for call in calls for link in call.inputs_from]
        before = [(record, name, getattr(record, name)) for record, name in fields if getattr(record, name) is not None]
        for record, name, value in before:
            setattr(record, name, widened(value) * factor)
        try:
            yield
        except BaseException:
            for record, name, value in before:
                setattr(record, name, value)
            raise

    @property
    def losses(self) -> list[LossCall]:
        """The criterion's calls that a backward pass has gone through since the last `clear`."""
        return self._losses

    def records(self) -> list[LayerRecord]:
        """The layers that the losses so far depend on, each after the layer that takes its output: the recursion's order."""
        records: dict[nn.Linear, LayerRecord] = {}
        seen: set[LayerCall] = set()
        for loss in self._losses:
            stack: list[tuple[LayerCall, Link | LossCall]] = [(source, loss) for source in loss.sources]
            while stack:
                call, consumer = stack.pop()
                record = records.get(call.layer)
                if record is None:
                    weight, _ = parameters_of(call.layer)
                    record = records[call.layer] = LayerRecord(call.layer, weight, wide(weight.dtype), samples=self.samples)
                record.consumers.append(consumer)
                if call in seen:
                    continue
                seen.add(call)
                if record.origins and record.origins[-1] is loss:
                    raise ValueError(
                        f"expected each linear layer to be called once per forward pass, but {self.names[call.layer]!r} is "
                        "called more than once; curvature of shared layers is not defined here: give each use a layer of its "
                        "own, or freeze the shared one (requires_grad_(False))"
                    )
                record.calls.append(call)
                record.origins.append(loss)
                stack += [(link.source, link) for link in call.inputs_from]
            for call, block in loss.blocks.items():
                record = records[call.layer]
                block = block if loss.scale is None else block * loss.scale.abs()  # a metric, also of a loss that is maximised
                record.block = block if record.block is None else record.block + block
        for record in records.values():
            _connect(record, records)
        return _recursion_order(records)

    def _on_layer(self, layer: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        node = output.grad_fn
        if node is None:
            return
        if node.name() == _COMPILED:
            raise _compiled(f"layer {self.names[layer]!r} runs")
        input = args[0] if args else kwargs["input"]
        call = LayerCall(layer, input.detach(), output=output.detach(), version=output._version)
        made_by = input.grad_fn
        if made_by is not None:
            call.inputs_from = links = self._links(call, input, made_by)
            if self.diagonal and len(links) == 1 and links[0].transfer is not None and links[0].transfer.curved:
                self._collect(links[0], "grad", made_by, input.output_nr)
        _metadata(node)[self._key] = call
        if self.grad_outputs:
            self._keep_gradient(node)

    def _on_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            _metadata(output.grad_fn)[self._key + ".model"] = ModelCall(*_detached((args, kwargs)))

    def _links(self, call: LayerCall, input: Tensor, made_by: Node) -> list[Link]:
        """Where the input of a layer's call comes from."""
        layer = call.layer
        nodes, passed = _source_nodes(made_by, self._key)
        if len(nodes) != 1:
            names = sorted({repr(self.names[_metadata(node)[self._key].layer]) for node in nodes[:4]})
            obstacle = f"is combined with other linear layers ({', '.join(names)}{', ...' if len(nodes) > 4 else ''})"
            return [self._blocked(node, layer, obstacle) for node in nodes]
        (node,) = nodes
        source: LayerCall = _metadata(node)[self._key]
        transfer: Transfer | None = activations.analytic(made_by, call.input, node, source.preactivation)
        if transfer is None:
            if _COMPILED in passed:
                raise _compiled(f"what follows layer {self.names[source.layer]!r} runs")
            signature = (source.layer, layer, tuple(passed))
            if signature not in self._not_elementwise:
                try:
                    with self.muted():
                        transfer = activations.probe(input, node, second=self.diagonal)
                except RuntimeError as error:
                    obstacle = f"goes through a function that autograd cannot differentiate twice ({error})"
                    return [self._blocked(node, layer, obstacle)]
            if transfer is None:
                self._not_elementwise.add(signature)  # probing it at every forward pass would cost more than the pass
                return [self._blocked(node, layer, f"goes through a function that is not elementwise ({', '.join(passed[:6])})")]
        self._use(node, layer)
        source.output = None
        return [Link(source, layer, transfer)]

    def _blocked(self, node: Node, consumer: nn.Linear, obstacle: str) -> Link:
        self._keep_gradient(node)
        return Link(self._use(node, consumer), consumer, None, obstacle)

    def _use(self, node: Node, consumer: nn.Module) -> LayerCall:
        call: LayerCall = _metadata(node)[self._key]
        if self._consumer.setdefault(call.layer, consumer) is not consumer:
            self._several_consumers.add(call.layer)
        if call.used or call.layer in self._several_consumers:
            self._keep_gradient(node)
        call.used = True
        return call

    def _keep_gradient(self, node: Node) -> None:
        call: LayerCall = _metadata(node)[self._key]
        if not call.keeps_gradient:
            call.keeps_gradient = True
            self._collect(call, "grad_output", node, 0)

    def _on_criterion(self, criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Tensor) -> None:
        made_by = loss.grad_fn if isinstance(loss, Tensor) else None
        if made_by is None:
            return
        nodes, passed = _source_nodes(made_by, self._key)
        if not nodes:
            return
        if _COMPILED in passed:
            raise _compiled("the criterion, or what comes before it, runs")
        if loss.dim() != 0:
            raise ValueError(
                f"expected the criterion {criterion} to return a scalar, got shape {tuple(loss.shape)}; "
                "use reduction='mean' or 'sum', or pass a function that reduces"
            )
        reduction = getattr(criterion, "reduction", kwargs.get("reduction", "mean"))
        call = LossCall([self._use(node, criterion) for node in nodes], None, loss.detach(), mean=reduction != "sum")
        instances = {source.input.shape[:-1].numel() for source in call.sources}
        if len(instances) == 1:
            (call.instances,) = instances
        if args and isinstance(args[0], Tensor) and args[0].grad_fn is not None:
            call.inputs = _metadata(args[0].grad_fn).get(self._key + ".model")
            if call.inputs is not None:
                call.args, call.kwargs = _detached((args[1:], kwargs))
                if len(nodes) == 1 and _is_view_of(args[0], nodes[0]):
                    call.output = args[0].detach()
        if self.columns is not None:
            with self.muted():
                call.blocks = self._blocks(*self.columns(criterion, loss, nodes[0] if len(nodes) == 1 else None, args, kwargs))
        elif len(nodes) == 1:
            output = args[0] if args else None
            width = call.sources[0].layer.out_features
            if isinstance(output, Tensor) and output.dim() > 0 and output.shape[-1] == width and _is_view_of(output, nodes[0]):
                call.hessian = analytic_hessian(criterion, output.detach(), *args[1:], **kwargs)
            if call.hessian is None:
                with self.muted():
                    call.hessian = autograd_hessian(loss, nodes[0])
        else:
            for node in nodes:
                self._keep_gradient(node)
        reference, output_nr = self._reference, loss.output_nr

        def backward(gradients: tuple[Tensor | None, ...]) -> None:
            tape, gradient = reference(), gradients[output_nr]
            if tape is not None and gradient is not None:
                tape._enter_run(call, _graphless(gradient))

        made_by.register_prehook(backward)

    def _blocks(self, edge: GradientEdge, root: OutputRoot) -> dict[LayerCall, Tensor]:
        """Sum over the columns of delta delta^T for every layer upstream of `edge`, in chunks of columns."""
        nodes, _ = _source_nodes(edge.node, self._key, nearest=False)
        calls: list[LayerCall] = [_metadata(node)[self._key] for node in nodes]
        instances = max((call.input.shape[:-1].numel() for call in calls), default=1)
        chunk = max(1, _COLUMN_BUDGET // max(1, sum(instances * call.layer.out_features for call in calls)))
        blocks: dict[LayerCall, Tensor] = {}
        for begin in range(0, root.count, chunk):
            columns = root.columns(begin, min(begin + chunk, root.count))
            deltas = torch.autograd.grad(
                [edge], [GradientEdge(node, 0) for node in nodes], [columns], retain_graph=True, is_grads_batched=True
            )
            for call, delta in zip(calls, deltas, strict=True):
                flat = delta.reshape(len(delta), delta.shape[1:-1].numel(), delta.shape[-1])
                chosen = sample(flat, self.samples)
                weight = flat.shape[1] / max(1, chosen.shape[1])  # as if they were all
                chosen = chosen.flatten(0, 1)
                blocks[call] = chosen.T @ chosen * weight + blocks.get(call, 0)
        return blocks

    def _enter_run(self, loss: LossCall, gradient: Tensor) -> None:
        """A backward pass has reached a loss: from here to its end, the gradients that it leaves are collected."""
        run = self._run
        if run is None or run.id != torch._C._current_graph_task_id():
            gradients = list(self._gradients())
            discarded = bool(self._losses) and all(g is None or not g.any() for g, _ in gradients)
            run = self._run = _Run(torch._C._current_graph_task_id(), gradients, discarded)
            torch.autograd.Variable._execution_engine.queue_callback(self._finish_run)
        run.losses.append(loss)
        run.events.append((loss, "scale", gradient))

    def _finish_run(self) -> None:
        run, self._run = self._run, None
        # torch.autograd.grad leaves the weights' gradients as they were: nothing that a step will use has come of it.
        if run is None or all(a is b and v == w for (a, v), (b, w) in zip(run.gradients, self._gradients(), strict=True)):
            return
        if run.discarded:
            self.clear()  # the gradients that earlier records belong to had been zeroed or set to None
        for record, name, gradient in run.events:
            before = getattr(record, name)
            setattr(record, name, gradient if before is None else before + gradient)
        self._losses += [loss for loss in dict.fromkeys(run.losses) if not loss.released and loss not in self._losses]

    def _gradients(self) -> Iterator[tuple[Tensor | None, int]]:
        """Every trainable weight's gradient, and its version."""
        for layer in self.names:
            weight, _ = parameters_of(layer)
            if weight is not None and weight.requires_grad:
                g = weight.grad
                yield g, 0 if g is None else g._version

    def _collect(self, record: LayerCall | Link, name: str, node: Node, output_nr: int) -> None:
        """Adds the gradient w.r.t. an output of `node` to an attribute of the record, in backward passes from a recorded loss."""
        reference = self._reference

        def hook(gradients: tuple[Tensor | None, ...]) -> None:
            tape = reference()
            run = tape._run if tape is not None else None
            gradient = gradients[output_nr]  # None where only another output of the node is in use
            if run is not None and gradient is not None and run.id == torch._C._current_graph_task_id():
                run.events.append((record, name, _graphless(gradient)))

        node.register_prehook(hook)

    @property
    def active(self) -> bool:
        """Whether calls are recorded."""
        return self.recording and not self._muted

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Layers that are called inside, as checkpointing does in autograd runs of the tape's own, are not recorded."""
        self._muted = True
        try:
            yield
        finally:
            self._muted = False


@dataclass(eq=False, slots=True)
class _Run:
    """One run of the autograd engine."""

    id: int
    gradients: list[tuple[Tensor | None, int]]  # of the weights when it reached the first loss, with their versions
    discarded: bool  # whether they were all None or zero, though there were earlier records
    losses: list[LossCall] = field(default_factory=list)
    events: list[tuple[Any, str, Tensor]] = field(default_factory=list)  # (record, attribute, gradient to add to it)


class _Hook:
    """A module hook that does not keep the tape alive, and is inert in copies of the module: those are another net's."""

    def __init__(self, tape: Tape | None, method: str):
        self.tape = None if tape is None else weakref.ref(tape)
        self.method = method
        self.function: Callable[..., None] = getattr(Tape, method)

    def __call__(self, module: nn.Module, *args: Any) -> None:
        if not torch.is_grad_enabled() or (self.method != "_on_criterion" and not module.training):
            return
        tape = None if self.tape is None else self.tape()
        if tape is not None and tape.active:
            (self._disabled if _compiling() else self.function)(tape, module, *args)

    @torch.compiler.disable
    def _disabled(self, tape: Tape, module: nn.Module, *args: Any) -> None:
        self.function(tape, module, *args)

    def __reduce__(self) -> tuple[type, tuple[None, str]]:  # also what copy.deepcopy goes by
        return _Hook, (None, self.method)


class _Eager:
    """A module's forward, which torch.compile leaves alone in training mode: a compiled graph does not say what it computes.

    In eval mode and without gradients it is compiled as ever.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _compiling() and self.module.training and torch.is_grad_enabled():
            return self._eagerly(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    @torch.compiler.disable
    def _eagerly(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)


class _EagerHandle:
    """Puts an `_Eager` on a module, and takes it off."""

    def __init__(self, module: nn.Module):
        self.module = weakref.ref(module)
        if "forward" not in vars(module):
            module.forward = _Eager(module)

    def remove(self) -> None:
        module = self.module()
        if module is not None and isinstance(vars(module).get("forward"), _Eager):
            del module.forward


def _compiled(what: str) -> RuntimeError:
    """A compiled graph has no second derivatives, and gives none without a word."""
    return RuntimeError(
        f"{what} inside a compiled graph, which does not say what it computes; call the model that the optimizer was made for, "
        "rather than a compiled part of it"
    )


def _detached(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def parameters_of(layer: nn.Linear) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weight and bias; as attributes of a module they take ten times as long."""
    return layer._parameters["weight"], layer._parameters["bias"]  # type: ignore[return-value]


def _metadata(node: Node) -> dict[str, Any]:
    return node.metadata  # type: ignore[return-value]  # torch's stub takes the attribute for a method


def _source_nodes(start: Node, key: str, nearest: bool = True) -> tuple[list[Node], list[str]]:
    """The nearest autograd nodes upstream of (or at) `start` that are outputs of recorded linear layers, or all of them.

    And the names of the nodes passed on the way to them.
    """
    found, names, seen, stack = [], [], {start}, [start]
    while stack:
        node = stack.pop()
        if key in _metadata(node):
            found.append(node)
            if nearest:
                continue
        names.append(node.name())
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return found, names


def _graphless(gradient: Tensor) -> Tensor:
    """Detached, but free where it is already."""
    return gradient.detach() if gradient.requires_grad else gradient


def _for_all(gradient: Tensor, samples: int | None) -> Tensor:
    """The `sample` of a gradient [..., n], so scaled that its sum stands for the sum over all instances."""
    if samples is None:
        return gradient
    chosen = rows([gradient], samples)
    factor = gradient.numel() / chosen.numel() if chosen.numel() else 1.0
    return chosen if factor == 1 else chosen * factor


# The last is DistributedDataParallel's, around the output.
_RESHAPING = {
    "ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward", "SqueezeBackward", "UnsqueezeBackward", "_DDPSinkBackward",
}  # fmt: skip


def _is_view_of(output: Tensor, source: Node) -> bool:
    """Whether `output` is the tensor of `source`, at most reshaped."""
    node = output.grad_fn
    while node is not None and node is not source and node.name().rstrip("0123456789") in _RESHAPING:
        node = node.next_functions[0][0]
    return node is source


def _connect(record: LayerRecord, records: dict[nn.Linear, LayerRecord]) -> None:
    """Sets what follows a record, from the consumers of its calls."""
    consumers = record.consumers
    links = [c for c in consumers if isinstance(c, Link)]
    if not links:
        record.losses = [c for c in consumers if isinstance(c, LossCall)]
        # Several losses of one output add up, and so do their Hessians.
        if any(loss.hessian is None for loss in record.losses):
            record.losses, record.obstacle = [], "enters the criterion together with other linear layers' outputs"
    elif len(consumers) > len(record.calls) or len(links) < len(consumers) or len({link.target for link in links}) > 1:
        record.obstacle = "is used in several places"
    elif any(link.transfer is None for link in links):
        record.obstacle = next(link.obstacle for link in links if link.transfer is None)
    else:
        record.next, record.links = records[links[0].target], links


def _recursion_order(records: dict[nn.Linear, LayerRecord]) -> list[LayerRecord]:
    ordered: dict[LayerRecord, None] = {}
    for record in records.values():
        chain = []
        current: LayerRecord | None = record
        while current is not None and current not in ordered:
            chain.append(current)
            current = current.next
        for each in reversed(chain):
            ordered[each] = None
    return list(ordered)
