"""How an operator is registered: its schema, its fake implementation, and plain PyTorch where it has no kernel."""

from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import unpack_dual
from torch.utils._pytree import tree_leaves, tree_map_only

from secondorder import reference
from secondorder._extension import compiled  # importing it registers the kernels
from secondorder._warnings import warn

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
        function_of_torch = getattr(getattr(library, packet), overload or "default")
        for key in _autocast:
            _fragment.impl(name, _without_autocast(function_of_torch), key)
        if compiled is None:
            _fragment.impl(name, _not_differentiable(function_of_torch), "Autograd", with_keyset=True)
        else:
            compiled.refuse_derivatives(name)  # at a tenth of the cost
        return function

    return register


def _tensors(args: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]


def _without_autocast(overload: Callable[..., Any]) -> Callable[..., Any]:
    """Makes what stands before all implementations where torch.autocast is on, which would round operands of their products."""

    def computed(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_autocast_keys):
            return overload(*args)

    return computed


def _not_differentiable(overload: Any) -> Callable[..., Any]:
    """Makes what csrc/autograd.cpp is with the extension: it refuses tangents, and backward passes when they come there."""
    name, schema = overload._schema.name, overload._schema

    def computed(keys: Any, *args: Any) -> Any:
        given = _tensors(args)
        if any(unpack_dual(t).tangent is not None for t in given):
            raise NotImplementedError(
                f"{name}: expected tensors without tangents, got some of forward-mode AD; no operator of secondorder is "
                "differentiable"
            )
        results = overload.redispatch(keys & torch._C._after_autograd_keyset, *args)
        if torch.is_grad_enabled() and any(t.requires_grad for t in given):
            writes = [arg for arg, of in zip(args, schema.arguments, strict=False) if of.alias_info and of.alias_info.is_write]
            made = [t for t in _tensors(writes) if not (t.is_leaf and t.requires_grad)] + _tensors(results)
            made = [t for t in made if t.is_floating_point()]
            NotImplementedDerivative.note(name, len(made), *made, *given)
        return results

    return computed


class NotImplementedDerivative(torch.autograd.Function):
    """Has a backward pass raise that comes to what an operator has made."""

    @classmethod
    def note(cls, *args: Any) -> None:
        """Does what `apply` does, but at one level of torch.func, where autograd's kernels are called."""
        with enable_single_level_autograd_function():
            super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]

    @staticmethod
    def forward(ctx: Any, name: str, made: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Changes nothing."""
        ctx.operator = name
        ctx.mark_dirty(*tensors[:made])
        return tensors[:made]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        """Raises RuntimeError."""
        raise RuntimeError(f"derivative for {ctx.operator} is not implemented")


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
