"""Elements of weights that the loop sets after steps, as clamps and masks do: a step of the whole matrix leaves them out.

A step in bases moves an element together with others, and with the bias. Where the loop takes back what some elements were moved
by, the rest need not be a descent, and the loss falls along no step that is made, though it falls along those that are computed.
"""

import math
from collections import Counter
from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder._tensors import Arriving, device_for, local_rows, real_view
from secondorder.optim._eigen.matrices import Matrix
from secondorder.optim._eigen.state import SAMPLED

Bounds = tuple[float, float]
FEWEST = 3  # elements of which it means something that they have two values at most


class Held(NamedTuple):
    """The elements of a weight that are at the bounds which the loop holds it in."""

    which: Tensor  # whether an element is one of them, of the weight's shape
    moved: Tensor  # where they move, likewise


class LoopChanges:
    """What the loop has done to weights, looked at after their steps 1, 2, 4, 8 and so on, without waiting for a GPU."""

    def __init__(self) -> None:
        self._steps: Counter[Matrix] = Counter()
        self._written: list[tuple[Matrix, Tensor]] = []  # first elements as the last step has left them
        self._under_way: tuple[list[Matrix], Arriving] | None = None

    def note_made(self, matrices: list[Matrix]) -> None:
        """Notes that a step of these matrices was made."""
        for matrix in matrices:
            self._steps[matrix] += 1
            if self._steps[matrix].bit_count() == 1 and (first := _first_elements(matrix)).numel():
                self._written.append((matrix, first.clone()))

    def look(self, states: MutableMapping[Tensor, dict[str, Any]], alike: bool) -> None:
        """Notes in the states, as "low" and "high", the constants to which the loop has set elements since the last step.

        Args:
            states: the parameters' states.
            alike: whether ranks must note it at the same step. Then the next one waits for what a GPU tells by then.
        """
        self._settle(states, alike)
        if self._written:
            summaries = torch.stack([_summary(*each) for each in self._written])
            self._under_way = [matrix for matrix, _ in self._written], Arriving(summaries)
            self._written = []
            if not summaries.is_cuda:
                self._settle(states, True)

    def _settle(self, states: MutableMapping[Tensor, dict[str, Any]], wait: bool) -> None:
        """Notes what is under way, once it has arrived."""
        if self._under_way is None or not (wait or self._under_way[1].here):
            return
        (matrices, summary), self._under_way = self._under_way, None
        for matrix, (found, low, high) in zip(matrices, summary.read().tolist(), strict=True):
            state = states.get(matrix.weight, {})
            if found and "basis_out" in state:
                state |= {"low": low, "high": high}


def _summary(matrix: Matrix, written: Tensor) -> Tensor:
    """Returns 1 and the two constants, which may be equal, that the loop has set some elements to; else 0 and two numbers, [3].

    Other changes, as of an average of weights that takes their place, give elements many values, or change all of them.

    Args:
        matrix: the matrix.
        written: its weight's first elements, as the last step has left them.
    """
    now = _first_elements(matrix)
    changed = now != written.to(now.device)
    low, high = now.masked_fill(~changed, math.inf).amin(), now.masked_fill(~changed, -math.inf).amax()
    two = (~changed | (now == low) | (now == high)).all()
    found = two & (changed.sum() >= FEWEST) & ~changed.all()
    return torch.stack([found.to(low.dtype), low, high]).to(device_for(torch.float64, now), torch.float64)


def held_back(values: Tensor, grad: Tensor, bounds: Bounds, dtype: torch.dtype) -> tuple[Tensor, Held]:
    """Returns a gradient without the elements at the bounds, and these elements, which move by a rounding unit downhill.

    The loop takes that step back as long as it holds the element; one that it holds no more is off its bound, and moves with the
    others from the next step on. Weight decay, too, would take elements off their bounds.

    Args:
        values: the weight.
        grad: its gradient.
        bounds: what the loop has set elements to.
        dtype: the parameter's own.
    """
    held = ((values == bounds[0]) | (values == bounds[1])) & (grad != 0)
    unit = torch.finfo(dtype)
    moved = values - grad.sign() * (unit.eps * values.abs() + unit.tiny)
    return grad * ~held, Held(held, moved)  # what is not finite stays, so that the step is refused


def _first_elements(matrix: Matrix) -> Tensor:
    """Returns a weight's first elements, of those that this process has."""
    return real_view(local_rows(matrix.weight).detach()).reshape(-1)[:SAMPLED]
