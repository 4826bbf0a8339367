"""Saves and restores the state of the random generators, so that random layers repeat what they drew."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

_ONE_AT_A_TIME = threading.RLock()


class RandomState(NamedTuple):
    """The states of torch's global generators."""

    cpu: Tensor
    cuda: list[Tensor]  # one a device; empty where CUDA has not been used

    @classmethod
    def now(cls) -> "RandomState":
        """Returns the present states."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])

    def restore(self) -> None:
        """Sets the generators to these states."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


def preserved_generators(tensors: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Restores the CPU's generator, and those of the tensors' CUDA devices, at its end."""
    return torch.random.fork_rng(devices=list(_cuda_devices(tensors)))


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Lets one thread set the global generators at a time: two threads may train two models."""
    with _ONE_AT_A_TIME:
        yield


def _cuda_devices(tensors: Iterable[Tensor]) -> set[torch.device]:
    return {t.device for t in tensors if t.device.type == "cuda"}
