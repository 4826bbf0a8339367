"""Hooks on the calls of modules, and what has torch.compile leave a forward to the interpreter.

They keep no tape alive, and nothing of them shows in a module's signature, copies, pickles, scripts and exports.
"""

import functools
import inspect
import weakref
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, Protocol

import torch
from torch import nn

# Returns what evaluates frames in the interpreter's place where torch.compile is at work; else None. In torch 2.6 it returns a
# reference that it does not own, so that Python before 3.12 ends with "deallocating None" after 20,000 steps. 2.11 is right.
_GETTER = "get_eval_frame_callback" if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11) else ""
_compiler: Callable[[], Any] = getattr(torch._C._dynamo.eval_frame, _GETTER, lambda: True)
exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # from torch 2.7 on


def compiling() -> bool:
    """Tells whether what is called may be compiled. If not, torch.compiler.disable would only cost, in every forward pass."""
    return torch.compiler.is_compiling() or _compiler() is not None


class Recorder(Protocol):
    """What hooks report to."""

    @property
    def active(self) -> bool:
        """Tells whether calls are recorded."""


class _Report:
    """Tells a recorder, which it does not keep alive, of a module's calls: recorder.method(module, args, kwargs, output)."""

    def __init__(self, recorder: Recorder, method: str, always: bool = False):
        self.recorder, self.always = weakref.ref(recorder), always
        self.function: Callable[..., None] = getattr(type(recorder), method)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.is_grad_enabled() and (self.always or module.training) and not exporting():
            (self._disabled if compiling() else self._tell)(module, args, kwargs, output)

    def _tell(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        recorder = self.recorder()
        if recorder is not None and recorder.active and torch._C._get_tracing_state() is None:
            self.function(recorder, module, args, kwargs, output)

    _disabled = torch.compiler.disable(_tell)


class CallHook:
    """Reports the calls of a module.

    It stands where nn.Module.compile puts the compiled call, which nn.Module's copies and pickles leave out.

    Args:
        module: whose calls are reported.
        recorder: whom to.
        method: called as recorder.method(module, args, kwargs, output).
        always: also in eval mode.
    """

    def __init__(self, module: nn.Module, recorder: Recorder, method: str, always: bool = False):
        self.module, self.report = weakref.ref(module), _Report(recorder, method, always)
        self.before: Any = module._compiled_call_impl
        module._compiled_call_impl = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module()
        assert module is not None
        output = (module._call_impl if self.before is None else self.before)(*args, **kwargs)
        self.report(module, args, kwargs, output)
        return output

    def remove(self) -> None:
        """Takes it off the module, whatever has been put there before or after it."""
        module = self.module()
        if module is None:
            return
        above: Any = None
        current = module._compiled_call_impl
        while isinstance(current, CallHook) and current is not self:
            above, current = current, current.before
        if current is not self:
            return  # compiled since, which has dropped it
        if above is not None:
            above.before = self.before
        elif self.before is None:
            del module._compiled_call_impl
        else:
            module._compiled_call_impl = self.before


class EagerForward:
    """Has torch.compile leave a module's forward alone in training mode: a compiled graph does not say what it computes.

    In eval mode, without gradients and in exports it is compiled as ever. The method that stands in for the module's own has its
    signature, source and globals, and so it is scripted as that.

    Args:
        module: whose forward it is.
        recorder: whom its calls are reported to; None: nobody. A model itself has no `CallHook`: that could not be scripted.
        before: called before each call as recorder.before(module, args, kwargs, None).
        after: called after it as recorder.after(module, args, kwargs, output).
    """

    def __init__(self, module: nn.Module, recorder: Recorder | None = None, before: str = "", after: str = ""):
        self.module = weakref.ref(module)
        self.before, self.after = (None if recorder is None else _Report(recorder, method) for method in (before, after))
        own = vars(module).get("forward")
        if self._users() is None and (own is None or inspect.unwrap(getattr(own, "__func__", own)) is type(module).forward):
            module.forward = _eager_forward(module)  # also in the place of what a copy has of it
        users = self._users()
        if users is not None:
            users.append(self)

    def _users(self) -> "list[EagerForward] | None":
        """Returns who needs the forward that is there; None: it is none of these, or another module's."""
        module = self.module()
        forward = None if module is None else vars(module).get("forward")
        return forward._users if forward is not None and hasattr(forward, "_users") and forward._owner() is module else None

    def remove(self) -> None:
        """Gives the module its own forward back, once nothing else needs the other."""
        module, users = self.module(), self._users()
        if module is not None and users is not None and self in users:
            users.remove(self)
            if not users:
                del module.forward


def _eager_forward(module: nn.Module) -> MethodType:
    """Returns a forward for a module that torch.compile leaves alone in training mode, and that reports its calls."""
    original: Any = type(module).forward
    owner: Any = weakref.ref(module)
    users: list[EagerForward] = []
    # `forward` below is given the globals of the model's own forward, and so cannot see this file's: they come by its closure.
    maybe_compiled, enabled, exports = compiling, torch.is_grad_enabled, exporting
    eager = torch.compiler.disable(original)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if owner() is not self:  # a copy, which needs it no more
            self.__dict__.pop("forward", None)
            return original(self, *args, **kwargs)
        for user in users:
            if user.before is not None:
                user.before(self, args, kwargs, None)
        if maybe_compiled() and self.training and enabled() and not exports():
            output = eager(self, *args, **kwargs)
        else:
            output = original(self, *args, **kwargs)
        for user in users:
            if user.after is not None:
                user.after(self, args, kwargs, output)
        return output

    names = getattr(original, "__globals__", globals())
    function = functools.wraps(original)(FunctionType(forward.__code__, names, "forward", None, forward.__closure__))
    function._users, function._owner = users, owner  # type: ignore[attr-defined]
    return MethodType(function, module)


def remove_handles(handles: list[Any]) -> None:
    """Removes and forgets all handles."""
    for handle in handles:
        handle.remove()
    handles.clear()
