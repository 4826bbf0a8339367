"""Elements of weights that the loop sets after steps, as clamps and masks do: a step of the whole matrix leaves them out.

A step in bases moves an element together with others, and with the bias. Where the loop takes back what some elements were moved
by, the rest need not be a descent, and the loss falls along no step that is made, though it falls along those that are computed.
"""

import torch
from torch import Tensor

from secondorder._tensors import local_rows, real_view
from secondorder.optim._eigen_state import SAMPLED
from secondorder.optim._matrices import Matrix

Bounds = tuple[float, float]
FEWEST = 3  # elements of which it means something that they have two values at most


def sample_of(matrix: Matrix) -> Tensor:
    """Returns a copy of a weight's first elements."""
    return _first_elements(matrix).clone()


def changed_since(samples: list[tuple[Matrix, Tensor]]) -> list[Matrix]:
    """Returns the matrices whose weights are no longer what the last step has left. Waits for the device, once for all.

    Args:
        samples: matrices, and their first elements as that step has left them.
    """
    differ = [(_first_elements(matrix) != written.to(matrix.weight.device)).any() for matrix, written in samples]
    return [matrix for (matrix, _), differs in zip(samples, torch.stack(differ).tolist(), strict=True) if differs]


def found_bounds(matrix: Matrix, written: Tensor) -> Bounds | None:
    """Returns the two constants, which may be equal, that the loop has set some elements to; None if it has not.

    Other changes, as of an average of weights that takes their place, give elements many values, or change all of them.

    Args:
        matrix: one whose weight has changed.
        written: its first elements, as the last step has left them.
    """
    now = _first_elements(matrix)
    values = now[now != written.to(now.device)]
    if len(values) < FEWEST or len(values) == len(now):
        return None
    low, high = values.aminmax()
    return (low.item(), high.item()) if ((values == low) | (values == high)).all() else None


def held_back(values: Tensor, grad: Tensor, bounds: Bounds, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns a gradient without the elements at the bounds, and a step for these: a rounding unit downhill.

    The loop takes that step back as long as it holds the element; one that it holds no more is off its bound, and moves with the
    others from the next step on.

    Args:
        values: the weight.
        grad: its gradient.
        bounds: what the loop has set elements to.
        dtype: the parameter's own.
    """
    held = (values == bounds[0]) | (values == bounds[1])
    unit = torch.finfo(dtype)
    step = -grad.sign() * (unit.eps * values.abs() + unit.tiny)
    return grad * ~held, torch.where(held, step, 0.0)  # what is not finite stays, so that the step is refused


def _first_elements(matrix: Matrix) -> Tensor:
    """Returns a weight's first elements, of those that this process has."""
    return real_view(local_rows(matrix.weight).detach()).reshape(-1)[:SAMPLED]
