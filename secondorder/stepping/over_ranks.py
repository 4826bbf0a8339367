"""A loss as a function of the parameters over several processes: the mean of their losses."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from secondorder._distributed import RankReducer
from secondorder._tape import Tape
from secondorder._tensors import Later, Transfer
from secondorder.errors import second_derivatives


class LossOverRanks(ABC):
    """Makes the value and the quadratic terms of a loss means over ranks.

    Args:
        ranks: whose losses' mean it is; None: this process's alone.
        instances: of this process's batches, once they are asked for.
    """

    tape: Tape  # muted during evaluations

    def __init__(self, ranks: RankReducer | None, instances: Later[float]):
        self.ranks, self._instances = ranks, instances

    @property
    def instances(self) -> int:
        """Returns how many instances the batches of all ranks have."""
        return round(self._mean(self._instances) * (1 if self.ranks is None else self.ranks.size))

    def products(self, vectors: list[list[Tensor]], transfer: Transfer) -> Later[tuple[Tensor, Tensor]]:
        """Returns what gives x_k^T g [k] and x_k^T G x_l [k, k], in float64 on the CPU; x_k have the parameters' shapes."""
        if self.ranks is None:
            return self._products(vectors, transfer)
        packed = self.ranks.mean(lambda: torch.cat([t.flatten() for t in self._products(vectors, transfer)()]))
        return lambda: (packed[: len(vectors)], packed[len(vectors) :].view(len(vectors), -1))

    @abstractmethod
    def _products(self, vectors: list[list[Tensor]], transfer: Transfer) -> Later[tuple[Tensor, Tensor]]:
        """Returns what gives these products for this process alone."""

    def _mean(self, compute: Callable[[], float]) -> float:
        """Returns the mean over ranks."""
        if self.ranks is None:
            return compute()
        return float(self.ranks.mean(lambda: torch.tensor(compute(), dtype=torch.float64, device="cpu")))

    @contextmanager
    def _differentiating(self) -> Iterator[None]:
        """Mutes the tape and explains missing second derivatives: around code that differentiates the loss twice."""
        with self.tape.muted(), second_derivatives("loss", "EACG or EigenAdam. No parameter and no state has changed"):
            yield
