"""Helpers on tensors: batches as rows, subsamples of them, and the dtype that numbers are computed in."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_WHOLE = (Tensor, nn.Parameter)  # types that are no DTensor, told at once


def device_for(dtype: torch.dtype, like: Tensor) -> torch.device:
    """Where numbers of a dtype are kept beside a tensor: MPS has no float64, so the CPU has them for it."""
    return torch.device("cpu") if dtype == torch.float64 and like.device.type == "mps" else like.device


def is_sharded(t: Any) -> bool:
    """Whether it is a DTensor, whose rows ranks share. Told by its attributes: to import its module takes a second."""
    return type(t) not in _WHOLE and isinstance(t, Tensor) and hasattr(t, "placements") and hasattr(t, "device_mesh")


def here(t: Tensor) -> Tensor:
    """What this process has of a tensor, without its graph: of a DTensor its own rows, else the whole."""
    return t.detach().to_local() if is_sharded(t) else t  # type: ignore[attr-defined]


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t.to(dtype)`, but free where it is `t` itself: with small layers, calls of torch are what a step costs."""
    return t if t.dtype == dtype else t.to(dtype)


def real_view(t: Tensor) -> Tensor:
    """The real and imaginary parts [..., 2] of complex numbers, in their memory; real numbers as they are."""
    return torch.view_as_real(t.detach().resolve_conj()) if t.is_complex() else t


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What numbers of this dtype are computed with: at least float32."""
    return dtype if dtype is torch.float32 else torch.promote_types(dtype, torch.float32)


def to_compute_dtype(t: Tensor) -> Tensor:
    """The tensor at least in float32."""
    return t if t.dtype is torch.float32 else cast(t, compute_dtype(t.dtype))


def subsample(instances: Tensor, samples: int | None) -> Tensor:
    """Of the instances [..., m, n], where they are more than `samples`, so many, evenly spaced: floor(k m / samples)."""
    m = instances.shape[-2]
    if samples is None or m <= samples:
        return instances
    return instances.index_select(-2, torch.arange(samples, device=instances.device) * m // samples)


def flatten_batch(tensors: list[Tensor], samples: int | None = None) -> Tensor:
    """[m, n] from tensors [..., n]: the union of their instances, or of a `subsample` of each."""
    if len(tensors) == 1 and samples is None and tensors[0].dim() == 2:
        return tensors[0]
    flat = [subsample(t if t.dim() == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1]), samples) for t in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def irregular(like: Tensor) -> Tensor:
    """Numbers of mixed signs and sizes, no two alike, from 0.5 to 1.5: fixed, so that every random generator is left alone."""
    index = torch.arange(like.numel(), device=like.device, dtype=torch.float64)
    fraction = (index * 0.6180339887498949).frac()  # the golden ratio's multiples fill [0, 1) without ever repeating
    signs = 1 - 2 * ((index * 0.7548776662466927).frac() < 0.5).double()
    return ((0.5 + fraction) * signs).to(like.dtype).reshape(like.shape)


def host_numbers(numbers: Sequence[Tensor | float]) -> list[float]:
    """The values of tensors of one element, and of what is a number already; waits for the device once."""
    tensors = [number.detach().reshape(()).double() for number in numbers if isinstance(number, Tensor)]
    values = iter(torch.stack(tensors).tolist() if tensors else [])
    return [next(values) if isinstance(number, Tensor) else number for number in numbers]


def all_finite(tensors: list[Tensor], zeros: Sequence[Tensor] = ()) -> bool:
    """Whether no tensor holds NaN or inf, nor so large numbers that their sum does, and `zeros` nothing but 0.

    Waits for the device once.
    """
    if not tensors:
        return not any(map(bool, zeros))
    finite = torch.stack([t.sum() for t in tensors]).isfinite().all()
    return bool(finite & ~torch.stack([t.any() for t in zeros]).any() if zeros else finite)
