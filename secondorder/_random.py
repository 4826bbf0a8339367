"""The state of the random generators: taken, set, and replayed, so that random layers repeat what they drew."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

# The global generators are the process's, as are the levels of forward-mode differentiation: two threads may train two models.
_ONE_AT_A_TIME = threading.Lock()


class RandomState(NamedTuple):
    """The states of torch's global generators."""

    cpu: Tensor
    cuda: list[Tensor]  # one a device; empty where CUDA has not been used

    @classmethod
    def now(cls) -> "RandomState":
        """The states at this moment."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])

    def restore(self) -> None:
        """Sets the generators to these states."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


def preserved_generators(tensors: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Leaves the CPU's generator, and those of the tensors' CUDA devices, as they were before."""
    return torch.random.fork_rng(devices=list(_cuda_devices(tensors)))


class SeededReplay:
    """Has the global generators start from one seed, as often as it is entered, and leaves them as they were.

    Args:
        seed: of the CPU's generator and of those of the tensors' CUDA devices.
        tensors: what the random layers act on.
    """

    def __init__(self, seed: int, tensors: Iterable[Tensor]):
        self.seed, self.devices = seed, list(_cuda_devices(tensors))
        self.cpu = torch.Generator().manual_seed(seed).get_state()  # setting a state takes a hundredth of manual_seed's time

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Within it every random layer draws the same numbers each time; one thread at a time."""
        with _ONE_AT_A_TIME, torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.cpu)
            if self.devices:
                torch.cuda.manual_seed_all(self.seed)
            yield


def _cuda_devices(tensors: Iterable[Tensor]) -> set[torch.device]:
    return {t.device for t in tensors if t.device.type == "cuda"}
