"""NonFiniteError, which a training loop may want to catch, and torch's error for missing second derivatives with what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


class NonFiniteError(RuntimeError):
    """Raised where NaN or inf would have reached a parameter. No parameter and no state of the optimizer has changed."""


@contextmanager
def second_derivatives() -> Iterator[None]:
    """Around a backward pass through a criterion's backward pass.

    Raises:
        RuntimeError: torch has no second derivative of the criterion.
    """
    try:
        yield
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        raise RuntimeError(
            f"expected a criterion that can be differentiated twice, but {error}; take EACG with "
            "curvature='fisher-empirical', or EigenAdam, which need no second derivative"
        ) from error
