"""Sums over the inputs of layers, which forward passes show EigenAdam for the renewal of bases."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secondorder import ops
from secondorder.optim._eigen.matrices import Matrix
from secondorder.optim._eigen.tables import AllReduce


@dataclass
class Sketch:
    """Sums over a layer's inputs h, made by `ops.eigen_sketch_`.

    Attributes:
        sums: V^T sum x x^T and below it sum x, with x = h - shift [k + 1, p].
        shift: what is subtracted from every input [p]; [0] for nothing, without a bias.
        rows: how many inputs there were.
    """

    sums: Tensor
    shift: Tensor
    rows: int = 0


class Sketches:
    """The sketches of the inputs that layers have had since the last step."""

    def __init__(self) -> None:
        self.by_matrix: dict[Matrix, Sketch] = {}
        self._captured = False  # whether a CUDA graph captures them

    def clear(self) -> None:
        """Forgets all sketches."""
        self.by_matrix.clear()

    def drop(self, matrix: Matrix) -> None:
        """Forgets a matrix' sketch, if it has one."""
        self.by_matrix.pop(matrix, None)

    def expect(self, captured: bool) -> None:
        """Forgets sketches that a CUDA graph has captured unless one captures this call, too, and the other way round."""
        if self._captured != captured:
            self.by_matrix.clear()
            self._captured = captured

    def add(
        self, matrix: Matrix, state: dict[str, Any], rows: Tensor, alone: bool, control: Tensor | None, renew_every: int
    ) -> None:
        """Adds inputs to a matrix' sketch.

        Args:
            matrix: the matrix that multiplies the inputs.
            state: its state.
            rows: the inputs [m, p].
            alone: whether no other process has inputs, and the mean of inputs is known without a wait for a device.
            control: of the step length, if a CUDA graph captures this call; see `ops.eigen_sketch_`.
            renew_every: how often bases are renewed, if a graph captures it; else 0.
        """
        sketch = self.by_matrix.get(matrix)
        if sketch is None:
            shift = state["mean"]
            if not state["renewals"] and shift.numel() and alone and (mean := rows.mean(0)).isfinite().all():
                shift = mean  # the state gets it with the next step, even if that is of another forward pass
            sketch = self.by_matrix[matrix] = Sketch(rows.new_zeros(len(state["basis_in"]) + 1, rows.shape[1]), shift)
        ops.eigen_sketch_(sketch.sums, rows, state["basis_in"], sketch.shift, control, renew_every)
        sketch.rows += len(rows)

    def averaged(
        self, matrices: list[Matrix], states: Mapping[Tensor, dict[str, Any]], all_reduce_: AllReduce
    ) -> dict[Matrix, Sketch]:
        """Returns the sketches of all processes' inputs, divided by the number of inputs.

        Args:
            matrices: the matrices with a gradient.
            states: the states, by weight.
            all_reduce_: sums a tensor over all processes, in place.
        """
        wanted = [matrix for matrix in matrices if matrix.has_bases and matrix.layers]
        if not wanted:
            return {}
        local = []
        for matrix in wanted:
            state = states[matrix.weight]
            empty = state["basis_in"].new_zeros(len(state["basis_in"]) + 1, matrix.shape[1])
            sketch = self.by_matrix.get(matrix) or Sketch(empty, state["mean"])
            local += [sketch.sums.flatten(), empty.new_full((1,), sketch.rows)]
        flat = torch.cat(local)
        all_reduce_(flat)
        pieces = flat.split([piece.numel() for piece in local])
        counts = pieces[1::2]
        if any(matrix not in self.by_matrix or not self.by_matrix[matrix].rows for matrix in wanted):
            # No process may have inputs of some matrix. A process that has inputs of each need not wait for the device.
            counts = torch.cat(counts).tolist()
        return {
            matrix: Sketch((sums / rows).view(-1, matrix.shape[1]), states[matrix.weight]["mean"], 1)
            for matrix, sums, rows in zip(wanted, pieces[::2], counts, strict=True)
            if isinstance(rows, Tensor) or rows
        }
