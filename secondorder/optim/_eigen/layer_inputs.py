"""The rows of a layer's input that its weight multiplies: inputs of linear layers, patches of convolutions."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secondorder._tensors import captured_now
from secondorder.optim._eigen.matrices import LINEAR

# At most so many are looked at in a call:
ROWS = 4096  # of a linear layer's input
PATCHES = 1024  # of a convolution's input


def is_plain(inputs: Any) -> bool:
    """Tells whether inputs are numbers that can be summed up: of an ordinary tensor, not one of vmap's or jvp's, and some."""
    return (
        isinstance(inputs, Tensor)
        and inputs.layout is torch.strided
        and not inputs.is_nested
        and inputs.numel() > 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def input_rows(module: nn.Module, inputs: Tensor) -> Tensor:
    """Returns the rows [m, p] that a module's weight multiplies, inputs or patches: evenly spread ones where they are many."""
    if not isinstance(module, LINEAR):
        return _patches(module, inputs)
    rows = inputs.reshape(-1, inputs.shape[-1])
    if len(rows) <= ROWS:
        return rows
    stride, sequence = math.ceil(len(rows) / ROWS), math.prod(inputs.shape[1:-1])
    while math.gcd(stride, sequence) > 1:  # it would meet some places of each sequence alone
        stride += 1
    return rows[::stride]


def _patches(module: Any, inputs: Tensor) -> Tensor:
    """Returns at most PATCHES of the patches [c_in / groups * prod(kernel)] that a convolution sees, of all groups."""
    size = len(module.kernel_size)
    x = inputs if inputs.dim() == size + 2 else inputs.unsqueeze(0)
    kernels, strides, dilations = map(tuple, (module.kernel_size, module.stride, module.dilation))
    geometry = _Geometry(len(x), tuple(x.shape[2:]), kernels, strides, dilations, _padding(module), x.device)
    ordinary = type(inputs) in (Tensor, nn.Parameter)  # the tensors of a mode such as FakeTensorMode must not be kept
    places = _kept_places(geometry) if ordinary else _patch_places(geometry)
    patches = x.movedim(1, -1)[places.indices] * places.inside  # [m, *kernel, c_in]
    patches = patches.movedim(-1, 1)
    groups = int(module.groups)
    return patches.reshape(len(patches) * groups, -1)


class _Geometry(NamedTuple):
    """What the places of a convolution's patches depend on; one entry for each axis of the images."""

    instances: int
    lengths: tuple[int, ...]
    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    paddings: tuple[tuple[int, int], ...]
    device: torch.device


class _Places(NamedTuple):
    """Where patches lie in inputs [instances, *lengths, c]."""

    indices: tuple[Tensor, ...]
    inside: Tensor  # [m, *kernel, 1], whether an element is inside, rather than padding


_KEPT: dict[_Geometry, _Places] = {}  # the one used last at the end
_READ_BY_GRAPHS: set[_Places] = set()  # which CUDA graphs read at their addresses as long as they are replayed


def _kept_places(geometry: _Geometry) -> _Places:
    """Returns the places of patches, and keeps them for the next call."""
    places = _KEPT.pop(geometry, None)
    if captured_now():
        if places is None:  # the memory is the graph's, and is filled by its replays alone
            return _patch_places(geometry)
        _READ_BY_GRAPHS.add(places)
    elif places is None:
        places = _patch_places(geometry)
    while len(_KEPT) >= 32:  # an entry takes 66 KB for a kernel of 3 x 3
        del _KEPT[next(iter(_KEPT))]
    _KEPT[geometry] = places
    return places


def _patch_places(geometry: _Geometry) -> _Places:
    """Computes the places of at most PATCHES patches, evenly spread over instances and positions."""
    instances, lengths, kernels, strides, dilations, paddings, device = geometry
    extents = [
        (length + sum(pad) - dilation * (kernel - 1) - 1) // stride + 1
        for length, pad, kernel, stride, dilation in zip(lengths, paddings, kernels, strides, dilations, strict=True)
    ]
    total, size = instances * math.prod(extents), len(lengths)
    chosen = torch.arange(min(total, PATCHES), device=device) * total // min(total, PATCHES)
    inside = torch.ones((), dtype=torch.bool, device=device)
    indices: list[Tensor] = []
    for axis in reversed(range(size)):  # the last axis varies fastest
        at, chosen = chosen % extents[axis], chosen // extents[axis]
        kernel = torch.arange(kernels[axis], device=device) * dilations[axis]
        index = at.unsqueeze(1) * strides[axis] - paddings[axis][0] + kernel
        shape = [len(at), *(len(kernel) if i == axis else 1 for i in range(size))]
        inside = inside & ((index >= 0) & (index < lengths[axis])).reshape(shape)
        indices.insert(0, index.clamp(0, lengths[axis] - 1).reshape(shape))
    return _Places((chosen.reshape(-1, *[1] * size), *indices), inside.unsqueeze(-1))


def _padding(module: Any) -> tuple[tuple[int, int], ...]:
    """Returns how many zeros a convolution puts before and after each axis."""
    if module.padding == "valid":
        return ((0, 0),) * len(module.kernel_size)
    if module.padding == "same":  # torch puts the odd one at the end
        needs = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return tuple((need // 2, need - need // 2) for need in needs)
    return tuple((p, p) for p in module.padding)
