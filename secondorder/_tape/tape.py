"""The tape: a forward hook on every linear layer and on the criterion, and what they find in the autograd graph.

A forward hook on every linear layer of the model makes a `LayerCall` and ties it to the autograd node of the layer's output;
from the graph it also reads which call made its input, and through which function. A forward hook on the criterion makes a
`LossCall` likewise. So the chain of layers is known whatever the model's `forward` looks like, and a record lives exactly as
long as its graph: a forward pass without a backward one leaves nothing behind.

Nothing is recorded in eval mode, without grad mode, or while `recording` is off.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from secondorder._layers import parameters_of, tied_layers
from secondorder._tape import elementwise
from secondorder._tape.backward import BackwardLog
from secondorder._tape.backward_roots import term_of_its_own
from secondorder._tape.columns import column_blocks
from secondorder._tape.criterion_calls import Divisors, criterion_arguments, detached, mark_outputs, rows_seen
from secondorder._tape.elementwise import ElementwiseMap
from secondorder._tape.forward_state import ForwardState
from secondorder._tape.graph import compiled_error, compiled_parameters, in_recomputation, is_reshaping, is_view_of
from secondorder._tape.hooks import CallHook, EagerForward, remove_handles
from secondorder._tape.layers import LayerRecord, joined
from secondorder._tape.nodes import COMPILED, kind
from secondorder._tape.options import TapeOptions
from secondorder._tape.outputs import LayerOutputs
from secondorder._tape.records import LayerCall, Link, LossCall, ModelCall, version
from secondorder._tape.ways import keeps_rows, logits_of
from secondorder._tensors import captured_now, refuse_capture, refuse_sparse
from secondorder.criteria import OutputHessian, analytic_hessian, autograd_hessian
from secondorder.criteria.known import LOG_SOFTMAX, LateMasses, by_position, divides_by_masses, link_of

_NOT_CALLED = "the criterion has not been called since the last step or zero_grad()"


class Tape:
    """Records the calls of `layers` and of `criterion`.

    Args:
        layers: the linear layers, with their names for messages.
        criterion: a module whose calls return the scalar loss.
        options: what to keep.
        model: the module that the layers are part of. torch.compile leaves its forward, and the criterion's, alone in training
            mode. A layer of it that shares the parameters of one of `layers` is recorded as that one.

    Attributes:
        names: the layers, with their names.
        recording: whether calls are recorded; may be switched at any time.
        tied: the layers that are recorded as another one, with that one.
        missing: why there are no records, if there are none.
    """

    def __init__(self, layers: dict[nn.Linear, str], criterion: nn.Module, options: TapeOptions, model: nn.Module | None = None):
        self.names = layers
        self.criterion = criterion
        self.options = options
        self._output_hessian = options.output_hessian or (lambda criterion, loss, source, *_: autograd_hessian(loss, source))
        self._wide = {layer for layer in layers if options.widest is not None and layer.out_features > options.widest}
        self.recording = True
        self.missing = _NOT_CALLED
        key = f"secondorder.{id(self)}"  # of what is recorded in the metadata of autograd nodes
        self._muted = False
        self.divisors = Divisors(criterion)
        self._parameters = list((nn.ModuleList(layers) if model is None else model).parameters())
        watches = model is not None and options.keep_inputs
        self._watched = self._parameters if watches else []
        self._log = BackwardLog(layers, (key + ".loss", self._watched) if watches else None)
        self._begin: ForwardState | None = None  # of the forward pass under way
        self._written: set[Tensor] | None = None  # the buffers that forward passes write to
        self._outputs = LayerOutputs(key, self._log)
        self._not_elementwise: set[tuple[nn.Linear, nn.Linear, tuple[str, ...]]] = set()
        self.tied = {} if model is None else tied_layers(model, layers)
        self.handles: list[RemovableHandle | CallHook | EagerForward] = [
            CallHook(layer, self, "_on_layer") for layer in [*layers, *self.tied]
        ]
        self.handles.append(CallHook(criterion, self, "_on_criterion", always=True))
        if model is not None:
            model_calls = EagerForward(model, self, "_before_model", "_on_model") if options.keep_inputs else EagerForward(model)
            self.handles += [model_calls, EagerForward(criterion), *self._log.handles]
        weakref.finalize(self, remove_handles, self.handles)

    def remove(self) -> None:
        """Takes all hooks off the modules."""
        remove_handles(self.handles)

    def clear(self, release: bool = False) -> None:
        """Forgets every backward pass so far; with `release` also the forward passes that they went through.

        A graph that somebody still holds (by its loss, say) then keeps none of the tape's tensors alive.
        """
        self._log.clear(release)
        if release:
            self.divisors.release()
        self.missing = _NOT_CALLED

    def rescaled(self, factor: float) -> AbstractContextManager[None]:
        """Makes the records within it as if backward() had been called on `factor` times its tensor."""
        return self._log.rescaled(factor)

    @property
    def losses(self) -> list[LossCall]:
        """Returns the criterion's calls that a backward pass has gone through since the last `clear`."""
        return self._log.losses

    @property
    def covers_none(self) -> bool:
        """Tells whether all layers are frozen or too wide."""
        return not any(parameters_of(layer)[0].requires_grad and layer not in self._wide for layer in self.names)

    @property
    def multiplied(self) -> set[Tensor]:
        """Returns the parameters that these losses multiply with outside of layers' calls, as by F.linear(h, layer.weight)."""
        found: set[Tensor] = set()
        for loss in self.losses:
            found.update(loss.multiplied, *(call.multiplied for call in loss.calls()))
        return found

    @property
    def outside(self) -> str | None:
        """Returns what else than recorded losses backward passes came from since `clear`, with `keep_inputs`; None: nothing."""
        return self._log.outside

    @property
    def active(self) -> bool:
        """Tells whether calls are recorded."""
        return self.recording and not self._muted

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Leaves calls within it unrecorded, such as those that checkpointing makes in the tape's own autograd runs."""
        self._muted = True
        try:
            yield
        finally:
            self._muted = False

    @contextmanager
    def _differentiating(self) -> Iterator[None]:
        """Mutes the tape in autograd runs of its own, and keeps p.grad: they may reach a function that calls backward() itself.

        Within a checkpoint of the user's what they save is not to be counted.
        """
        before = [(p, p.grad) for p in self._parameters]
        for p, _ in before:
            p.grad = None
        # torch.func's transforms have no hooks.
        enabled = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is None
        # Detached, since a node that keeps a tensor which it has made itself would never be freed.
        try:
            with self.muted(), saved_tensors_hooks(Tensor.detach, lambda t: t) if enabled else nullcontext():
                yield
        finally:
            for p, gradient in before:
                p.grad = gradient

    def records(self) -> list[LayerRecord]:
        """Returns the layers that the losses depend on, each after the layer that takes its output: the recursion's order.

        Raises:
            RuntimeError: a layer's input has been written to since the forward pass.
        """
        return joined(self.losses, self.names, self._wide, self.options.samples)

    def _on_layer(self, layer: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """Records a call of a layer, with the links from the layers before."""
        node, layer = output.grad_fn, self.tied.get(layer, layer)
        if node is None or in_recomputation(f"layer {self.names[layer]!r}"):
            return
        if kind(node) == COMPILED:
            raise compiled_error(f"layer {self.names[layer]!r} runs")
        input = args[0] if args else kwargs["input"]
        refuse_sparse(self.names[layer], input)
        given = input.grad_fn is None and not isinstance(input, nn.Parameter)
        call = LayerCall(layer, input.detach(), version(input), given, output=output.detach(), output_version=output._version)
        made_by = input.grad_fn
        if made_by is not None:
            call.inputs_from = links = self._links(call, input, made_by)
            if self.options.diagonal and len(links) == 1 and links[0].map is not None and links[0].map.curved:
                self._log.collect(links[0], "grad", made_by, input.output_nr)
        self._outputs.add(node, call)
        self._outputs.claim_weight(node)
        if self.options.grad_outputs:
            self._outputs.keep_gradient(node)

    def _before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: None) -> None:
        self._begin = ForwardState(model, self._written)

    def _on_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Records a call of the model, so that it can be made again."""
        begin, self._begin = self._begin, None
        if begin is None:
            return
        self._written = (self._written or set()) | begin.written()
        leaves = tree_leaves(output)
        mark_outputs(ModelCall(detached(args), detached(kwargs), begin, detached(leaves)), leaves, self._outputs.key)

    def _links(self, call: LayerCall, input: Tensor, made_by: Node) -> list[Link]:
        """Returns the links from the layers that the input of a layer's call comes from."""
        layer = call.layer
        nodes, passed, call.multiplied = self._outputs.before(made_by)
        self._refuse_compiled_layers(made_by, passed)
        if len(nodes) != 1:
            names = sorted({repr(self.names[self._outputs.call_at(node).layer]) for node in nodes[:4]})
            obstacle = f"is combined with other linear layers ({', '.join(names)}{', ...' if len(nodes) > 4 else ''})"
            return [self._blocked(node, layer, obstacle) for node in nodes]
        (node,) = nodes
        if layer in self._wide:
            return [self._blocked(node, layer, f"leads to layer {self.names[layer]!r}, which is too wide for a curvature")]
        source = self._outputs.call_at(node)
        between: ElementwiseMap | str | None = elementwise.analytic(made_by, call.input, node, source.preactivation)
        if between is None and not self.options.recursive:
            return [Link(self._outputs.use(node, layer), layer, None, "goes through a function that nobody has asked for")]
        if between is None:
            between = self._probed(source, layer, input, node, passed)
        if isinstance(between, str):
            return [self._blocked(node, layer, between)]
        self._outputs.use(node, layer)
        source.output = None
        return [Link(source, layer, between)]

    def _probed(self, source: LayerCall, target: nn.Linear, input: Tensor, node: Node, passed: list[str]) -> ElementwiseMap | str:
        """Returns what lies between a call and the input of the layer after it, by autograd; or why that is no elementwise map.

        Args:
            source: the call, whose node is `node`.
            target: the layer after it.
            input: what it is called on.
            node: of the call's output.
            passed: the kinds of the nodes between.
        """
        if COMPILED in passed:
            raise compiled_error(f"what follows layer {self.names[source.layer]!r} runs")
        not_elementwise = f"goes through a function that is not elementwise ({', '.join(passed[:6])})"
        signature = (source.layer, target, tuple(passed))
        if signature in self._not_elementwise:  # probing it at every forward pass would cost more than the pass
            return not_elementwise
        refuse_capture(f"derivatives by autograd of what follows layer {self.names[source.layer]!r} ({', '.join(passed[:6])})")
        try:
            with self._differentiating():
                found = elementwise.probe(input, node, second=self.options.diagonal)
        except RuntimeError as error:
            return f"goes through a function that autograd cannot differentiate twice ({error})"
        if found is None:
            self._not_elementwise.add(signature)
        return found or not_elementwise

    def _refuse_compiled_layers(self, start: Node, passed: list[str]) -> None:
        """Raises if a compiled graph among the nodes passed from `start` has called a layer, whose hook then did not run."""
        if COMPILED in passed:
            parameters = compiled_parameters(start, self._outputs.key)
            for layer, name in self.names.items():
                if parameters_of(layer)[0] in parameters:
                    raise compiled_error(f"layer {name!r} runs")

    def _blocked(self, node: Node, consumer: nn.Linear, obstacle: str) -> Link:
        self._outputs.keep_gradient(node)
        return Link(self._outputs.use(node, consumer), consumer, None, obstacle)

    def _on_criterion(self, criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Tensor) -> None:
        """Records a call of the criterion: the layers that it sees, its weights of targets, and its curvature."""
        if in_recomputation("the criterion"):
            return
        made_by = loss.grad_fn if isinstance(loss, Tensor) else None
        if made_by is None:
            found = "a tensor without a graph" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            self.missing = f"the criterion returned {found} where the loss alone is expected"
            return
        nodes, passed, multiplied = self._outputs.before(made_by)
        self._refuse_compiled_layers(made_by, passed)
        if not nodes:
            self.missing = "the criterion was called, but not on what linear layers returned in training mode" + _hidden_by(
                passed
            )
            return
        if COMPILED in passed:
            raise compiled_error("the criterion, or what comes before it, runs")
        if loss.dim() != 0:
            raise ValueError(
                f"expected the criterion {criterion} to return a scalar, got shape {tuple(loss.shape)}; "
                "use reduction='mean' or 'sum', or pass a function that reduces"
            )
        args, kwargs = by_position(criterion, args, kwargs)
        sources = [self._outputs.use(node, criterion) for node in nodes]
        call = LossCall(sources, None, loss.detach(), self.divisors.of(args, kwargs, made_by, self.muted))
        call.multiplied = multiplied
        call.instances, call.captured = rows_seen(call.sources, args), captured_now()
        if len(args) > 1:
            self._record_masses(call, args, kwargs)
        if self.options.keep_inputs:
            own = term_of_its_own(loss, (args, kwargs), self._watched)
            call.outside = own and f"parameters that the criterion takes by itself (by {own})"
            with self._differentiating():
                call.arguments = criterion_arguments(args, kwargs, nodes, self._outputs)
        self._record_curvature(call, nodes, loss, (*args[:1], *tree_map(self._fixed, args[1:])), kwargs)
        self.missing = (
            "the criterion was called, but no backward() has gone through what it returned: gradients that are set by hand, as "
            "from torch.autograd.grad, do not say of which loss they are"
        )
        self._find_repeats(call, made_by)
        self._log.watch_loss(call, made_by, loss.output_nr)

    def _record_masses(self, call: LossCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Records what the elements of the criterion's target weigh, if they do not all count alike."""
        masses = LateMasses(self.criterion, (None, *detached(args[1:])), detached(kwargs))
        call.assumed = masses.assumed
        if masses.possible:
            call.masses, call.normalized = masses, divides_by_masses(self.criterion, args)
            call.ordered = keeps_rows(args[0])

    def _fixed(self, target: Any) -> Any:
        """Detaches a target that no recorded layer has made, as one that another net has made: it is fixed as far as these go."""
        if not isinstance(target, Tensor) or (target.grad_fn is not None and self._outputs.before(target.grad_fn)[0]):
            return target
        return target.detach()

    def _record_curvature(
        self, call: LossCall, nodes: list[Node], loss: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Takes the columns back to every layer, or the Hessian at the last layer's output, where the recursion starts."""
        if self.options.columns is not None:
            with self._differentiating():
                edge, root = self.options.columns(self.criterion, loss, nodes[0] if len(nodes) == 1 else None, args, kwargs)
                if root is not None:
                    call.blocks = column_blocks(edge, root, self._outputs, self.options.samples, call.counting, self._wide)
            call.flat = root is None
            if call.flat:
                assert loss.grad_fn is not None
                for node in self._outputs.upstream(loss.grad_fn):
                    self._outputs.keep_gradient(node)
        elif len(nodes) > 1:  # the recursion starts anew at each of them
            for node in nodes:
                self._outputs.keep_gradient(node)
        elif self.options.recursive and call.sources[0].layer not in self._wide:
            call.hessian = self._hessian(loss, nodes[0], call.sources[0].layer.out_features, args, kwargs)
            call.flat = call.hessian is None
            if call.flat:
                self._outputs.keep_gradient(nodes[0])

    def _hessian(
        self, loss: Tensor, node: Node, width: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> OutputHessian | None:
        """Returns the criterion's Hessian at a layer's output, by formula if there is one; None: it is zero.

        Args:
            loss: what the criterion returned.
            node: of the layer's output.
            width: how many outputs the layer has.
            args: of the criterion.
            kwargs: of the criterion.
        """
        output: Any = args[0] if args else None
        fits = isinstance(output, Tensor) and output.dim() > 0 and output.shape[-1] == width
        if fits and is_view_of(self._logits_node(output), node):
            known = analytic_hessian(self.criterion, output.detach(), *args[1:], **kwargs)
            if known is not None:
                return known
        refuse_capture(f"Hessian of {self.criterion} by autograd")
        with self._differentiating():
            hessian = self._output_hessian(self.criterion, loss, node, args, kwargs)
        return hessian if hessian.values.any() else None

    def _logits_node(self, output: Tensor) -> Node | None:
        """Returns the node of what the criterion's formula is at: its argument, or what log_softmax was taken of there."""
        if link_of(self.criterion) != LOG_SOFTMAX:
            return output.grad_fn
        edge = logits_of(output, -1, is_reshaping)
        return None if edge is None else edge.node

    def _find_repeats(self, loss: LossCall, made_by: Node) -> None:
        """Finds the layers that a loss uses several times: the recursion starts anew there, and at the layers that lead there."""
        calls = loss.calls()
        loss.repeated = {layer for layer, count in Counter(call.layer for call in calls).items() if count > 1}
        if not loss.repeated or self.options.columns is not None:
            return
        kept = {call for call in calls if call.layer in loss.repeated}
        for link in [link for call in kept for link in call.inputs_from]:
            kept.add(link.source)
            if link.map is not None:
                link.map = None
                link.obstacle = f"leads to layer {self.names[link.target]!r}, which is used several times for a loss"
        self._outputs.keep_gradients_of(kept, made_by)


def _hidden_by(kinds: list[str]) -> str:
    """Returns what to say of a torch.autograd.Function among these nodes, which may call layers out of the graph's sight."""
    own = next((each for each in kinds if each.endswith("()")), None)
    if own is None:
        return ""
    name = own.removesuffix("Backward()")
    return f" ({name}, a torch.autograd.Function, does not show the layers that it calls: do without it, or take EigenAdam)"
