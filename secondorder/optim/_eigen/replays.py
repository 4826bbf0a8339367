"""The steps of EigenAdam that replays of a CUDA graph make.

A captured step takes what changes from step to step from `control`, on the device: see `ops.eigen`. Python counts none of its
replays, and catches up when it reads its counts again.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from secondorder.ops.eigen import STEPS, renewals_before
from secondorder.optim import _captures
from secondorder.optim._eigen.matrices import Matrix, computed_in
from secondorder.optim._eigen.state import FIRST_STEPS, is_current

States = Mapping[Tensor, dict[str, Any]]


class Replay(NamedTuple):
    """What operators are told of a step that a CUDA graph captures, so that replays go on from there; see `ops.eigen`."""

    renew_every: int
    since: int  # how many steps were made before it


class EigenReplays:
    """What is known of the steps that CUDA graphs have captured.

    Args:
        owner: whose steps they are, for errors.
    """

    def __init__(self, owner: str):
        self._owner = owner
        self._weights: set[Tensor] = set()  # of the matrices that these steps move; none: there are no such steps

    def __bool__(self) -> bool:
        """Tells whether there are any, so that the device may have made more steps than Python knows of."""
        return bool(self._weights)

    def ready(self, matrix: Matrix, states: States) -> bool:
        """Tells whether a pass that is captured can show inputs of a matrix; where it cannot, `check` says why."""
        state = states.get(matrix.weight, {})
        return _captures.has_kernels(matrix.weight.device) and is_current(state, matrix.weight) and state["step"] > 0

    def check(self, matrices: Sequence[Matrix], states: States, captured: bool) -> None:
        """Raises where a step cannot be captured; or must not be made, for captured steps take it that all counts go on together.

        Args:
            matrices: the matrices with a gradient.
            states: by weight.
            captured: whether a CUDA graph captures the step.

        Raises:
            RuntimeError: its parameters are others than those of the captured steps, have not made their first steps, or have
                changed their dtype or device since the last one; or there are no kernels to be captured.
        """
        if captured:
            _captures.check_kernels(self._owner, matrices[0].weight.device, ", or capture passes alone")
        weights = {matrix.weight for matrix in matrices}
        if self and (self._weights != weights if captured else not self._weights <= weights):
            raise RuntimeError(
                f"{self._owner}.step(): expected gradients of the parameters that the step captured in a CUDA graph has; where "
                "others are trained from now on, call optimizer.load_state_dict(optimizer.state_dict()) and capture a step anew"
            )
        for matrix in matrices if captured else ():
            state = states.get(matrix.weight, {})
            unknown = state.get("step", 0) < FIRST_STEPS  # its first steps decide by what they read
            if unknown or (matrix.has_bases and (not state["renewals"] or state.get("curved"))):
                raise RuntimeError(
                    f"{self._owner}.step(): expected {FIRST_STEPS} steps, with a renewal of bases, before one is captured in a "
                    f"CUDA graph, got {state.get('step', 0)} of {matrix.name!r}; call step() without a capture first"
                )
            if not is_current(state, matrix.weight):  # replays would begin with what it was before, each time
                raise RuntimeError(
                    f"{self._owner}.step(): expected the state of {matrix.name!r} in {computed_in(matrix.weight)} on "
                    f"{matrix.weight.device} before a step is captured in a CUDA graph, got {state['basis_out'].dtype} on "
                    f"{state['basis_out'].device}; call step() without a capture first"
                )

    def add(self, matrices: Sequence[Matrix]) -> None:
        """Notes that a step of these matrices was captured."""
        self._weights = {matrix.weight for matrix in matrices}

    def catch_up(self, shared: dict[str, Any], matrices: Sequence[Matrix], states: States, renew_every: int) -> bool:
        """Brings Python's counts to those of the device, for which it waits; returns whether they were others."""
        now, before = int(shared["control"][STEPS]), shared["steps"]
        renewals = renewals_before(now, renew_every) - renewals_before(before, renew_every)
        for matrix in matrices:
            if matrix.weight not in self._weights:
                continue
            state = states[matrix.weight]
            state["step"] += now - before
            if matrix.bias is not None:
                states[matrix.bias]["step"] = state["step"]
            if matrix.has_bases:
                state["renewals"] += renewals
                state["unseen"] += renewals if state["unseen"] else 0
        shared["steps"] = now
        return now != before
