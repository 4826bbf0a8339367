"""EigenAdam where ranks share the rows of every parameter, as `fully_shard` deals them out in DTensors.

A rank has some rows of W, b, their gradients, R and E. V, U, C, T, the mean input and some rows of E in `last` are whole on every
rank. The sums over all rows that this needs, O(k (n + p)) numbers for a matrix, are taken for all matrices at once.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from secondorder import ops, reference
from secondorder._tensors import here, is_sharded
from secondorder.optim._eigen_state import REFUSED, UNRENEWED, new_bases, sampled_rows
from secondorder.optim._matrices import Matrix

MOMENTS = ("exp_avg", "exp_avg_sq", "last")

# A generator that works on this rank's rows of a matrix: it yields terms, and is sent their sums over all ranks.
Rows = Generator[list[Tensor], list[Tensor], Any]


class Shards:
    """The ranks that share the rows of parameters.

    Attributes:
        groups: the process groups, one for each dimension of the ranks' mesh.
        ranks: how many ranks there are.
    """

    def __init__(self, mesh: Any):
        self.groups: list[dist.ProcessGroup] = [mesh.get_group(dim) for dim in range(mesh.ndim)]
        self.ranks: int = mesh.size()

    def sum_(self, t: Tensor) -> None:
        """Sums a tensor over all ranks, in place."""
        for group in self.groups:
            dist.all_reduce(t, group=group)


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


def _start(matrix: Matrix) -> int:
    """Returns which row of the matrix is the first one on this rank: rows are dealt out as by torch.chunk."""
    weight: Any = matrix.weight
    dim = _shard_dim(weight) if is_sharded(weight) else None
    if dim is None:
        return 0
    n, ranks = weight.shape[0], weight.device_mesh.size(dim)
    return min(n, -(-n // ranks) * int(weight.device_mesh.get_local_rank(dim)))


def _all_rows(matrix: Matrix) -> tuple[int, int]:
    """Returns [n, p] of the whole matrix, where the elements of a sharded vector count as rows."""
    if not is_sharded(matrix.weight):
        return matrix.shape
    n = matrix.weight.shape[0]
    return n, matrix.weight.numel() // n


def _copies(matrix: Matrix, shards: Shards) -> int:
    """Returns how many ranks have the same rows."""
    weight: Any = matrix.weight
    dim = _shard_dim(weight) if is_sharded(weight) else None
    return shards.ranks if dim is None else shards.ranks // int(weight.device_mesh.size(dim))


# --- the state ---------------------------------------------------------------------------------------------------------------


def new_sharded_state(matrix: Matrix, rank: int) -> dict[str, Any]:
    """Returns the state of a matrix, with a tensor for each part of a moment, "exp_avg_C" and so on; R and E are DTensors."""
    state = new_bases(matrix, rank)
    zero, shapes = state["mean"].new_zeros(()), part_shapes(matrix, state)
    for name in MOMENTS:
        for part, (rows, columns) in shapes.items():
            if name == "last" and part == "E":
                rows = _sampled(matrix, state)
            if rows and columns:
                state[f"{name}_{part}"] = placed(zero.expand(rows, columns), matrix, part)
    return state


def relaid(matrix: Matrix, state: dict[str, Any]) -> dict[str, Any]:
    """Returns a matrix' state with its moments as they are kept for this matrix: in one tensor, or in one for each part."""
    if is_sharded(matrix.weight):
        state = dict(state)
        for name in MOMENTS:
            if name in state:
                parts = reference.eigen_split(state.pop(name), part_shapes(matrix, state))
                state |= {f"{name}_{part}": value for part, value in parts.items() if value.numel()}
            keys = {f"{name}_{part}": part for part in "CRTE"}
            state |= {key: placed(state[key], matrix, part) for key, part in keys.items() if key in state}
    elif MOMENTS[0] not in state:
        state = dict(state)
        for name in MOMENTS:
            every = [state.pop(f"{name}_{part}") for part in "CRTE" if f"{name}_{part}" in state]
            state[name] = torch.cat([(each.full_tensor() if is_sharded(each) else each).flatten() for each in every])
    return state


def moments_here(matrix: Matrix, state: dict[str, Any], name: str) -> dict[str, Tensor]:
    """Returns the parts of a moment, to be written to; of R and E the rows that this rank has."""
    shapes = part_shapes(matrix, state)
    if name in state:
        return reference.eigen_split(state[name], shapes)
    rows, empty = matrix.shape_here[0], state["mean"]
    return {
        part: here(state[f"{name}_{part}"])
        if f"{name}_{part}" in state
        else empty.new_zeros(rows if part in "RE" else shape[0], shape[1])
        for part, shape in shapes.items()
    }


def captured_here(matrix: Matrix, state: dict[str, Any]) -> Tensor | None:
    """Returns the share of a gradient's mean square that is not in E, by this rank's rows; None: it has none."""
    rows, squares = matrix.shape_here[0], moments_here(matrix, state, "exp_avg_sq")
    if not rows:
        return None
    sums = {
        part: value.double().sum() * (_all_rows(matrix)[0] / rows if part in "RE" else 1.0) for part, value in squares.items()
    }
    whole = torch.stack([*sums.values()]).sum()
    return torch.where(whole > 0, 1 - sums.get("E", torch.zeros_like(whole)) / whole, 0.0)


def part_shapes(matrix: Matrix, state: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Returns the shapes of the whole parts of a moment."""
    return reference.eigen_shapes(*_all_rows(matrix), len(state["basis_out"]), len(state["basis_in"]), matrix.bias is not None)


def _sampled(matrix: Matrix, state: dict[str, Any]) -> int:
    """Returns how many rows of E there are in `last`: for a vector, whose elements are rows, all."""
    n, p = _all_rows(matrix)
    return n if matrix.weight.dim() < 2 else sampled_rows(n, p, len(state["basis_out"]))


def placed(whole: Tensor, matrix: Matrix, part: str) -> Tensor:
    """Returns a part of a moment as it is kept: as a DTensor, placed as the weight is, if it has a row for each of its rows."""
    if part in "CT" or len(whole) != _all_rows(matrix)[0] or is_sharded(whole):
        return whole if is_sharded(whole) else whole.clone(memory_format=torch.contiguous_format)
    from torch.distributed.tensor import DTensor

    weight: Any = matrix.weight
    own = whole[_start(matrix) :][: matrix.shape_here[0]].clone(memory_format=torch.contiguous_format)
    mesh, placements = weight.device_mesh, weight.placements
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=whole.shape, stride=(whole.shape[1], 1))


# --- the step ----------------------------------------------------------------------------------------------------------------


class _NotFiniteError(Exception):
    """The squares of some rank's gradients or sketches are not finite."""


class ShardedOperators:
    """`ops.eigen_renew_` and `ops.eigen_step_` for matrices of which each rank has some rows.

    The arguments are the operators', except that W, b, G and g have this rank's rows, and moments are those of `moments_here`.
    """

    def __init__(self, shards: Shards, matrices: list[Matrix], states: list[dict[str, Any]]):
        self._shards, self._starts = shards, [_start(matrix) for matrix in matrices]
        self._rows, self._width = zip(*[_all_rows(matrix) for matrix in matrices], strict=True)
        self._sampled = [_sampled(matrix, state) for matrix, state in zip(matrices, states, strict=True)]
        self._shares = [1 / _copies(matrix, shards) for matrix in matrices]

    def eigen_renew_(
        self,
        mean: Sequence[Tensor],
        basis_out: Sequence[Tensor],
        basis_in: Sequence[Tensor],
        scale_out: Sequence[Tensor],
        scale_in: Sequence[Tensor],
        first: Sequence[dict[str, Tensor]],
        control: Tensor,
        grad_weight: Sequence[Tensor],
        grad_bias: Sequence[Tensor],
        sketch: Sequence[Tensor],
        bias_hessian: Sequence[Tensor],
        rows: Sequence[int],
        share: Sequence[float],
    ) -> None:
        tasks = [
            reference.eigen_renew_rows_(
                mean[i], basis_out[i], basis_in[i], scale_out[i], scale_in[i], first[i], grad_weight[i], grad_bias[i], sketch[i],
                bias_hessian[i], rows[i], share[i], start, _orthonormal,
            )
            if len(basis_out[i])
            else _nothing()
            for i, start in enumerate(self._starts)
        ]  # fmt: skip
        if self._together(tasks, [*zip(grad_weight, grad_bias, strict=True)], sketch) is None:
            control[UNRENEWED] = 1

    def eigen_step_(
        self,
        weight: Sequence[Tensor],
        bias: Sequence[Tensor],
        first: Sequence[dict[str, Tensor]],
        second: Sequence[dict[str, Tensor]],
        last: Sequence[dict[str, Tensor]],
        size: Sequence[Tensor],
        control: Tensor,
        grad_weight: Sequence[Tensor],
        grad_bias: Sequence[Tensor],
        mean: Sequence[Tensor],
        basis_out: Sequence[Tensor],
        basis_in: Sequence[Tensor],
        lr: Sequence[float],
        lr_bias: Sequence[float],
        decay: Sequence[float],
        decay_bias: Sequence[float],
        step: Sequence[int],
        beta1: float,
        beta2: float,
        eps: float,
        renewed: bool,
    ) -> None:
        length = reference.eigen_length(control)
        tasks = []
        for i, start in enumerate(self._starts):
            u, v = basis_out[i], basis_in[i]
            if not len(u) and not len(v):
                u, v = u.new_zeros(0, self._rows[i]), v.new_zeros(0, self._width[i])
            tasks.append(
                reference.eigen_step_rows_(
                    weight[i], bias[i], first[i], second[i], last[i], size[i], grad_weight[i], grad_bias[i], mean[i], u, v,
                    length, lr[i], lr_bias[i], decay[i], decay_bias[i], step[i], beta1, beta2, eps, start, self._sampled[i],
                )
            )  # fmt: skip
        refused = bool(control[UNRENEWED])
        slopes = None if refused else self._together(tasks, [*zip(grad_weight, grad_bias, strict=True)], [])
        if slopes is None:
            control[REFUSED] += 1
            control[UNRENEWED] = 0
        else:
            slope, last_slope = torch.stack(slopes).sum(0).tolist()
            reference.eigen_control_(control, slope, last_slope, renewed)

    def _together(
        self, tasks: list[Rows], gradients: list[tuple[Tensor, Tensor]], sketches: Sequence[Tensor]
    ) -> list[Any] | None:
        """Runs tasks side by side; returns what they return, or None, with nothing written, if some squares are not finite.

        Args:
            tasks: one for each matrix.
            gradients: G and g of every matrix, to be checked.
            sketches: sums over inputs, to be checked.
        """
        checked = [(t, share) for pair, share in zip(gradients, self._shares, strict=True) for t in pair]
        checked += [(sketch, 1 / self._shards.ranks) for sketch in sketches]
        every = [(_check(checked), 1.0), *zip(tasks, self._shares, strict=True)]
        asked, returned = [(*each, next(each[0])) for each in every], {}
        try:
            while asked:
                sums = self._summed([[share * piece.double() for piece in pieces] for _, share, pieces in asked])
                going = []
                for (task, share, pieces), got in zip(asked, sums, strict=True):
                    try:
                        going.append((task, share, task.send([g.to(p.dtype) for g, p in zip(got, pieces, strict=True)])))
                    except StopIteration as end:
                        returned[task] = end.value
                asked = going
        except _NotFiniteError:
            return None
        return [returned[task] for task in tasks]

    def _summed(self, pieces: list[list[Tensor]]) -> Iterator[list[Tensor]]:
        """Yields the lists of tensors summed over all ranks, in one exchange for each dimension of their mesh."""
        every = [piece for each in pieces for piece in each]
        flat = torch.cat([piece.flatten() for piece in every])
        self._shards.sum_(flat)
        sums = iter(part.view(piece.shape) for part, piece in zip(flat.split([p.numel() for p in every]), every, strict=True))
        for each in pieces:
            yield [next(sums) for _ in each]


def _nothing() -> Rows:
    """Returns the task of a matrix that has no bases to be renewed."""
    yield []


def _check(checked: list[tuple[Tensor, float]]) -> Rows:
    """Raises if the sum of a tensor's squares over all ranks is not finite, or nearly so. Waits for the device."""
    (sums,) = yield [torch.stack([share * t.double().square().sum() for t, share in checked])]
    limits = [torch.finfo(t.dtype).max / 4 for t, _ in checked]
    if not all(value < limit for value, limit in zip(sums.tolist(), limits, strict=True)):
        raise _NotFiniteError


def _orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the rows made orthonormal, and their lengths before.

    It calls the operator that renews bases, for a matrix whose inputs have these rows as their sketch.
    """
    (k, p), nothing = rows.shape, rows.new_zeros(0)
    scale = rows.abs().max().clamp(min=torch.finfo(rows.dtype).tiny)  # the operator refuses numbers with infinite squares
    basis, lengths, single = torch.zeros_like(rows), rows.new_zeros(k), rows.new_zeros(1)
    ops.eigen_renew_(
        [nothing], [torch.ones_like(single).view(1, 1)], [basis], [single], [lengths], [rows.new_zeros(k + (p if k < p else 0))],
        torch.zeros(len(ops.CONTROL), dtype=torch.float64, device=rows.device), [rows.new_zeros(1, p)], [nothing],
        [torch.cat([rows / scale, rows.new_zeros(1, p)])], [nothing], [1], [1.0],
    )  # fmt: skip
    return basis, lengths * scale
