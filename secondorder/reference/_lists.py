"""Functions of one layer, applied to lists over the layers of a net."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def also_lists(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function of one layer also take lists, with an entry for each layer of a net, as its twin does."""

    @functools.wraps(function)
    def either(*args: Any) -> Any:
        if isinstance(args[0], Tensor):
            return function(*args)
        columns = [arg if isinstance(arg, list | tuple) else [arg] * len(args[0]) for arg in args]
        results = [function(*layer) for layer in zip(*columns, strict=True)]
        if not results or isinstance(results[0], Tensor):
            return results
        return tuple(torch.stack(r) if r[0].dim() == 0 else list(r) for r in zip(*results, strict=True))

    return either
