"""What a forward pass begins from, so that it can be run again: random generators, the modules' attributes, their buffers."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from secondorder._random import RandomState, one_at_a_time


class ForwardState:
    """Taken before a forward pass: what the pass draws, reads and overwrites.

    Attributes that a pass sets anew (a hidden state, a counter) are kept by reference, buffers that it writes to as clones.

    Args:
        model: whose pass it is.
        written: the buffers known to be written to; None: that may be any.
    """

    def __init__(self, model: nn.Module, written: set[Tensor] | None = None):
        self._random = RandomState.now()
        self._other = _other_generators()
        self._attributes = [(module, dict(vars(module))) for module in model.modules()]
        buffers = list(model.buffers())
        self._versions = [(buffer, buffer._version) for buffer in buffers]
        self._by_values = written is None  # later that would wait for a GPU
        if written is not None:  # batch_norm leaves the versions of running statistics as they are
            norms = [module for module, _ in self._attributes if isinstance(module, _NormBase) and module.training]
            written = written.union(*(module.buffers(recurse=False) for module in norms))
        self._buffers = {buffer: buffer.clone() for buffer in buffers if written is None or buffer in written}

    def written(self) -> set[Tensor]:
        """Returns the buffers that have been written to since; the first time also those whose versions do not tell."""
        changed = {buffer for buffer, version in self._versions if buffer._version != version}
        if self._by_values:
            changed |= {buffer for buffer, values in self._buffers.items() if not torch.equal(buffer, values)}
        return changed

    def buffer(self, buffer: Tensor) -> Tensor:
        """Returns a clone of the buffer's values at that time where the pass writes to it, else the buffer itself."""
        return self._buffers[buffer].clone() if buffer in self._buffers else buffer

    @contextmanager
    def buffers_kept(self) -> Iterator[None]:
        """Puts the buffers back at its end to what they were then."""
        try:
            yield
        finally:
            for buffer, values in self._buffers.items():
                buffer.data.copy_(values)

    @contextmanager
    def restored(self, buffers: bool = False) -> Iterator[None]:
        """Puts generators, attributes and, if asked for, buffers back to what they were then; undoes that at its end.

        One thread at a time.
        """
        with one_at_a_time():
            now, other = RandomState.now(), _other_generators()
            attributes = [(module, dict(vars(module))) for module, _ in self._attributes]
            own = {buffer: buffer.clone() for buffer in self._buffers} if buffers else {}
            try:
                for buffer in own:
                    buffer.data.copy_(self._buffers[buffer])
                self._random.restore()
                _restore_other(self._other)
                _restore(self._attributes)
                yield
            finally:
                for buffer, values in own.items():
                    buffer.data.copy_(values)
                _restore(attributes)
                _restore_other(other)
                now.restore()


def _restore(attributes: list[tuple[nn.Module, dict[str, Any]]]) -> None:
    """Gives modules the attributes that they had, and takes others from them."""
    for module, saved in attributes:
        current = vars(module)
        for key in [key for key in current if key not in saved]:
            del current[key]
        current.update(saved)


def _other_generators() -> tuple[Any, Any]:
    """Returns the states of Python's generator and, where it is in use, of NumPy's."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state()


def _restore_other(states: tuple[Any, Any]) -> None:
    random.setstate(states[0])
    if states[1] is not None:
        sys.modules["numpy"].random.set_state(states[1])
