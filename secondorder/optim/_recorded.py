"""What a step needs of the tape's records: layers that the losses reach, and instances."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from secondorder._tape import LayerRecord, Tape
from secondorder._tensors import captured_now


def recorded_layers(owner: str, tape: Tape) -> list[LayerRecord]:
    """Returns the layers that the losses since an optimizer's last step reach, or an error that says what is missing."""
    records = tape.records()
    if not records and (tape.losses or tape.covers_none):
        raise RuntimeError(
            f"{owner}.step(): expected a linear layer with a curvature, but every one that the loss reaches is frozen or has "
            "more outputs than max_factor_dim; unfreeze a layer, raise max_factor_dim, or take secondorder.EigenAdam, which "
            "trains any model"
        )
    if not records:
        raise RuntimeError(
            f"{owner}.step(): there are gradients, but no call of the criterion that leads to them was recorded: {tape.missing}. "
            f"Compute the loss by the criterion given to the optimizer ({tape.criterion!r}; optimizer.criterion(output, target) "
            "where it is a function), which returns nothing but the loss, with the model in training mode, and the gradients by "
            "loss.backward(); optimizer.zero_grad() forgets the calls before it."
        )
    captured = captured_now()
    if any(loss.captured != captured for loss in tape.losses):
        raise RuntimeError(
            f"{owner}.step(): expected forward pass, backward pass and step to be captured in one CUDA graph, or none of them, "
            f"got {'the step' if captured else 'passes'} alone, but the curvature of a step comes from its own forward pass"
        )
    check_instances(owner, (call.input for record in records for call in record.calls))
    return records


def check_instances(owner: str, inputs: Iterable[Tensor]) -> None:
    """Raises where the layers' inputs [..., n_in] are of no instance at all."""
    if all(0 in h.shape[:-1] for h in inputs):
        raise ValueError(
            f"{owner}.step(): expected at least one instance, got an empty batch; an expectation over it is undefined: skip it"
        )


def note_largest_batch(tape: Tape, groups: list[dict[str, Any]]) -> None:
    """Puts the rows of the largest batch so far, which the meaning of constants in a criterion depends on, into the groups."""
    for group in groups:
        group["largest_batch"] = tape.divisors.most_rows


def take_largest_batch(tape: Tape, groups: list[dict[str, Any]]) -> None:
    """Has a tape go on with what `note_largest_batch` has put into the groups; other versions have put nothing there."""
    tape.divisors.most_rows = groups[0].get("largest_batch", tape.divisors.most_rows)
