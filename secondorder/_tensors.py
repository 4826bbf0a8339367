"""Helpers on tensors: batches as rows, subsamples of them, and the dtype that numbers are computed in."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
Later = Callable[[], T]  # gives what takes numbers of the device to know

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


def captured_now() -> bool:
    """Whether a CUDA graph is being captured, whose replays launch the same kernels again and call nothing in Python."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


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


class Transfer:
    """Brings numbers to the host together: the first that are asked for bring all that were given until then, by one wait."""

    def __init__(self) -> None:
        self._given: list[Tensor] = []
        self._here: list[Tensor] = []

    def later(self, tensor: Tensor) -> Later[Tensor]:
        """Gives the tensor in float64 on the CPU, once it is asked for."""
        tensor = tensor.detach()
        if tensor.is_cpu:
            here = tensor.double()
            return lambda: here
        place = len(self._here) + len(self._given)
        self._given.append(tensor)

        def arrived() -> Tensor:
            if place >= len(self._here):
                self._bring()
            return self._here[place]

        return arrived

    def numbers(self, numbers: Sequence[Tensor | float]) -> Later[list[float]]:
        """The same for tensors of one element; what is a number already is given as it is."""
        found: list[float | Later[Tensor]] = []
        for number in numbers:
            if not isinstance(number, Tensor):
                found.append(number)
            else:
                found.append(number.item() if number.is_cpu else self.later(number.reshape(())))
        return lambda: [number().item() if callable(number) else number for number in found]

    def _bring(self) -> None:
        given, self._given = self._given, []
        by_device: dict[torch.device, list[Tensor]] = {}
        for t in given:
            by_device.setdefault(t.device, []).append(t.reshape(-1))
        flat = {device: torch.cat(own).double().cpu() for device, own in by_device.items()}
        parts = {device: iter(flat[device].split([len(t) for t in own])) for device, own in by_device.items()}
        self._here += [next(parts[t.device]).view(t.shape) for t in given]


class Arriving:
    """A tensor of one boolean on its way to the host: to read it waits for what was queued on a GPU before it, and no longer."""

    def __init__(self, flag: Tensor):
        self._flag, self._event = flag, None
        if flag.is_cuda:
            self._flag = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> bool:
        """Its value."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._flag)


def host_numbers(numbers: Sequence[Tensor | float]) -> list[float]:
    """The values of tensors of one element, and of what is a number already; waits for the device once."""
    return Transfer().numbers(numbers)()


def finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether no tensor of some holds NaN or inf, nor so large numbers that their sum does: []."""
    return torch.stack([t.sum() for t in tensors]).isfinite().all()


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """The same of any number of tensors; waits for the device once."""
    return not tensors or bool(finite(tensors))
