"""What the matrices give to a renewal of EigenAdam's bases, and what their states note of it once the step is made."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder.optim._eigen.matrices import Matrix
from secondorder.optim._eigen.sketches import Sketch

DECAY = 0.9  # of the averages behind a basis, from one renewal to the next
PATIENCE = 5  # renewals in a row at which a layer that has shown its inputs may show none


class Given(NamedTuple):
    """What `ops.eigen_renew_` takes of one matrix."""

    sketch: Sketch  # of its inputs; with sums [0] V comes from the gradient
    hessian: Tensor  # a bias Hessian; with [0] U comes from the gradient
    share: float  # how much this renewal counts in the averages behind the bases


class Renewed(NamedTuple):
    """What the state of a matrix with bases notes of a renewal."""

    state: dict[str, Any]
    unseen: int  # how many renewals in a row, this one included, have seen no inputs of the matrix
    curved: bool  # whether U is the basis of a bias Hessian


class Renewal:
    """What every matrix with a gradient gives to a renewal, and what is noted of it.

    Attributes:
        given: what each matrix gives.
        means: the mean inputs of each. A first mean that a sketch has found takes the place of the state's own, which gets it
            once the step is made.
        lost: the names of layers that have shown no inputs for so long that V comes from their gradients from now on.

    Args:
        owner: who renews, for the error.
        matrices: the matrices with a gradient.
        states: their states.
        sketches: the sketches of the inputs that forward passes have shown since the last step.
        hessians: bias Hessians, by weight.
        captured: whether a CUDA graph captures the step.

    Raises:
        RuntimeError: a graph captures the step without the forward pass before it, so that replays would see no inputs.
    """

    def __init__(
        self,
        owner: str,
        matrices: list[Matrix],
        states: list[dict[str, Any]],
        sketches: Mapping[Matrix, Sketch],
        hessians: Mapping[Tensor, Tensor],
        captured: bool,
    ):
        self._owner, self._captured = owner, captured
        self.lost: list[str] = []
        self.given: list[Given] = []
        self.means: list[Tensor] = []
        self.renewed: list[Renewed] = []
        nothing = states[0]["mean"].new_empty(0)
        for matrix, state in zip(matrices, states, strict=True):
            mean = state["mean"]
            if not matrix.has_bases:  # it is given all the same: where its gradient is not finite, no basis may turn
                self.given.append(Given(Sketch(nothing, mean), nothing, 1.0))
            else:
                sketch, unseen, share = self._inputs_of(matrix, state, sketches.get(matrix), nothing)
                if not unseen and not state["renewals"]:
                    mean = sketch.shift
                curved = matrix.weight in hessians
                if curved != state.get("curved", False):
                    share = 1.0  # a gradient's second moments are on another scale than a bias Hessian
                self.given.append(Given(sketch, hessians.get(matrix.weight, nothing), share))
                self.renewed.append(Renewed(state, unseen, curved))
            self.means.append(mean)

    def _inputs_of(
        self, matrix: Matrix, state: dict[str, Any], sketch: Sketch | None, nothing: Tensor
    ) -> tuple[Sketch, int, float]:
        """Returns the sketch that V is renewed by, for how many renewals no inputs were seen, and this renewal's share."""
        share = (1 - DECAY) / (1 - DECAY ** (state["renewals"] + 1))
        if sketch is not None:
            return sketch, 0, share
        mean, unseen, has_seen = state["mean"], state["unseen"] + 1, state["renewals"] > state["unseen"]
        patience = PATIENCE if has_seen else 1  # a lazy layer shows no inputs before the first step
        if self._captured and has_seen and unseen <= patience + 1:  # replays could not count these renewals
            raise RuntimeError(
                f"{self._owner}: expected the CUDA graph that captures the step to have the forward pass, too, got no inputs of "
                f"{matrix.name!r}; capture zero_grad, forward and backward passes and step together"
            )
        if has_seen and unseen <= PATIENCE:  # inputs may be seen again: V stays
            return Sketch(mean.new_zeros(len(state["basis_in"]) + 1, matrix.shape[1]), mean, 1), unseen, share
        if unseen == patience + 1 and matrix.layers and matrix.weight.grad is not None:
            self.lost.append(matrix.name)
            if has_seen:
                share = 1.0  # what inputs have shown is on another scale than what gradients will show
        return Sketch(nothing, mean), unseen, share

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


def finite_or_zero(given: list[Tensor]) -> list[Tensor]:
    """Returns sketches or bias Hessians; zeros, which leave the basis alone, for one whose renewal would be refused for its size.

    `ops.eigen_renew_` refuses a sum of squares from a quarter of the dtype's largest number on, and this what comes close to it.
    """
    some = [i for i, each in enumerate(given) if each.numel()]
    if not some:
        return given
    fits = torch.stack(torch._foreach_norm([given[i] for i in some])) < 0.49 * math.sqrt(torch.finfo(given[some[0]].dtype).max)
    if fits.is_cpu and fits.all():
        return given
    kept = {i: torch.where(fit, given[i], 0.0) for i, fit in zip(some, fits, strict=True)}  # waits for no device
    return [kept.get(i, each) for i, each in enumerate(given)]
