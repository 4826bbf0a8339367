"""What forward passes show EigenAdam of layers' inputs, summed up for the renewal of bases."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secondorder import ops
from secondorder.optim._matrices import Matrix
from secondorder.optim._tables import Sum

Replay = tuple[()] | tuple[Tensor, int]


@dataclass
class Sketch:
    """What `ops.eigen_sketch_` has made of a layer's inputs.

    Attributes:
        sums: [k + 1, p]: V^T sum x x^T and sum x, where x = h - shift are inputs.
        shift: [p]; [0] without a bias, for none.
        rows: how many inputs there were.
    """

    sums: Tensor
    shift: Tensor
    rows: int = 0


class Sketches:
    """The sketches of the inputs that layers have had since the last step."""

    def __init__(self) -> None:
        self.of: dict[Matrix, Sketch] = {}
        self._captured = False  # whether a CUDA graph makes them

    def clear(self) -> None:
        self.of.clear()

    def expect(self, captured: bool) -> None:
        """Forgets those that a CUDA graph makes where one does not capture this, and the other way round."""
        if self._captured != captured:
            self.of.clear()
            self._captured = captured

    def add(self, matrix: Matrix, state: dict[str, Any], rows: Tensor, alone: bool, replay: Replay = ()) -> None:
        """Sums up inputs [m, p].

        Args:
            matrix: that multiplies them.
            state: its state.
            rows: the inputs.
            alone: whether no other process has any, and no step waits for a device.
            replay: the control and how often bases are renewed, where a CUDA graph captures this.
        """
        sketch = self.of.get(matrix)
        if sketch is None:
            shift = state["mean"]
            if not state["renewals"] and shift.numel() and alone:
                shift = rows.mean(0)  # not put into the state before it is known to be finite
            sketch = self.of[matrix] = Sketch(rows.new_zeros(len(state["basis_in"]) + 1, rows.shape[1]), shift)
        ops.eigen_sketch_(sketch.sums, rows, state["basis_in"], sketch.shift, *replay)
        sketch.rows += len(rows)

    def averaged(self, present: list[Matrix], states: Mapping[Tensor, dict[str, Any]], sum_: Sum) -> dict[Matrix, Sketch]:
        """The sketches of all processes' inputs, per input, as if one had seen them all.

        Args:
            present: the matrices with a gradient.
            states: by weight.
            sum_: sums a tensor over all processes, in place.
        """
        wanted = [matrix for matrix in present if matrix.eigen and matrix.modules]
        if not wanted:
            return {}
        own = []
        for matrix in wanted:
            state = states[matrix.weight]
            empty = state["basis_in"].new_zeros(len(state["basis_in"]) + 1, matrix.shape[1])
            sketch = self.of.get(matrix) or Sketch(empty, state["mean"])
            own += [sketch.sums.flatten(), empty.new_full((1,), sketch.rows)]
        flat = torch.cat(own)
        sum_(flat)
        pieces = flat.split([piece.numel() for piece in own])
        counts = pieces[1::2]
        if any(matrix not in self.of or not self.of[matrix].rows for matrix in wanted):
            # Maybe no process has inputs of one; where this one has some of each, it need not wait for the device.
            counts = torch.cat(counts).tolist()
        return {
            matrix: Sketch((sums / rows).view(-1, matrix.shape[1]), states[matrix.weight]["mean"], 1)
            for matrix, sums, rows in zip(wanted, pieces[::2], counts, strict=True)
            if isinstance(rows, Tensor) or rows
        }
