"""Mean inputs and exponential averages, for all layers of a net in one call."""

from collections.abc import Sequence

from torch import Tensor

from secondorder.ops._library import library, operator, without_tangents


@without_tangents
def mean_inputs(input: Sequence[Tensor]) -> list[Tensor]:
    """Returns the mean inputs of all layers of a net, a = E[h] = 1/m sum_i h_i.

    Args:
        input: h [m, n_in], one for each layer.

    Returns:
        a [n_in] for each layer, of its input's dtype; NaN where m = 0.
    """
    return library.mean_inputs(list(input))


@operator("mean_inputs(Tensor[] input) -> Tensor[]")
def _(input: list[Tensor]) -> list[Tensor]:
    return [h.new_empty(h.shape[1]) for h in input]


@without_tangents
def average_(new: Sequence[Tensor], old: Sequence[Tensor], share: float) -> None:
    """Sets new <- (1 - share) new + share old for all tensors of two lists.

    Args:
        new: contiguous, written in place; no two may overlap.
        old: of the same shapes and dtypes.
        share: in [0, 1).
    """
    library.average_(list(new), list(old), share)


@operator("average_(Tensor(a!)[] new, Tensor[] old, float share) -> ()")
def _(*args: object) -> None:
    return None
