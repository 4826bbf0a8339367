"""The recorded loss as a function of the parameters, on a subsample of the batch: trial losses, and its quadratic terms."""

import functools
import math

import torch
from torch import Tensor, nn

from secondorder._distributed import RankReducer
from secondorder._tape import LossCall, Tape
from secondorder._tensors import Later, Transfer, finite, to_compute_dtype
from secondorder.criteria.known import row_masses
from secondorder.stepping.linear_chain import linear_chain
from secondorder.stepping.over_ranks import LossOverRanks
from secondorder.stepping.recorded_loss import ChainLoss, RecordedLoss, ReplayedLoss, Rows, chosen_rows


class CannotReplay(RuntimeError):
    """Raised where a recorded loss cannot be evaluated at other parameters; the message says why."""


class LocalLoss(LossOverRanks):
    """The recorded loss as a function of the parameters; a subsample of every batch stands for the batch where it can.

    Random layers draw what they drew in the recorded forward pass; buffers and attributes of the modules are left alone.

    Args:
        model: the recorded model.
        criterion: the recorded criterion.
        losses: what the tape recorded.
        parameters: what it is a function of.
        fraction: of each batch, in (0, 1]; but at least 100 instances with 500 outputs, or all.
        offset: which instances: every (1 / fraction)-th from this one on.
        tape: muted during the evaluations.
        ranks: whose losses' mean it is; None: this process's alone.
        transfer: what its numbers come to the host with; None: they come alone.

    Raises:
        CannotReplay: how the criterion's arguments come from the model is not seen, or the model cannot be evaluated again.
    """

    def __init__(
        self, model: nn.Module, criterion: nn.Module, losses: list[LossCall], parameters: list[Tensor], fraction: float,
        offset: int, tape: Tape, ranks: RankReducer | None = None, transfer: Transfer | None = None,
    ):  # fmt: skip
        self.model, self.criterion, self.parameters, self.tape = model, criterion, parameters, tape
        self.here = [p.detach() for p in parameters]
        self._transfer = Transfer() if transfer is None else transfer
        with tape.muted():
            of_rows = [self._piece_of_rows(loss, fraction, offset) if fraction < 1 else None for loss in losses]
            self.pieces = [
                piece if piece is not None and piece.stands else self._piece(loss, None)
                for loss, piece in zip(losses, of_rows, strict=True)
            ]
        super().__init__(ranks, lambda: sum(instances(loss, criterion) for loss in losses))

    @property
    def faithful(self) -> bool:
        """Tells whether evaluating the model and the criterion again gives what was recorded."""
        if not math.isfinite(self.start):
            return True  # left to the step's own check
        return self._mean(lambda: float(all(piece.faithful for piece in self.pieces))) == 1.0

    def value(self, parameters: list[Tensor]) -> float:
        """Returns the loss at these values; inf if they are not finite."""
        return self._mean(lambda: self._value(parameters))

    @functools.cached_property
    def start(self) -> float:
        """Returns the loss at the parameters' own values."""
        return self._mean(lambda: sum(piece.start for piece in self.pieces))

    def _value(self, parameters: list[Tensor]) -> float:
        """Returns this process's loss at these values."""
        good = finite(parameters)
        # A criterion or an index that meets NaN on a GPU ends the process: there the loss is evaluated where the step began.
        moved = [torch.where(good, p, own) for p, own in zip(parameters, self.here, strict=True)]
        with self.tape.muted():
            total = torch.stack([piece.value(moved) for piece in self.pieces]).sum()
        return float(torch.where(good, total, math.inf))

    def _products(self, vectors: list[list[Tensor]], transfer: Transfer) -> Later[tuple[Tensor, Tensor]]:
        vectors = [[to_compute_dtype(t) for t in vector] for vector in vectors]
        with self._differentiating():
            found = [piece.products(vectors, transfer) for piece in self.pieces]

        def sums() -> tuple[Tensor, Tensor]:
            with self._differentiating():
                first, second = zip(*(each() for each in found), strict=True)
            return torch.stack(first).sum(0), torch.stack(second).sum(0)

        return sums

    def _piece_of_rows(self, loss: LossCall, fraction: float, offset: int) -> RecordedLoss | None:
        """Returns the loss of some rows, or None if there are too few or it cannot be evaluated on them."""
        rows = None if loss.arguments is None else chosen_rows(self.criterion, loss.arguments, fraction, offset)
        try:
            return None if rows is None else self._piece(loss, rows)
        except Exception:  # of a criterion of one's own that takes whole batches alone
            return None

    def _piece(self, loss: LossCall, rows: Rows | None) -> RecordedLoss:
        """Returns a recorded loss as a function of the parameters, on all rows or on some."""
        arguments = loss.arguments
        if arguments is None:
            raise CannotReplay("the criterion's arguments were not recorded")
        chain = linear_chain(loss, self.parameters)
        if chain is not None:
            return ChainLoss(loss, self.criterion, rows, chain, self.here, self._transfer)
        if arguments.model is None:
            raise CannotReplay(
                "how the criterion's arguments come from what the model returned is not seen (by reshapes, selections and common "
                "functions it would be)"
            )
        try:
            return ReplayedLoss(loss, self.criterion, rows, self.model, self.parameters, self.tape.muted, self._transfer)
        except Exception as error:
            raise CannotReplay(f"evaluating the model again failed with {type(error).__name__}: {error}") from error


def instances(loss: LossCall, criterion: nn.Module) -> float:
    """Returns how many rows count: of the layers that the criterion sees, or of its first argument."""
    arguments = loss.arguments
    if arguments is None:
        return loss.instances or 1
    tensors = arguments.tensors()
    rows = len(tensors[0]) if tensors and tensors[0].dim() > 0 else 1
    masses = row_masses(criterion, *arguments.args, **arguments.kwargs)
    share = 1.0 if masses is None else float((masses > 0).double().mean())
    return share * (rows if loss.instances is None else loss.instances)
