"""Whether EigenAdam's steps were made or refused, which a GPU tells after they have returned."""

from collections import deque
from collections.abc import MutableMapping
from typing import Any, NamedTuple

from torch import Tensor

from secondorder._tensors import Arriving
from secondorder.ops.eigen import REFUSED
from secondorder.optim._eigen.matrices import Matrix


class _Report(NamedTuple):
    """What a step was taken for, and `control` after it, on its way to the host."""

    control: Arriving
    matrices: list[Matrix]  # that have counted it
    renewed: bool  # whether those with bases have counted a renewal


class StepReports:
    """Counts the steps that were refused, in the state that belongs to all parameters; has the reports that are under way."""

    def __init__(self) -> None:
        self._under_way: deque[_Report] = deque()  # of steps that were taken for made, the oldest first
        self._untold = False  # whether a refused step was found of which nobody has been told yet

    def __len__(self) -> int:
        """Returns how many are under way."""
        return len(self._under_way)

    def add(self, control: Tensor, matrices: list[Matrix], renewed: bool) -> None:
        """Sends a report of the step that was just made."""
        self._under_way.append(_Report(Arriving(control), matrices, renewed))

    def settle(self, shared: dict[str, Any], states: MutableMapping[Tensor, dict[str, Any]], newest: int | None) -> None:
        """Takes back what refused steps have counted: by reports, their steps and renewals. What they have seen stays.

        Args:
            shared: the state that belongs to all parameters.
            states: every parameter's.
            newest: how many reports of the newest steps are left under way, and all others waited for; None: those that have not
                arrived, so that nothing waits.
        """
        while self._under_way and (self._under_way[0].control.here if newest is None else len(self._under_way) > newest):
            report = self._under_way.popleft()
            if report.control.read()[REFUSED] <= shared["refused"]:
                continue
            shared["refused"] += 1
            shared["steps"] -= 1
            self._untold = True
            for matrix in report.matrices:
                counted = states.get(matrix.weight, {})
                for count in ("step", "renewals") if report.renewed and matrix.has_bases else ("step",):
                    if counted.get(count):  # it may have begun anew since
                        counted[count] -= 1
                if "unseen" in counted:
                    counted["unseen"] = min(counted["unseen"], counted["renewals"])
                if matrix.bias is not None and "step" in counted:
                    states[matrix.bias]["step"] = counted["step"]

    def look(self, shared: dict[str, Any]) -> bool:
        """Looks at `control` itself, for which it waits; returns whether no step was refused since it was last looked at."""
        before, shared["refused"] = shared["refused"], int(shared["control"].tolist()[REFUSED])
        made = bool(shared["refused"] == before)
        self._untold |= not made
        return made

    def tell(self) -> bool:
        """Returns whether a refused step was found since it was last asked."""
        untold, self._untold = self._untold, False
        return untold
