"""Helpers on tensors: batches as rows, the dtype that numbers are computed in, and numbers that come to the host together."""

import functools
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])
Later = Callable[[], T]  # returns a value that depends on numbers of the device, and waits for them

_WHOLE = (Tensor, nn.Parameter)  # types that are certainly no DTensor


def device_for(dtype: torch.dtype, like: Tensor) -> torch.device:
    """Returns the device of a tensor, or the CPU for float64 numbers that belong to a tensor on MPS, which has no float64."""
    return torch.device("cpu") if dtype == torch.float64 and like.device.type == "mps" else like.device


def is_sharded(t: Any) -> bool:
    """Tells whether it is a DTensor, whose rows ranks share; by its attributes, since importing its module takes a second."""
    return type(t) not in _WHOLE and isinstance(t, Tensor) and hasattr(t, "placements") and hasattr(t, "device_mesh")


def local_rows(t: Tensor) -> Tensor:
    """Returns this process' rows of a DTensor, without a graph; any other tensor as it is."""
    return t.detach().to_local() if is_sharded(t) else t  # type: ignore[attr-defined]


def captured_now() -> bool:
    """Tells whether a CUDA graph is being captured, whose replays launch the same kernels again and call nothing in Python."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse_capture(what: str) -> None:
    """Raises where a CUDA graph is being captured, before `what` reads numbers of the device, which no graph can."""
    if captured_now():
        raise RuntimeError(
            f"expected no {what} where a CUDA graph is being captured, since numbers of the device decide about it"
        )


def outside_inference_mode(function: Function) -> Function:
    """Makes a function leave torch.inference_mode for its time, since what is made there could never be written to elsewhere."""

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return outside  # type: ignore[return-value]


def plain(t: Any) -> Any:
    """Returns a tensor without what a subclass of Tensor adds, as names of its columns; all else and parameters as they are."""
    return t.as_subclass(Tensor) if isinstance(t, Tensor) and type(t) not in _WHOLE else t


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `t.to(dtype)`, without a call of torch if that is `t` itself: with small layers such calls dominate a step."""
    return t if t.dtype == dtype else t.to(dtype)


def real_view(t: Tensor) -> Tensor:
    """Returns the real and imaginary parts [..., 2] of complex numbers, in their memory; real numbers as they are."""
    return torch.view_as_real(t.detach().resolve_conj()) if t.is_complex() else t


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that numbers of this dtype are computed in: at least float32."""
    return dtype if dtype is torch.float32 else torch.promote_types(dtype, torch.float32)


def to_compute_dtype(t: Tensor) -> Tensor:
    """Returns the tensor in its compute dtype, at least float32."""
    return t if t.dtype is torch.float32 else cast(t, compute_dtype(t.dtype))


def autocast_on(device_type: str) -> bool:
    """Tells whether torch.autocast is on for such devices; for some, as meta, torch has none and refuses to be asked."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Has torch compute within it in the dtypes of the tensors on such devices, where torch.autocast would have it round them."""
    return torch.autocast(device.type, enabled=False) if autocast_on(device.type) else nullcontext()


def subsample(instances: Tensor, samples: int | None) -> Tensor:
    """Returns at most `samples` of the instances [..., m, n], evenly spaced: those at floor(k m / samples)."""
    m = instances.shape[-2]
    if samples is None or m <= samples:
        return instances
    return instances.index_select(-2, torch.arange(samples, device=instances.device) * m // samples)


def flatten_batch(tensors: list[Tensor], samples: int | None = None) -> Tensor:
    """Joins tensors [..., n] to one [m, n]: the union of their instances, or of a `subsample` of each."""
    if len(tensors) == 1 and samples is None and tensors[0].dim() == 2:
        return tensors[0]
    flat = [subsample(t if t.dim() == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1]), samples) for t in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def refuse_sparse(layer: str, h: Any) -> None:
    """Raises TypeError where a layer of this name is called on a sparse or nested tensor, whose rows no curvature is made of."""
    if h.layout is not torch.strided or h.is_nested:
        kind = "nested" if h.is_nested else "sparse"
        raise TypeError(
            f"layer {layer!r}: expected an input that is an ordinary tensor, as the curvature needs, got a {kind} one; give the "
            f"layer {'the rows alone, x.values()' if h.is_nested else 'x.to_dense()'}, or train with secondorder.EigenAdam"
        )


def gradients_by_seed(r: Tensor | GradientEdge, inputs: Sequence[Any], seeds: Tensor) -> Sequence[Tensor | None]:
    """Returns the gradients of `inputs` for each of the seeds [k, ...], as [k, ...]; by vmap if there are several."""
    if len(seeds) > 1:
        # vmap does not know all nodes, as those of compiled graphs and of sparse matrices.
        with warnings.catch_warnings(), suppress(RuntimeError):
            warnings.simplefilter("ignore")  # vmap warns of nodes that it takes one after another
            return torch.autograd.grad(r, inputs, seeds, retain_graph=True, allow_unused=True, is_grads_batched=True)
    each = [torch.autograd.grad(r, inputs, one, retain_graph=True, allow_unused=True) for one in seeds]
    return [None if gs[0] is None else torch.stack(gs) for gs in zip(*each, strict=True)]


def irregular(like: Tensor) -> Tensor:
    """Returns numbers of mixed signs, no two alike, of sizes from 0.5 to 1.5; they are fixed, and use no random generator."""
    index = torch.arange(like.numel(), device=like.device, dtype=torch.float64)
    fraction = (index * 0.6180339887498949).frac()  # the golden ratio's multiples fill [0, 1) without ever repeating
    signs = 1 - 2 * ((index * 0.7548776662466927).frac() < 0.5).double()
    return ((0.5 + fraction) * signs).to(like.dtype).reshape(like.shape)


class Transfer:
    """Brings numbers to the host together: asking for one brings all that were given until then, by one wait."""

    def __init__(self) -> None:
        self._given: list[Tensor] = []
        self._here: list[Tensor] = []

    def later(self, tensor: Tensor) -> Later[Tensor]:
        """Returns a function that returns the tensor in float64 on the CPU."""
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
        """Returns a function that returns the values of tensors of one element; numbers pass as they are."""
        found: list[float | Later[Tensor]] = []
        for number in numbers:
            if not isinstance(number, Tensor):
                found.append(number)
            else:
                found.append(number.item() if number.is_cpu else self.later(number.reshape(())))
        return lambda: [number().item() if callable(number) else number for number in found]

    def _bring(self) -> None:
        """Brings all that was given to the host, by one wait for each device."""
        given, self._given = self._given, []
        by_device: dict[torch.device, list[Tensor]] = {}
        for t in given:
            by_device.setdefault(t.device, []).append(t.reshape(-1))
        flat = {device: torch.cat(own).double().cpu() for device, own in by_device.items()}
        parts = {device: iter(flat[device].split([len(t) for t in own])) for device, own in by_device.items()}
        self._here += [next(parts[t.device]).view(t.shape) for t in given]


class Arriving:
    """A tensor on its way to the host; reading it waits only for what was queued on the GPU before it was sent."""

    def __init__(self, t: Tensor):
        self._copy, self._event = t.detach(), None
        if t.is_cuda:
            self._copy = torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=True).copy_(self._copy, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(t.device))  # where the copy is; the current device may be another

    @property
    def here(self) -> bool:
        """Tells whether it has arrived, so that reading it does not wait."""
        return self._event is None or self._event.query()

    def read(self) -> Tensor:
        """Returns the tensor."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy


def host_numbers(numbers: Sequence[Tensor | float]) -> list[float]:
    """Returns the values of tensors of one element, and numbers as they are; waits for the device once."""
    return Transfer().numbers(numbers)()


def finite(tensors: Sequence[Tensor]) -> Tensor:
    """Tells by a boolean tensor [] whether the sums of all tensors are finite: then they hold neither NaN nor inf."""
    return torch.stack([t.sum() for t in tensors]).isfinite().all()


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Tells as a bool whether tensors, if there are any, hold neither NaN nor inf; waits for the device once."""
    return not tensors or bool(finite(tensors))
