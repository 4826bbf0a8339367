"""Hooks on modules: they keep no tape alive, are inert in copies, and have torch.compile leave a forward to the interpreter."""

import inspect
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any, Protocol

import torch
from torch import nn

# What evaluates frames in the interpreter's place, where torch.compile is at work; else None.
_compiler: Callable[[], Any] = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: True)


def compiling() -> bool:
    """Whether what is called may be compiled. Where it may not, torch.compiler.disable would only cost: in every forward pass."""
    return torch.compiler.is_compiling() or _compiler() is not None


class Recorder(Protocol):
    """What hooks report to."""

    @property
    def active(self) -> bool:
        """Whether calls are recorded."""


class ModuleHook:
    """A forward hook by a method of a recorder, which it does not keep alive. Copies of the module are another net's: inert.

    Args:
        recorder: None in a copy.
        method: called as recorder.method(module, args, kwargs, output).
        always: also in eval mode.
    """

    def __init__(self, recorder: Recorder | None, method: str, always: bool = False):
        self.recorder = None if recorder is None else weakref.ref(recorder)
        self.method, self.always = method, always
        self.function: Callable[..., None] | None = None if recorder is None else getattr(type(recorder), method)

    def __call__(self, module: nn.Module, *args: Any) -> None:
        if not torch.is_grad_enabled() or not (self.always or module.training):
            return
        recorder = None if self.recorder is None else self.recorder()
        if recorder is not None and recorder.active:
            assert self.function is not None
            (self._disabled if compiling() else self.function)(recorder, module, *args)

    @torch.compiler.disable
    def _disabled(self, recorder: Recorder, module: nn.Module, *args: Any) -> None:
        assert self.function is not None
        self.function(recorder, module, *args)

    def __reduce__(self) -> tuple[type, tuple[None, str, bool]]:  # also what copy.deepcopy goes by
        return ModuleHook, (None, self.method, self.always)


class _Eager:
    """A module's forward, which torch.compile leaves alone in training mode: a compiled graph does not say what it computes.

    In eval mode and without gradients it is compiled as ever.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if compiling() and self.module.training and torch.is_grad_enabled():
            return self._eagerly(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the forward itself, by which frameworks choose a batch's columns: `inspect.signature` asks for it."""
        return inspect.signature(MethodType(type(self.module).forward, self.module))

    @torch.compiler.disable
    def _eagerly(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)


class EagerForward:
    """Puts an `_Eager` on a module, and takes it off."""

    def __init__(self, module: nn.Module):
        self.module = weakref.ref(module)
        if "forward" not in vars(module):
            module.forward = _Eager(module)

    def remove(self) -> None:
        """Gives the module its own forward back."""
        module = self.module()
        if module is not None and isinstance(vars(module).get("forward"), _Eager):
            del module.forward


def remove_handles(handles: list[Any]) -> None:
    """Removes and forgets all handles."""
    for handle in handles:
        handle.remove()
    handles.clear()
