"""EigenAdam's operators for matrices of which each rank has some rows."""

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from secondorder import ops, reference
from secondorder.ops.eigen import REFUSED, UNRENEWED
from secondorder.optim._eigen.matrices import Matrix
from secondorder.optim._eigen.sharded_state import sampled_count
from secondorder.optim._eigen.shards import Shards, copies, first_row, whole_shape

# A generator that works on this rank's rows of a matrix: it yields terms, and is sent their sums over all ranks.
Rows = Generator[list[Tensor], list[Tensor], Any]


class _NotFiniteError(Exception):
    """The squares of some rank's gradients or sketches are not finite."""


class ShardedOperators:
    """`ops.eigen_renew_` and `ops.eigen_step_` for matrices of which each rank has some rows.

    The arguments are the operators', except that W, b, G and g have this rank's rows, and moments are those of `local_moments`.
    """

    def __init__(self, shards: Shards, matrices: list[Matrix], states: list[dict[str, Any]]):
        self._shards, self._starts = shards, [first_row(matrix) for matrix in matrices]
        self._rows, self._width = zip(*[whole_shape(matrix) for matrix in matrices], strict=True)
        self._sampled = [sampled_count(matrix, state) for matrix, state in zip(matrices, states, strict=True)]
        # What a matrix' terms of this rank count in sums over all ranks, some of which may have the same rows.
        self._fractions = [1 / copies(matrix, shards) for matrix in matrices]

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
        length = reference.eigen_length(control.tolist())
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
        checked = [(t, fraction) for pair, fraction in zip(gradients, self._fractions, strict=True) for t in pair]
        checked += [(sketch, 1 / self._shards.ranks) for sketch in sketches]
        every = [(_check(checked), 1.0), *zip(tasks, self._fractions, strict=True)]
        asked, returned = [(*each, next(each[0])) for each in every], {}
        try:
            while asked:
                sums = self._summed([[fraction * piece.double() for piece in pieces] for _, fraction, pieces in asked])
                going = []
                for (task, fraction, pieces), got in zip(asked, sums, strict=True):
                    try:
                        going.append((task, fraction, task.send([g.to(p.dtype) for g, p in zip(got, pieces, strict=True)])))
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
        self._shards.all_reduce_(flat)
        sums = iter(part.view(piece.shape) for part, piece in zip(flat.split([p.numel() for p in every]), every, strict=True))
        for each in pieces:
            yield [next(sums) for _ in each]


def _nothing() -> Rows:
    """Returns the task of a matrix that has no bases to be renewed."""
    yield []


def _check(checked: list[tuple[Tensor, float]]) -> Rows:
    """Raises if the sum of a tensor's squares over all ranks is not finite, or nearly so. Waits for the device."""
    (sums,) = yield [torch.stack([fraction * t.double().square().sum() for t, fraction in checked])]
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
