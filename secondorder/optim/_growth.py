"""Warns once of a loss that grows a thousandfold; an error would end the training of nets that compete, as in a GAN."""

import math
from typing import Any

from torch import Tensor

from secondorder._tensors import Arriving
from secondorder._warnings import warn

_FACTOR, _DECAY = 1000.0, 0.9


class LossGrowth:
    """Watches the average of the losses, bias-corrected and with a decay of 0.9.

    It warns if that exceeds a thousand times its lowest value, and the first loss as well: a net that fits its batches up to
    rounding may well meet a batch that is a thousand times worse.

    Args:
        owner: the optimizer's name, for the message.
        remedy: what helps, as an imperative.
    """

    def __init__(self, owner: str, remedy: str):
        self.owner, self.remedy = owner, remedy
        self.steps, self.average, self.first, self.lowest = 0, 0.0, math.nan, math.inf
        self.warned = False
        self._report: Arriving | None = None  # the loss of an earlier step

    def observe(self, loss: Tensor | float) -> None:
        """Takes the loss of a step. It ignores one that is not finite, and never warns of losses that have been negative.

        The value of a tensor on a GPU is taken at one of the next calls, once reading it no longer waits for the device.
        """
        if isinstance(loss, Tensor):
            loss = self._arrived(loss.detach()) if loss.is_cuda else float(loss)
        if self.warned or not math.isfinite(loss):
            return
        self.steps += 1
        self.average = _DECAY * self.average + (1 - _DECAY) * loss
        now = self.average / (1 - _DECAY**self.steps)
        if self.steps == 1:
            self.first = loss
        self.lowest = min(self.lowest, now)
        if self.lowest > 0 and now > _FACTOR * self.lowest and now > self.first:
            self.warned = True
            warn(
                f"the loss of {self.owner}, {now:.3g} on the average of the last steps, has grown a thousandfold from "
                f"{self.lowest:.3g}: steps are too long; {self.remedy}"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Returns all but what is on its way."""
        return {**self.__dict__, "_report": None}

    def _arrived(self, loss: Tensor) -> float:
        """Sends a loss to the host; returns the one sent before, or NaN if that has not arrived yet."""
        if self._report is not None and not self._report.here:
            return math.nan
        before, self._report = self._report, Arriving(loss.reshape(()))
        return math.nan if before is None else float(before.read())
