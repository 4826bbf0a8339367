"""Closures that a step calls more than once: what a call leaves behind at the layers, and calls without parameter gradients."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from secondorder._distributed import RankReducer, RankTerm
from secondorder._tensors import compute_dtype, flatten_batch
from secondorder.solvers import second_moment


class ClosurePass:
    """What one call of the closure leaves behind at each linear layer that its loss depends on.

    Recorded when the gradient arrives, so that forward passes without a backward one do not count; several passes add
    up to the union of their batches.

    Args:
        layers: the layers to record.
        sign: 1, or -1 where the loss is maximised.
        anchored: gives a layer's output, where it needs no gradient, a zero to depend on that does.
    """

    def __init__(self, layers: list[nn.Linear], sign: float = 1.0, anchored: bool = False):
        self._layers = layers
        self.sign = sign
        self._anchored = anchored
        self._handles: list[Any] = []
        self._order: list[nn.Linear] = []
        self._inputs: dict[nn.Linear, list[Tensor]] = {}
        self._mean_inputs: dict[nn.Linear, Tensor] = {}
        self._preactivations: dict[nn.Linear, list[tuple[Tensor, int]]] = {}
        # Over all ranks, once they are averaged.
        self._mean_preactivations: dict[nn.Linear, Tensor] = {}
        self._second_moments: dict[nn.Linear, Tensor] = {}
        # [n_out], summed over the instances, of sign times the loss: for a mean loss it is a mean.
        self.gradient: dict[nn.Linear, Tensor] = {}

    def __enter__(self) -> "ClosurePass":
        self._handles = [layer.register_forward_hook(self._forward, with_kwargs=True) for layer in self._layers]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def run(self, closure: Callable[[], Tensor], name: str) -> Tensor:
        """Calls the closure with gradients enabled and returns the loss, detached."""
        with torch.enable_grad():
            loss = closure()
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise RuntimeError(f"{name}.step(): expected the closure to return the scalar loss, got {type(loss).__name__}")
        return loss.detach()

    def input(self, layer: nn.Linear) -> Tensor:
        """The instances' h [m, n_in]."""
        return flatten_batch(self._inputs[layer])

    def mean_input(self, layer: nn.Linear) -> Tensor:
        """E[h] [n_in]."""
        if layer not in self._mean_inputs:
            self._mean_inputs[layer] = self.input(layer).mean(0)
        return self._mean_inputs[layer]

    def second_moment(self, layer: nn.Linear, average: Tensor | None = None, decay: float = 0.0) -> Tensor:
        """A <- decay A + (1 - decay) E[h h^T], in place where A is given (`average`)."""
        if layer not in self._second_moments:
            return layer_second_moment(layer, self.input(layer), self.mean_input(layer), average, decay)
        moment = self._second_moments[layer]
        return moment if average is None else average.lerp_(moment, 1 - decay)

    def mean_preactivation(self, layer: nn.Linear) -> Tensor:
        """E[z] [n_out]."""
        if layer in self._mean_preactivations:
            return self._mean_preactivations[layer]
        total = sum(count for _, count in self._preactivations[layer])
        return torch.stack([mean * (count / total) for mean, count in self._preactivations[layer]]).sum(0)

    def average(self, ranks: RankReducer, names: dict[nn.Linear, str], loss: float, inputs: bool = False) -> float:
        """Makes all means, those of the inputs if asked for, and the gradients those over all ranks; returns the mean loss."""
        stores = [(self._mean_preactivations, self.mean_preactivation)]
        if inputs:
            stores += [(self._mean_inputs, self.mean_input), (self._second_moments, self.second_moment)]

        def terms() -> list[RankTerm]:
            found = [RankTerm("loss", torch.tensor(loss, dtype=torch.float64, device=ranks.device))]
            for layer, gradient in self.gradient.items():
                found.append(RankTerm(names[layer], gradient))
                found += [RankTerm(names[layer], mean(layer), len(self.input(layer))) for _, mean in stores]
            return found

        mean_loss, *rest = ranks.average(terms)
        values = iter(rest)
        for layer in self.gradient:
            self.gradient[layer] = next(values)
            for store, _ in stores:
                store[layer] = next(values)
        return float(mean_loss)

    def same_data(self, first: "ClosurePass") -> Tensor | bool:
        """Whether the first layer's input, on which no covered weight acts, is that of `first`."""
        layer = next(layer for layer in first._order if layer in first._inputs)
        if layer in self._inputs:
            new, old = self.mean_input(layer), first.input(layer).mean(0)
            # Equal but for the rounding of whatever comes before that layer.
            if len(self.input(layer)) == len(first.input(layer)):
                return (new - old).norm() <= 1e-3 * old.norm()
        return False

    @staticmethod
    def check_same_data(same: bool, name: str) -> None:
        """Raises RuntimeError where the data is not the same."""
        if same:
            return
        raise RuntimeError(
            f"{name}.step(): expected the closure to evaluate the same mini-batch at every call, but the first layer's "
            "input has changed. Draw the batch outside of the closure. No parameter and no state has changed."
        )

    def _forward(self, layer: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        input = layer_input(layer, args, kwargs)
        dtype = compute_dtype(layer.weight.dtype)
        mean = flatten_batch([output.detach()]).mean(0, dtype=dtype)
        if self._anchored and not output.requires_grad:
            output.add_(torch.zeros(layer.out_features, dtype=output.dtype, device=output.device, requires_grad=True))

        def backward(gradient: Tensor) -> None:
            self._inputs.setdefault(layer, []).append(input)
            self._preactivations.setdefault(layer, []).append((mean, len(input)))
            total = self.sign * flatten_batch([gradient]).sum(0, dtype=dtype)
            self.gradient[layer] = self.gradient[layer] + total if layer in self.gradient else total

        if output.requires_grad:
            if layer not in self._order:
                self._order.append(layer)
            output.register_hook(backward)


def layer_input(layer: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The h [m, n_in] of a call, in the state's dtype."""
    h: Tensor = args[0] if args else kwargs["input"]
    return flatten_batch([h.detach()]).to(compute_dtype(layer.weight.dtype))


def layer_second_moment(layer: nn.Linear, h: Tensor, mean: Tensor, average: Tensor | None = None, decay: float = 0.0) -> Tensor:
    """A <- decay A + (1 - decay) E[h h^T], in place where A is given (`average`); with a bias h ends in a 1."""
    n, moment = layer.in_features, second_moment(h)
    if average is None:
        size = n + (layer.bias is not None and layer.bias.requires_grad)
        average = h.new_zeros(size, size)
    average[:n, :n].lerp_(moment, 1 - decay)
    if len(average) > n:
        for border, value in ((average[n, :n], mean), (average[:n, n], mean), (average[n, n], mean.new_ones(()))):
            border.lerp_(value, 1 - decay)
    return average


@contextmanager
def without_parameter_gradients(model: nn.Module, ddp: DistributedDataParallel | None) -> Iterator[None]:
    """Backward passes inside compute no gradient of any parameter, and leave those of before in p.grad."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
        p.requires_grad_(False)
    try:
        with nullcontext() if ddp is None else ddp.no_sync():
            yield
    finally:
        for p, gradient in zip(parameters, gradients, strict=True):
            p.requires_grad_(True)
            p.grad = gradient


_IDLE = threading.local()
_IDLE_LOCK = threading.Lock()
_idle_steps = 0  # over all threads
_backward: Any = torch.autograd.backward


def _backward_unless_idle(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
    if not getattr(_IDLE, "depth", 0):
        _backward(tensors, grad_tensors, *args, **kwargs)
        return
    roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    gradients = [grad_tensors] if isinstance(grad_tensors, Tensor) else list(grad_tensors or [None] * len(roots))
    _IDLE.roots += roots
    _IDLE.called.extend(zip(roots, gradients, strict=True))


@contextmanager
def idle_backward() -> Iterator[list[tuple[Tensor, Tensor | None]]]:
    """`loss.backward()` in this thread does nothing: it would free the graph, and its gradients are not needed.

    Yields the list that it adds its tensors to, with the gradients that it was given.
    """
    global _idle_steps, _backward
    with _IDLE_LOCK:
        if _idle_steps == 0:
            _backward, torch.autograd.backward = torch.autograd.backward, _backward_unless_idle
        _idle_steps += 1
    called: list[tuple[Tensor, Tensor | None]] = []
    _IDLE.depth, _IDLE.roots, _IDLE.called = getattr(_IDLE, "depth", 0) + 1, [], called
    try:
        yield called
    finally:
        _IDLE.depth -= 1
        with _IDLE_LOCK:
            _idle_steps -= 1
            if _idle_steps == 0 and torch.autograd.backward is _backward_unless_idle:
                torch.autograd.backward = _backward


def with_graph(owner: str, closure: Callable[[], Any], parameters: list[Tensor]) -> Callable[[], Any]:
    """The closure, for `idle_backward`; where it returns its loss detached, as Lightning's does: what it has called backward on.

    Raises, when it is called then:
        RuntimeError: the two values differ, or, at the first call, there are gradients of other batches for that loss' to be
            added to.
    """
    calls = 0

    def called() -> Any:
        nonlocal calls
        calls += 1
        _IDLE.roots = []
        value = closure()
        roots = [root for root in _IDLE.roots if root.numel() == 1 and root.requires_grad]
        _IDLE.roots = []
        if not (isinstance(value, Tensor) and value.numel() == 1 and not value.requires_grad and roots):
            return value
        loss = torch.stack([root.reshape(()) for root in roots]).sum()
        if not torch.allclose(loss.detach(), value.to(loss), equal_nan=True):
            raise RuntimeError(
                f"{owner}.step(): expected the closure to return the loss that it calls backward on, {float(loss.detach()):.6g}, "
                f"got {float(value):.6g}: neither a part of it nor scaled; a GradScaler is not supported"
            )
        if calls == 1 and any(p.grad is not None and bool(p.grad.any()) for p in parameters):
            raise RuntimeError(
                f"{owner}.step(): expected no gradients beside those of the closure's loss, since the residuals of other batches "
                "are not known. Accumulate within the closure, or take a larger batch (accumulate_grad_batches=1 in Lightning); "
                "gradients that were left over go with optimizer.zero_grad()"
            )
        return loss

    return called
