"""Whether a criterion sums over its rows or takes their mean, where it does not say so."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from secondorder.criteria.known import is_known
from secondorder.criteria.losses import FunctionCriterion


def reduction_of(criterion: nn.Module, kwargs: dict[str, Any]) -> Any:
    """Returns what a criterion says of its reduction, "mean" or "sum"; None: nothing.

    Args:
        criterion: a module or a `FunctionCriterion`.
        kwargs: of its call.
    """
    if isinstance(criterion, FunctionCriterion) and is_known(criterion):
        return kwargs.get("reduction", "mean")
    return getattr(criterion, "reduction", kwargs.get("reduction"))


def sums_rows(criterion: nn.Module, arguments: Any, trained: list[int]) -> bool | None:
    """Tells whether a criterion sums over its rows, by evaluating it on the batch, and on the batch taken twice.

    The gradient of a row stays as it is where the loss is a sum, and halves where it is a mean.

    Args:
        criterion: called here, and so is what hooks on it.
        arguments: (args, kwargs) of a call; tensors with as many rows as the output have those of the batch.
        trained: the positions of its outputs among the leaves of `arguments`.

    Returns:
        None: the gradients are zero, and tell nothing. False also where the criterion takes no such batch.
    """
    if not trained:
        return False
    leaves, structure = tree_flatten(arguments)
    rows = leaves[trained[0]].shape[:1]

    def gradient(times: int) -> Tensor:
        own = [
            torch.cat([leaf] * times) if isinstance(leaf, Tensor) and rows and leaf.shape[:1] == rows else leaf for leaf in leaves
        ]
        outputs = [own[position].detach().requires_grad_() for position in trained]
        for position, output in zip(trained, outputs, strict=True):
            own[position] = output
        with torch.enable_grad():
            args, kwargs = tree_unflatten(own, structure)
            found = torch.autograd.grad(criterion(*args, **kwargs), outputs, allow_unused=True)
        return torch.cat([g[: rows[0]].flatten().double() for g in found if g is not None])

    try:
        once, twice = gradient(1), gradient(2)
    except Exception:  # of a criterion of one's own that takes but batches of its own kind
        return False
    squares = float(once @ once)
    return abs(float(twice @ once) / squares - 1) < 0.25 if 0 < squares < float("inf") else None
