"""What a loss as a function of the parameters is over several processes: the mean of theirs."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from secondorder._distributed import RankReducer
from secondorder._tensors import Later, Transfer


class LossOverRanks(ABC):
    """A loss whose value and quadratic terms are means over ranks.

    Args:
        ranks: whose losses' mean it is; None: this process's alone.
        instances: of this process's batches, once they are asked for.
    """

    def __init__(self, ranks: RankReducer | None, instances: Later[float]):
        self.ranks, self._instances = ranks, instances

    @property
    def instances(self) -> int:
        """How many instances the batches have, of all ranks."""
        return round(self._mean(self._instances) * (1 if self.ranks is None else self.ranks.size))

    def products(self, vectors: list[list[Tensor]], transfer: Transfer) -> Later[tuple[Tensor, Tensor]]:
        """Gives x_k^T g [k] and x_k^T G x_l [k, k], for vectors x_k of the parameters' shapes, in float64 on the CPU."""
        if self.ranks is None:
            return self._products(vectors, transfer)
        packed = self.ranks.mean(lambda: torch.cat([t.flatten() for t in self._products(vectors, transfer)()]))
        return lambda: (packed[: len(vectors)], packed[len(vectors) :].view(len(vectors), -1))

    @abstractmethod
    def _products(self, vectors: list[list[Tensor]], transfer: Transfer) -> Later[tuple[Tensor, Tensor]]:
        """The same of this process."""

    def _mean(self, compute: Callable[[], float]) -> float:
        """The mean over ranks."""
        if self.ranks is None:
            return compute()
        return float(self.ranks.mean(lambda: torch.tensor(compute(), dtype=torch.float64)))
