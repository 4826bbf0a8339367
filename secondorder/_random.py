"""The state of the random generators: taken, set, and replayed, so that random layers repeat what they drew."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
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


class SeededReplay:
    """Has the global generators start from one seed, as often as it is entered, and leaves them as they were.

    Args:
        seed: of the CPU's generator and of those of `devices`.
        devices: the CUDA devices whose generators are drawn from.
    """

    def __init__(self, seed: int, devices: set[torch.device]):
        self.seed, self.devices = seed, list(devices)
        self.cpu = torch.Generator().manual_seed(seed).get_state()  # setting a state takes a hundredth of manual_seed's time

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Within it every random layer draws the same numbers each time; one thread at a time."""
        with _ONE_AT_A_TIME, torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.cpu)
            if self.devices:
                torch.cuda.manual_seed_all(self.seed)
            yield
