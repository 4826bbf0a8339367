"""The numbers that param_groups hold: what each must be, at construction and at every step."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from secondorder._arguments import is_whole
from secondorder._warnings import warn

# name -> whether a value is valid, and what is expected
Numbers = dict[str, tuple[Callable[[float], bool], str]]

NUMBERS: Numbers = {
    "lr": (lambda v: 0 <= v < math.inf, ">= 0"),
    "alpha": (lambda v: 0 < v < 1, "in (0, 1)"),
    "momentum": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "weight_decay": (lambda v: 0 <= v < math.inf, ">= 0"),
    "factor_decay": (lambda v: 0 <= v < 1, "in [0, 1)"),
}


def as_number(value: Any) -> float | None:
    """Returns the value of a number, or of a tensor of one element; None: it is neither, as text is not that names a number."""
    try:
        return None if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def check_numbers(owner: str, values: dict[str, Any], numbers: Numbers) -> None:
    """Raises where a value is not what its entry in `numbers` demands; values without an entry may be anything.

    Raises:
        TypeError: it is not a number.
        ValueError: it is out of range.
    """
    for name, (valid, expected) in numbers.items():
        if name not in values:
            continue
        value = values[name]
        if value is None and "None" in expected:
            continue
        number = as_number(value)
        if number is None:
            raise TypeError(f"{owner}: expected {name} to be a number, got {value!r}")
        if not valid(number):
            raise ValueError(f"{owner}: expected {name} {expected}, got {value!r}")


def check_arguments(owner: str, checks: list[tuple[str, Any, bool, str]]) -> None:
    """Raises ValueError at the first (name, value, valid, expected) that is not valid."""
    for name, value, valid, expected in checks:
        if not valid:
            raise ValueError(f"{owner}: expected {name} {expected}, got {value!r}")


def check_counts(owner: str, least: int, counts: dict[str, Any], optional: bool = False) -> None:
    """Raises ValueError at the first value that is no int >= `least`, nor None where it is `optional`."""
    expected = f"to be an int >= {least}" + ", or None" * optional
    check_arguments(
        owner,
        [
            (name, value, (optional and value is None) or (is_whole(value) and value >= least), expected)
            for name, value in counts.items()
        ],
    )


def check_flags(owner: str, flags: dict[str, Any]) -> None:
    """Raises ValueError at the first value that is no bool: any string, "no" too, would count as True."""
    check_arguments(owner, [(name, value, isinstance(value, bool), "to be True or False") for name, value in flags.items()])


def check_nonfinite(owner: str, nonfinite: Any) -> None:
    """Raises ValueError unless it is "error" or "skip": what a step does that meets NaN or inf."""
    check_arguments(owner, [("nonfinite", nonfinite, nonfinite in ("error", "skip"), "'error' or 'skip'")])


def warn_of_short_steps(owner: str, lr: float | Tensor, name: str = "lr") -> None:
    """Warns of a learning rate that is another optimizer's, where it multiplies a step that is found."""
    if 0 < lr <= 0.01:
        warn(
            f"{owner}: {name}={lr:g} multiplies the step that {owner} finds by itself, which makes it {1 / lr:,.0f} times "
            f"shorter. Leave {name} out, or give {name}=1.0 where a framework or a scheduler wants one."
        )
