"""What an argument may be."""

from numbers import Integral
from typing import Any


def is_whole(value: Any) -> bool:
    """Tells whether a value is an integer, of Python or numpy, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)
