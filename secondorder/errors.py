"""The one error that a training loop may want to catch."""


class NonFiniteError(RuntimeError):
    """A NaN or inf would have reached a parameter. No parameter and no state of the optimizer has changed."""
