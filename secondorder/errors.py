"""NonFiniteError, which a training loop may want to catch, and torch's error for missing second derivatives with what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


class NonFiniteError(RuntimeError):
    """Raised where NaN or inf would have reached a parameter. No parameter and no state of the optimizer has changed."""


# What trains without second derivatives, for messages. Of the optimizers that take a curvature some evaluate a quadratic model.
WITHOUT = "EACG with curvature='fisher-empirical', or EigenAdam, which need no second derivative"

# What torch says, in part, where it cannot differentiate twice: an operator's own words, those of `once_differentiable`, and
# those of a compiled graph.
_NO_SECOND_DERIVATIVE = ("is not implemented", "differentiate twice a function", "support double backward")


@contextmanager
def second_derivatives(
    of: str = "criterion",
    instead: str = WITHOUT,
) -> Iterator[None]:
    """Raises torch's error for a missing second derivative with what to do: around code that differentiates twice.

    Args:
        of: what it differentiates.
        instead: which optimizer does without.

    Raises:
        RuntimeError: torch has no second derivative of it.
    """
    try:
        yield
    except RuntimeError as error:
        words = str(error)
        if words.startswith("expected a ") or not any(known in words for known in _NO_SECOND_DERIVATIVE):
            raise
        raise RuntimeError(
            f"expected a {of} that can be differentiated twice, but {words.rstrip('.')}; take {instead}"
        ) from error
