"""Curvature of the batches of all ranks that average their gradients, as DistributedDataParallel has them do.

DDP's gradients are those of (1/N) sum_r L_r, the mean of the N ranks' losses. One process that went backward through the ranks'
batches in turn, each loss over N, would have them too; all ranks compute its curvature. What is on the scale of the loss (the
criterion's Hessian, the sums of gradients in the recursion's diagonal, Fisher blocks) is therefore the mean over ranks, while an
expectation over instances (E[d1 d1^T], E[h], E[h h^T]) is the mean over all instances, whichever rank has them.

The averages come before the recursion, which is not linear in them; from there on all ranks compute the same numbers.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from secondorder.errors import NonFiniteError

T = TypeVar("T")
K = TypeVar("K")

_FINE, _FAILED, _NOT_FINITE = range(3)


class RankTerm(NamedTuple):
    """Holds what a rank contributes to an average."""

    name: str
    value: Tensor
    instances: float | None = None  # how many the value is a mean of, or the sum of their weights; None: every rank counts alike


class RankReducer:
    """The processes of a group. Every method is called by all of them; if it raises on one, it raises on all.

    Args:
        group: a process group, of any backend.
        device: of the tensors that are exchanged.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.group, self.device = group, device
        self.size = dist.get_world_size(group)

    def all(self, compute: Callable[[], T], signature: Callable[[T], object] = lambda _: None) -> T:
        """Runs `compute` on every rank; raises on all ranks if one has failed or the signatures of their results differ.

        Raises:
            NonFiniteError: on all ranks, where that is why ranks have failed.
            RuntimeError: on the other ranks, where one has failed; the signatures differ.
        """
        error: Exception | None = None
        status = [_FINE, 0]
        try:
            result = compute()
            status[1] = zlib.crc32(repr(signature(result)).encode())
        except Exception as raised:
            error, status[0] = raised, _NOT_FINITE if isinstance(raised, NonFiniteError) else _FAILED
        mine = torch.tensor(status, device=self.device)
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(gathered, mine, group=self.group)
        if error is not None:
            raise error
        codes, signatures = zip(*(each.tolist() for each in gathered), strict=True)
        failed = [rank for rank, code in enumerate(codes) if code != _FINE]
        if failed:
            kind = NonFiniteError if all(codes[rank] == _NOT_FINITE for rank in failed) else RuntimeError
            raise kind(f"the step has failed on rank {', '.join(map(str, failed))}, which says why; nothing has changed here")
        if len(set(signatures)) > 1:
            raise RuntimeError(
                "expected the same layers to be part of the loss on all ranks, since their curvature is averaged over them; "
                f"here: {signature(result)}"
            )
        return result

    def average(self, compute: Callable[[], list[RankTerm]]) -> list[Tensor]:
        """Returns the averages over ranks of what `compute()` returns on each: the same names and shapes everywhere."""
        terms = self.all(compute, lambda terms: [(term.name, tuple(term.value.shape)) for term in terms])
        if not terms:
            return []
        weights = torch.tensor(
            [1.0 if term.instances is None else term.instances for term in terms], dtype=torch.float64, device="cpu"
        )
        dtype = max((term.value.dtype for term in terms), key=lambda d: torch.finfo(d).bits)
        scaled = [
            # The mean over no instance is NaN.
            (term.value if weight else torch.zeros_like(term.value)).reshape(-1).to(self.device, dtype) * weight
            for term, weight in zip(terms, weights.tolist(), strict=True)
        ]
        flat = torch.cat([*scaled, weights.to(self.device, dtype)])
        dist.all_reduce(flat, group=self.group)
        *sums, totals = flat.split([*(term.value.numel() for term in terms), len(terms)])
        return [
            (total / torch.where(weight > 0, weight, 1)).to(term.value.device, term.value.dtype).reshape(term.value.shape)
            for term, total, weight in zip(terms, sums, totals, strict=True)
        ]

    def mean(self, compute: Callable[[], Tensor]) -> Tensor:
        """Returns the mean over ranks of one tensor."""
        (mean,) = self.average(lambda: [RankTerm("", compute())])
        return mean

    def dealt(self, costs: Sequence[float]) -> list[bool]:
        """Tells which pieces of work are this rank's: from the costliest on, each goes to the rank with the least work so far."""
        loads, mine = [0.0] * self.size, [False] * len(costs)
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            rank = loads.index(min(loads))
            loads[rank] += costs[i]
            mine[i] = rank == dist.get_rank(self.group)
        return mine

    def joined(self, own: Mapping[K, Tensor], like: Mapping[K, Tensor]) -> dict[K, Tensor]:
        """Returns the tensors of all keys, each of which one rank has; `like` has their shapes and dtypes on every rank."""
        dtype = max((t.dtype for t in like.values()), key=lambda d: torch.finfo(d).bits)
        flat = torch.cat([own.get(key, torch.zeros_like(t)).flatten().to(self.device, dtype) for key, t in like.items()])
        dist.all_reduce(flat, group=self.group)
        parts = flat.split([t.numel() for t in like.values()])
        return {key: part.view(t.shape).to(t.device, t.dtype) for (key, t), part in zip(like.items(), parts, strict=True)}


@contextmanager
def in_one_process(owner: str) -> Iterator[None]:
    """Raises where DistributedDataParallel is called within it over several processes, since their steps would differ.

    Args:
        owner: the name of an optimizer that knows of no other process.
    """
    if not (dist.is_available() and dist.is_initialized()):
        yield
        return

    def refuse(module: nn.Module, _: Any) -> None:
        if isinstance(module, DistributedDataParallel) and dist.get_world_size(module.process_group) > 1:
            raise RuntimeError(
                f"{owner}.step(): expected a net in one process, got one in DistributedDataParallel over "
                f"{dist.get_world_size(module.process_group)} of them, whose steps would differ; train in one process, or take "
                "EigenAdam"
            )

    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()
