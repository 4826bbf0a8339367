"""Access to the compiled operators, and the registration of their fake implementations."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from secondorder import _C  # noqa: F401  (importing it registers torch.ops.secondorder)

library = torch.ops.secondorder


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a fake implementation: shapes and dtypes alone, for torch.compile, torch.export and tensors on "meta".

    It raises where its tensors are on several devices, as the real operator does.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any) -> Any:
            devices = {leaf.device for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
            if len(devices) > 1:
                raise ValueError(f"{name}: expected all tensors on one device, got {', '.join(sorted(map(str, devices)))}")
            return function(*args)

        torch.library.register_fake(f"secondorder::{name}", checked)
        return function

    return register
