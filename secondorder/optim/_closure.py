"""Closures that a step calls more than once: `loss.backward()` then does nothing, or something else than torch's."""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from secondorder._tensors import plain

# The default of a `closure` that a step needs: inspect.signature then shows none, as of L-BFGS, and frameworks look there.
NEEDED: Any = inspect.Parameter.empty

_LOCAL = threading.local()  # .stack: what stands in for backward in this thread; .roots: what it was called on
_LOCK = threading.Lock()
_replaced = 0  # how many replacements are in force, over all threads
_backward: Any = torch.autograd.backward  # as it was before the first of them


def torchs_backward(*args: Any, **kwargs: Any) -> None:
    """Calls torch.autograd.backward, also where `replaced_backward` has put something else in its place."""
    _backward(*args, **kwargs)


def _backward_here(*args: Any, **kwargs: Any) -> Any:
    """Stands in for torch.autograd.backward; serves threads without a replacement, and backward passes under way, as ever."""
    stack = getattr(_LOCAL, "stack", None)
    under_way = torch._C._current_graph_task_id() != -1  # a torch.autograd.Function's own backward(), say
    return (stack[-1] if stack and not under_way else _backward)(*args, **kwargs)


@contextmanager
def replaced_backward(function: Callable[..., Any]) -> Iterator[None]:
    """Has `loss.backward()` in this thread call `function` within it, with the arguments of torch.autograd.backward."""
    global _replaced, _backward
    with _LOCK:
        if _replaced == 0:
            _backward, torch.autograd.backward = torch.autograd.backward, _backward_here
        _replaced += 1
    if not hasattr(_LOCAL, "stack"):
        _LOCAL.stack = []
    _LOCAL.stack.append(function)
    try:
        yield
    finally:
        _LOCAL.stack.pop()
        with _LOCK:
            _replaced -= 1
            if _replaced == 0 and torch.autograd.backward is _backward_here:
                torch.autograd.backward = _backward


@contextmanager
def idle_backward(
    owner: str, after: Callable[[], None] = lambda: None, called: list[tuple[Tensor, Tensor | None]] | None = None
) -> Iterator[None]:
    """Has `loss.backward()` in this thread compute nothing within it: it would free the graph, and its gradients are not needed.

    A call with `create_graph=True` or with `inputs` raises RuntimeError, since a loss may be made of its gradients.

    Args:
        owner: the optimizer's name, for messages.
        after: called after each such call.
        called: each such call adds the tensors that it is given, with their gradients, and so keeps their graphs. None: nothing.
    """
    _LOCAL.roots = []

    def remember(
        tensors: Any, grad_tensors: Any = None, retain_graph: bool | None = None, create_graph: bool = False,
        grad_variables: Any = None, inputs: Any = None,
    ) -> None:  # fmt: skip
        if create_graph or inputs is not None:
            raise RuntimeError(
                f"{owner}.step(): expected a closure whose backward() leaves out create_graph and inputs, since within a step "
                f"backward() does nothing, got {'create_graph=True' if create_graph else 'inputs'}. Take derivatives that the "
                "loss is made of by torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True), in place of x.grad; for "
                "the loss itself call loss.backward()"
            )
        roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        gradients = [grad_tensors] if isinstance(grad_tensors, Tensor) else list(grad_tensors or [None] * len(roots))
        _LOCAL.roots += roots
        if called is not None:
            called.extend(zip(roots, gradients, strict=True))
        after()

    try:
        with replaced_backward(remember):
            yield
    finally:
        _LOCAL.roots = []  # a closure that fails leaves its graph there


def with_graph(owner: str, closure: Callable[[], Any], parameters: list[Tensor]) -> Callable[[], Any]:
    """Makes a closure for `idle_backward` that always returns a loss with its graph.

    Some closures return their loss without one: Lightning's return it detached, others as a number. In its place the new closure
    returns what the closure has called backward on. When it is called it raises RuntimeError if the two values differ, or if, at
    the first call with such a loss, there are gradients of other batches to which backward() would have added.
    """
    calls = 0

    def called() -> Any:
        nonlocal calls
        calls += 1
        _LOCAL.roots = []
        value = closure()
        roots = list({id(root): root for root in _LOCAL.roots if root.numel() == 1 and root.requires_grad}.values())
        _LOCAL.roots = []
        is_loss = isinstance(value, Tensor) and value.numel() == 1
        if not roots or not (is_loss or isinstance(value, float)) or (len(roots) == 1 and roots[0] is value):
            return value
        with_own_graph = is_loss and value.requires_grad
        if with_own_graph and calls > 1:  # seen at the first call
            return value
        loss = torch.stack([plain(root).reshape(()) for root in roots]).sum()
        given = torch.as_tensor(value, device=loss.device).detach()
        if not torch.allclose(loss.detach(), given.to(loss), equal_nan=True):
            raise RuntimeError(
                f"{owner}.step(): expected the closure to return the loss that it calls backward on, {float(loss.detach()):.6g}, "
                f"got {float(given):.6g}: neither a part of it nor scaled; a GradScaler is not "
                "supported"
            )
        if with_own_graph:
            return value
        if calls == 1 and any(p.grad is not None and bool(p.grad.any()) for p in parameters):
            raise RuntimeError(
                f"{owner}.step(): expected no gradients beside those of the closure's loss, since the residuals of other batches "
                "are not known. Accumulate within the closure, or take a larger batch (accumulate_grad_batches=1 in Lightning); "
                "gradients that were left over go with optimizer.zero_grad()"
            )
        return loss

    return called
