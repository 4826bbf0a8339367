"""How an operator is registered: its schema, its fake implementation, and plain PyTorch where it has no kernel."""

from collections.abc import Callable
from functools import reduce, wraps
from operator import or_
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map_only

from secondorder import reference
from secondorder._extension import compiled  # importing it registers the kernels
from secondorder._warnings import warn

P = ParamSpec("P")
R = TypeVar("R")

library = torch.ops.secondorder
_fragment = torch.library.Library("secondorder", "FRAGMENT")
_told: set[str] = set()  # the types of device that a warning has named
_autocast = {name: key for name, key in torch._C.DispatchKey.__members__.items() if name.startswith("Autocast")}
_autocast_keys = reduce(or_, map(torch._C.DispatchKeySet, _autocast.values()))


def operator(schema: str, plain: Callable[..., Any] | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers an operator, whose fake implementation is decorated: shapes and dtypes alone.

    The fake implementation serves torch.compile, torch.export and tensors on "meta". It raises where its tensors are on several
    devices, as the kernels do.

    Args:
        schema: `name(arguments) -> results`, in the language of torch.library.
        plain: computes the operator on devices without a kernel, and everywhere without the extension; None: its twin in
            `reference`.
    """
    name = schema.partition("(")[0]
    _fragment.define(schema)

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any) -> Any:
            devices = {tensor.device for tensor in _tensors(args)}
            if len(devices) > 1:
                raise ValueError(f"{name}: expected all tensors on one device, got {', '.join(sorted(map(str, devices)))}")
            return function(*args)

        torch.library.register_fake(f"secondorder::{name}", checked)
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"secondorder::{name}", "CompositeExplicitAutograd"):
            twin = plain or getattr(reference, name.removesuffix(".list").replace(".", "_"))
            _fragment.impl(name, _stand_in(twin), "CompositeExplicitAutograd")
        packet, _, overload = name.partition(".")
        for key in _autocast:
            _fragment.impl(name, _without_autocast(getattr(getattr(library, packet), overload or "default")), key)
        return function

    return register


def without_tangents(function: Callable[P, R]) -> Callable[P, R]:
    """Makes an operator refuse tangents of forward-mode AD, which torch would drop without a word: none is differentiable."""

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if forward_ad._current_level >= 0:
            given = _tensors([args, kwargs])
            if any(forward_ad.unpack_dual(t).tangent is not None for t in given):
                raise NotImplementedError(
                    f"{function.__name__}: expected tensors without tangents, got some of forward-mode AD; no operator of "
                    "secondorder is differentiable"
                )
        return function(*args, **kwargs)

    return checked


def _tensors(args: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]


def _without_autocast(overload: Callable[..., Any]) -> Callable[..., Any]:
    """Makes what stands before all implementations where torch.autocast is on, which would round operands of their products."""

    def computed(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_autocast_keys):
            return overload(*args)

    return computed


def _stand_in(twin: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an implementation of a twin; where the extension is there, it says once for each type of device that it is used."""

    def computed(*args: Any) -> Any:
        devices = [tensor.device for tensor in _tensors(args)]
        untold = {device.type for device in devices} - _told
        if compiled is not None and untold:
            _told.update(untold)
            warn(
                f"there are no kernels for tensors on {', '.join(sorted(untold))} here; plain PyTorch stands in for them: the "
                "same steps, several times as slow (docs/install.md). Kernels for CUDA are compiled where both torch and the "
                "machine have it."
            )
        with torch.no_grad():
            # The fake implementations promise contiguous results.
            return tree_map_only(Tensor, Tensor.contiguous, twin(*args))

    return computed
