"""EigenAdam where ranks share the rows of every parameter, as `fully_shard` deals them out in DTensors.

A rank has some rows of W, b, their gradients, R and E. V, U, C, T, the mean input and some rows of E in `last` are whole on every
rank. The sums over all rows that this needs, O(k (n + p)) numbers for a matrix, are taken for all matrices at once.
"""

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from secondorder._tensors import is_sharded
from secondorder.optim._eigen.matrices import Matrix


class Shards:
    """The ranks that share the rows of parameters.

    Attributes:
        groups: the process groups, one for each dimension of the ranks' mesh.
        ranks: how many ranks there are.
    """

    def __init__(self, mesh: Any):
        self.groups: list[dist.ProcessGroup] = [mesh.get_group(dim) for dim in range(mesh.ndim)]
        self.ranks: int = mesh.size()

    def all_reduce_(self, t: Tensor) -> None:
        """Sums a tensor over all ranks, in place."""
        for group in self.groups:
            dist.all_reduce(t, group=group)

    def norms(self, local: Tensor) -> Tensor:
        """Returns norms from those of each rank's rows; rows that several ranks have count as often."""
        squares = local.double().square()
        self.all_reduce_(squares)
        return squares.sqrt().to(local)


def found_shards(owner: str, parameters: Iterable[Tensor], model: nn.Module | None) -> Shards | None:
    """Returns the ranks that share the parameters' rows; None: no parameter is a DTensor.

    It also reshards modules whose weights `fully_shard` has gathered.

    Raises:
        ValueError: parameters are sharded in another way than by rows over one dimension of one mesh.
    """
    sharded: list[Any] = [p for p in parameters if is_sharded(p)]
    if not sharded:
        return None
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import Replicate, Shard

    for module in model.modules() if model is not None else ():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward pass it may hold whole weights
    names = {p: name for name, p in model.named_parameters()} if model is not None else {}
    for i, p in enumerate(sharded):
        kinds = [type(placement) for placement in p.placements]
        by_rows = {*kinds} <= {Replicate, Shard} and kinds.count(Shard) <= 1
        if not by_rows or any(placement.is_shard() and placement.dim != 0 for placement in p.placements):
            raise ValueError(
                f"{owner}: expected DTensor parameters that are sharded by rows over one dimension of a mesh, Shard(0), as "
                f"fully_shard's are, got {names.get(p, f'parameter {i}')!r} of placements {tuple(p.placements)}; give what is "
                "sharded in another way, as tensor parallel layers, to another optimizer"
            )
        if p.device_mesh != sharded[0].device_mesh:
            raise ValueError(
                f"{owner}: expected all DTensor parameters on one mesh, got {names.get(p, f'parameter {i}')!r} on "
                f"{p.device_mesh} beside {sharded[0].device_mesh}; make an optimizer for each"
            )
    return Shards(sharded[0].device_mesh)


def _shard_dim(weight: Any) -> int | None:
    """Returns the dimension of the mesh over which a parameter is sharded, if any."""
    return next((dim for dim, placement in enumerate(weight.placements) if placement.is_shard()), None)


def first_row(matrix: Matrix) -> int:
    """Returns which row of the matrix is the first one on this rank: rows are dealt out as by torch.chunk."""
    weight: Any = matrix.weight
    dim = _shard_dim(weight) if is_sharded(weight) else None
    if dim is None:
        return 0
    n, ranks = weight.shape[0], weight.device_mesh.size(dim)
    return min(n, -(-n // ranks) * int(weight.device_mesh.get_local_rank(dim)))


def whole_shape(matrix: Matrix) -> tuple[int, int]:
    """Returns [n, p] of the whole matrix, where the elements of a sharded vector count as rows."""
    if not is_sharded(matrix.weight):
        return matrix.shape
    n = matrix.weight.shape[0]
    return n, matrix.weight.numel() // n


def copies(matrix: Matrix, shards: Shards) -> int:
    """Returns how many ranks have the same rows."""
    weight: Any = matrix.weight
    dim = _shard_dim(weight) if is_sharded(weight) else None
    return shards.ranks if dim is None else shards.ranks // int(weight.device_mesh.size(dim))
