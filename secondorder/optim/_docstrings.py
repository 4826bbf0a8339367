"""Docstrings that base classes complete, so that what several optimizers share is written once."""

import inspect
import re
from collections import ChainMap
from typing import NamedTuple, TypeVar

T = TypeVar("T")

_AFTER_ARGS = ("", "Raises:", "Source:")  # the paragraphs after Args, by their first words; "": remarks


class _Docstring(NamedTuple):
    """A class's docstring by its parts."""

    begin: str  # all before Args
    arguments: dict[str, str]  # by their names
    end: dict[str, str]  # the paragraphs after Args, by their first words


def complete_docstring(cls: type[T]) -> type[T]:
    """Completes the docstring of a class, as `help()` and the pages of the documentation show it.

    Every argument, and each kind of paragraph after Args, is described as by the class itself or, if it does not describe it, by
    the nearest base class that does.
    """
    if cls.__doc__ is None:  # as in python -OO
        return cls
    docstrings = [_parts(each.__doc__) for each in cls.__mro__ if each.__doc__ and each.__module__.startswith("secondorder.")]
    arguments, end = ChainMap(*(each.arguments for each in docstrings)), ChainMap(*(each.end for each in docstrings))
    described = "\n".join(f"    {name}: {arguments[name]}" for name in inspect.signature(cls).parameters)
    cls.__doc__ = "\n\n".join([docstrings[0].begin, f"Args:\n{described}", *(end[kind] for kind in _AFTER_ARGS)])
    return cls


def _parts(docstring: str) -> _Docstring:
    begin, _, rest = inspect.cleandoc(docstring).partition("\n\nArgs:\n")
    arguments, *paragraphs = rest.split("\n\n")
    end = {word if (word := each.split(None, 1)[0]) in _AFTER_ARGS else "": each for each in paragraphs}
    return _Docstring(begin, dict(re.findall(r"^    (\w+): (.*(?:\n     .*)*)", arguments, re.M)), end)
