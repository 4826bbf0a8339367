"""The recorded loss as a function of the parameters, on a subsample of the batch: trial losses, and its quadratic terms."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from secondorder._distributed import RankReducer
from secondorder._tape import LossCall, Tape
from secondorder._tensors import to_compute_dtype
from secondorder.criteria import row_masses
from secondorder.stepping.linear_chain import linear_chain
from secondorder.stepping.over_ranks import LossOverRanks
from secondorder.stepping.recorded_loss import ChainLoss, RecordedLoss, ReplayedLoss, chosen_rows


class CannotReplay(RuntimeError):
    """A recorded loss cannot be evaluated at other parameters; the message says why."""


class LocalLoss(LossOverRanks):
    """The recorded loss as a function of the parameters, on a subsample of every recorded batch where it stands for the batch.

    Random layers draw what they drew in the recorded forward pass; buffers and attributes of the modules are left alone.

    Args:
        model: the recorded model.
        criterion: the recorded criterion.
        losses: what the tape recorded.
        parameters: what it is a function of, with their names in the model.
        fraction: of each batch, in (0, 1]; but at least 100 instances with 500 outputs, or all.
        offset: which instances: every (1 / fraction)-th from this one on.
        tape: muted during the evaluations.
        ranks: whose losses' mean it is; None: this process's alone.

    Raises:
        CannotReplay: how the criterion's arguments come from the model is not seen, or the model cannot be evaluated again.
    """

    def __init__(
        self, model: nn.Module, criterion: nn.Module, losses: list[LossCall], parameters: dict[Tensor, str], fraction: float,
        offset: int, tape: Tape, ranks: RankReducer | None = None,
    ):  # fmt: skip
        self.model, self.criterion, self.parameters, self.tape = model, criterion, parameters, tape
        self.here = [p.detach() for p in parameters]
        with tape.muted():
            self.pieces = [self._piece(loss, fraction, offset) for loss in losses]
        super().__init__(ranks, sum(instances(loss, criterion) for loss in losses))

    @property
    def faithful(self) -> bool:
        """Whether evaluating the model and the criterion again gives what was recorded."""
        if not math.isfinite(self.start):
            return True  # left to the step's own check
        return self._mean(lambda: float(all(piece.faithful for piece in self.pieces))) == 1.0

    def value(self, parameters: list[Tensor]) -> float:
        """The loss at these values."""
        return self._mean(lambda: self._muted_sum(lambda piece: piece.value(parameters)))

    @functools.cached_property
    def start(self) -> float:
        """The loss at the parameters' own values."""
        return self._mean(lambda: self._muted_sum(lambda piece: piece.start()))

    def _products(self, vectors: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
        vectors = [[to_compute_dtype(t) for t in vector] for vector in vectors]
        try:
            with self.tape.muted():
                found = [piece.products(vectors) for piece in self.pieces]
        except NotImplementedError as error:
            raise RuntimeError(
                f"expected a loss that autograd can differentiate twice, got {type(error).__name__}: {error}; take EACG, which "
                "has a learning rate instead. No parameter and no state has changed."
            ) from error
        return torch.stack([first for first, _ in found]).sum(0), torch.stack([second for _, second in found]).sum(0)

    def _muted_sum(self, value: Callable[[RecordedLoss], float]) -> float:
        with self.tape.muted():
            return sum(value(piece) for piece in self.pieces)

    def _piece(self, loss: LossCall, fraction: float, offset: int) -> RecordedLoss:
        arguments = loss.arguments
        if arguments is None:
            raise CannotReplay("the criterion's arguments were not recorded")
        rows = chosen_rows(self.criterion, arguments, loss.loss, fraction, offset) if fraction < 1 else None
        chain = linear_chain(loss, list(self.parameters))
        if chain is not None:
            return ChainLoss(loss, self.criterion, rows, chain, self.here)
        if arguments.model is None:
            raise CannotReplay(
                "how the criterion's arguments come from what the model returned is not seen (by reshapes, selections and common "
                "functions it would be)"
            )
        for chosen in [rows, None] if rows is not None else [None]:
            try:
                piece = ReplayedLoss(loss, self.criterion, chosen, self.model, self.parameters, self.tape.muted)
            except Exception as error:
                if chosen is None:
                    raise CannotReplay(f"evaluating the model again failed with {type(error).__name__}: {error}") from error
                continue
            if piece.faithful or chosen is None:
                return piece
        raise AssertionError


def instances(loss: LossCall, criterion: nn.Module) -> float:
    """The rows that count of the layers which the criterion sees, or of its first argument."""
    arguments = loss.arguments
    if arguments is None:
        return loss.instances or 1
    tensors = arguments.tensors()
    rows = len(tensors[0]) if tensors and tensors[0].dim() > 0 else 1
    masses = row_masses(criterion, *arguments.args, **arguments.kwargs)
    share = 1.0 if masses is None else float((masses > 0).double().mean())
    return share * (rows if loss.instances is None else loss.instances)
