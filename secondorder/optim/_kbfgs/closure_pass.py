"""One call of a closure for K-BFGS: hooks record what it leaves behind at every linear layer that its loss depends on."""

from collections import Counter
from collections.abc import Callable, Container, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from secondorder._distributed import RankReducer, RankTerm
from secondorder._tape import Marks, in_recomputation, keeps_rows
from secondorder._tensors import compute_dtype, flatten_batch, refuse_sparse
from secondorder.criteria.known import LateMasses, by_position
from secondorder.optim._closure import replaced_backward, torchs_backward
from secondorder.optim._kbfgs.layer_pass import Call, LayerPass, layer_input, weigh


class ClosurePass:
    """Records what one call of the closure leaves behind at each linear layer that its loss depends on.

    The hook on a layer adds a zero to its output, the anchor, whose gradient is dL/dz. A call of the layer is recorded once its
    anchor accumulates that gradient, so that neither forward passes without a backward pass count nor torch.autograd.grad.
    Several backward passes, and several calls of a layer, add up to the union of their batches.

    Attributes:
        layers: what the call has left behind at each layer that a backward pass has reached.

    Args:
        names: of the layers to record, for messages.
        tied: layers that are recorded as one of these.
        sign: 1, or -1 if the loss is maximised.
        parameters: whether backward() computes the gradients of parameters, too.
        lend: called after every backward pass that computes none of parameters.
        criterion: its targets have weights, 0 if they are ignored. A layer whose rows belong to the targets counts them by these
            weights. None: all rows count alike.
    """

    def __init__(
        self, names: Mapping[nn.Linear, str], tied: Mapping[nn.Linear, nn.Linear], sign: float = 1.0, parameters: bool = True,
        lend: Callable[[], None] = lambda: None, criterion: nn.Module | None = None,
    ):  # fmt: skip
        self.names, self._tied = names, tied
        self.sign = sign
        self._parameters, self._lend, self.criterion = parameters, lend, criterion
        self.layers: dict[nn.Linear, LayerPass] = {}
        self._multiplied: set[Tensor] = set()  # parameters in products between the layers' calls and the loss
        # Of the criterion's calls whose targets may have weights, None where its rows are in another order, and the loss's nodes.
        self._masses: list[tuple[LateMasses | None, Node]] = []
        self._outputs = Marks(f"secondorder.pass.{id(self)}")  # the calls at their outputs' autograd nodes
        self._handles: list[Any] = []
        self._anchors: list[Tensor] = []
        self._calls = 0

    def again(self, parameters: bool, lend: Callable[[], None]) -> "ClosurePass":
        """Returns one that records another call of the same closure."""
        return ClosurePass(self.names, self._tied, self.sign, parameters, lend, self.criterion)

    def __enter__(self) -> "ClosurePass":
        layers = [*self.names, *self._tied]
        self._handles = [layer.register_forward_hook(self._record_call, with_kwargs=True) for layer in layers]
        if self.criterion is not None:
            self._handles.append(self.criterion.register_forward_hook(self._record_targets, with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._anchors.clear()

    def run(self, closure: Callable[[], Tensor], name: str) -> Tensor:
        """Calls the closure with gradients enabled and returns the loss, detached."""
        with torch.enable_grad(), nullcontext() if self._parameters else replaced_backward(self._backward_to_anchors):
            try:
                loss = closure()
            except (AttributeError, TypeError) as error:
                if self._parameters or "NoneType" not in str(error):
                    raise
                raise RuntimeError(
                    f"{name}.step(): the closure failed in its second call: {error}. Where it reads x.grad of an input: "
                    "backward() computes none in this call. Take it by torch.autograd.grad(loss, x)"
                ) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise RuntimeError(f"{name}.step(): expected the closure to return the scalar loss, got {type(loss).__name__}")
        self._weigh_rows()
        self._multiplied = self._multiplied_before(loss.grad_fn)
        return loss.detach()

    @property
    def multiplied(self) -> set[Tensor]:
        """Returns the parameters that the loss has multiplied with outside of these layers' calls."""
        return self._multiplied.union(*(call.multiplied for layer in self.layers.values() for call in layer.calls))

    def average(self, ranks: RankReducer, loss: float, inputs: Container[nn.Linear] = ()) -> float:
        """Makes all means and gradients those over all ranks; returns the mean loss.

        Args:
            ranks: all of them.
            loss: of this one.
            inputs: the layers of whose inputs the means are wanted, too.
        """

        def terms() -> list[RankTerm]:
            found = [RankTerm("loss", torch.tensor(loss, dtype=torch.float64, device=ranks.device))]
            for layer, own in self.layers.items():
                found += own.terms(self.names[layer], layer in inputs)
            return found

        mean_loss, *rest = ranks.average(terms)
        averages = iter(rest)
        for layer, own in self.layers.items():
            own.take(averages, ranks.size, layer in inputs)
        return float(mean_loss)

    def _record_call(self, module: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """Adds an anchor to the output of a layer's call: a forward hook."""
        if not torch.is_grad_enabled() or torch._C._functorch.maybe_current_level() is not None:
            return  # of other tensors than the loss's
        layer, input = self._tied.get(module, module), args[0] if args else kwargs["input"]
        refuse_sparse(self.names[layer], input)
        anchor = output.new_zeros(()).expand(output.shape).requires_grad_()
        if in_recomputation(f"layer {self.names[layer]!r}"):
            output.add_(anchor)  # so that what follows a frozen layer saves as many tensors as at first
            return
        before = self._multiplied_before(input.grad_fn)
        mean = flatten_batch([output.detach()]).mean(0, dtype=compute_dtype(layer.weight.dtype))
        call = Call(self._calls, output.shape[:-1], layer, layer_input(module, args, kwargs), mean, before)
        self._calls += 1

        def arrived(anchor: Tensor) -> None:
            gradient, anchor.grad = anchor.grad, None
            assert gradient is not None
            self.layers.setdefault(layer, LayerPass(layer, self.sign)).add(call, gradient.detach())

        anchor.register_post_accumulate_grad_hook(arrived)
        self._anchors.append(anchor)
        if self._parameters and output.grad_fn is not None:
            self._outputs.claim_weight(output.grad_fn)
        output.add_(anchor)
        if output.grad_fn is not None:
            self._outputs.add(output.grad_fn, call)

    def _multiplied_before(self, end: Node | None) -> set[Tensor]:
        """Returns the parameters in products between a node's output and the calls of layers that it depends on."""
        return self._outputs.before(end)[2] if self._parameters and end is not None else set()

    def _record_targets(self, criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Any) -> None:
        """Notes the weights of the targets of a criterion's call: a forward hook."""
        if in_recomputation("the criterion"):
            return
        if torch.is_grad_enabled() and isinstance(loss, Tensor) and loss.grad_fn is not None:
            args, kwargs = by_position(criterion, args, kwargs)
            masses = LateMasses(criterion, (None, *args[1:]), kwargs)
            if masses.possible:
                self._masses.append((masses if keeps_rows(args[0]) else None, loss.grad_fn))

    def _weigh_rows(self) -> None:
        """Has the rows of the layers' calls count by the weights of the targets, but for calls that several losses depend on."""
        found = [None if masses is None else masses() for masses, _ in self._masses]
        if any(masses is not None for masses in found):
            calls: list[list[Call]] = [list(map(self._outputs.at, self._outputs.upstream(loss))) for _, loss in self._masses]
            losses = Counter(call for own in calls for call in own)
            for masses, own in zip(found, calls, strict=True):
                if masses is not None:
                    weigh([call for call in own if losses[call] == 1], masses)
        self._masses.clear()

    def _backward_to_anchors(
        self, tensors: Any, grad_tensors: Any = None, retain_graph: bool | None = None, create_graph: bool = False,
        grad_variables: Any = None, inputs: Any = None,
    ) -> None:  # fmt: skip
        """Calls torch.autograd.backward, but for the anchors alone."""
        if self._anchors:
            torchs_backward(tensors, grad_tensors, retain_graph, create_graph, grad_variables, inputs=self._anchors)
        self._lend()
