"""What the matrices give to a renewal of EigenAdam's bases, and what their states note of it once the step is made."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder.optim._eigen_inputs import Sketch
from secondorder.optim._matrices import Matrix

DECAY = 0.9  # of the averages behind a basis, from one renewal to the next
PATIENCE = 5  # renewals in a row at which a layer that has shown its inputs may show none


class Renewal(NamedTuple):
    """What `ops.eigen_renew_` takes of every matrix with a gradient, and which of these matrices have bases.

    Attributes:
        given: of each matrix a sketch of its inputs, with sums [0] where V comes from the gradient; a bias Hessian, [0] where U
            comes from the gradient; and how much this renewal counts in the averages behind the bases.
        renewed: of each matrix with bases the state; how many renewals in a row, this one included, have seen no inputs of it;
            and whether U is the basis of a bias Hessian.
        lost: the names of layers that have shown no inputs for so long that V comes from their gradients from now on.
    """

    given: list[tuple[Sketch, Tensor, float]]
    renewed: list[tuple[dict[str, Any], int, bool]]
    lost: list[str]

    def note_made(self) -> None:
        """Notes in the states that the step with this renewal was made."""
        for state, unseen, curved in self.renewed:
            state["renewals"] += 1
            state["unseen"] = unseen
            if curved or "curved" in state:
                state["curved"] = curved

    def note_captured(self) -> None:
        """Notes in the states which inputs a CUDA graph has captured with the step, since its replays see them, too."""
        for state, unseen, _ in self.renewed:
            state["unseen"] = min(unseen, state["unseen"])


def planned_renewal(
    owner: str,
    present: list[Matrix],
    states: list[dict[str, Any]],
    means: list[Tensor],
    sketches: Mapping[Matrix, Sketch],
    hessians: Mapping[Tensor, Tensor],
    captured: bool,
) -> Renewal:
    """Decides what each matrix gives to a renewal.

    Args:
        owner: who renews, for the error.
        present: the matrices with a gradient.
        states: their states.
        means: their mean inputs. A first mean that a sketch has found takes its place here; the state gets it once the step is
            made.
        sketches: the sketches of the inputs that forward passes have shown since the last step.
        hessians: bias Hessians, by weight.
        captured: whether a CUDA graph captures the step.

    Raises:
        RuntimeError: a graph captures the step without the forward pass before it, so that replays would see no inputs.
    """
    renewal, nothing = Renewal([], [], []), means[0].new_empty(0)
    for i, (matrix, state) in enumerate(zip(present, states, strict=True)):
        if not matrix.eigen:  # it has no bases, but where its gradient is not finite no basis may turn
            renewal.given.append((Sketch(nothing, means[i]), nothing, 1.0))
            continue
        sketch, unseen, share = sketches.get(matrix), 0, (1 - DECAY) / (1 - DECAY ** (state["renewals"] + 1))
        if sketch is None:
            unseen, has_seen = state["unseen"] + 1, state["renewals"] > state["unseen"]
            patience = PATIENCE if has_seen else 1  # a lazy layer shows no inputs before the first step
            if captured and has_seen and unseen <= patience + 1:  # replays could not count these renewals
                raise RuntimeError(
                    f"{owner}: expected the CUDA graph that captures the step to have the forward pass, too, got no inputs of "
                    f"{matrix.name!r}; capture zero_grad, forward and backward passes and step together"
                )
            sketch = Sketch(nothing, means[i])
            if has_seen and unseen <= PATIENCE:  # inputs may be seen again: V stays
                sketch = Sketch(means[i].new_zeros(len(state["basis_in"]) + 1, matrix.shape[1]), means[i], 1)
            elif unseen == patience + 1 and matrix.modules and matrix.weight.grad is not None:
                renewal.lost.append(matrix.name)
                if has_seen:
                    share = 1.0  # what inputs have shown is on another scale than what gradients will show
        elif not state["renewals"]:
            means[i] = sketch.shift
        curved = matrix.weight in hessians
        if curved != state.get("curved", False):
            share = 1.0  # a gradient's second moments are on another scale than a bias Hessian
        renewal.given.append((sketch, hessians.get(matrix.weight, nothing), share))
        renewal.renewed.append((state, unseen, curved))
    return renewal


def finite_or_zero(sums: Tensor) -> Tensor:
    """Returns a sketch or bias Hessian; or zeros, which leave the basis alone, if its squares overflow, as no gradient's do."""
    if not sums.numel():
        return sums
    norm = sums.norm()
    if sums.is_cpu:
        return sums if math.isfinite(norm.item()) else torch.zeros_like(sums)
    return torch.where(norm.isfinite(), sums, 0.0)  # waits for no device
