"""Whether a criterion sums over its rows or takes their mean, where it does not say so."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from secondorder.criteria.known import is_known
from secondorder.criteria.losses import FunctionCriterion


class _OnTheHost(TorchDispatchMode):
    """Has operators take copies on the host of what is elsewhere, such as a criterion's own tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, Tensor.cpu, (args, kwargs or {}))
        return func(*args, **kwargs)


def reduction_of(criterion: nn.Module, kwargs: dict[str, Any]) -> Any:
    """Returns what a criterion says of its reduction, "mean", "batchmean" or "sum"; None: nothing.

    Args:
        criterion: a module or a `FunctionCriterion`.
        kwargs: of its call.
    """
    if isinstance(criterion, FunctionCriterion) and is_known(criterion):
        return kwargs.get("reduction", "mean")
    said = getattr(criterion, "reduction", kwargs.get("reduction"))
    return said if said in ("mean", "batchmean", "sum") else None  # one that says "none" reduces what torch's loss gives it


def sums_rows(criterion: nn.Module, arguments: Any, trained: list[int]) -> bool | None:
    """Tells whether a criterion sums over its rows, by evaluating it on the batch and on that taken twice, else half of it.

    The gradient of a row stays as it is where the loss is a sum, and halves or doubles where it is a mean. A criterion may have a
    table of the batch's rows, which the batch taken twice indexes beyond its end: no error of that can be caught on a GPU, so the
    evaluation is on the host.

    Args:
        criterion: called here, and so is what hooks on it.
        arguments: (args, kwargs) of a call; tensors with as many rows as the output have those of the batch.
        trained: the positions of its outputs among the leaves of `arguments`.

    Returns:
        None: the gradients are zero, and tell nothing. False also where the criterion takes no such batch.
    """
    if not trained:
        return False
    leaves, structure = tree_flatten(tree_map_only(Tensor, Tensor.cpu, arguments))
    shape = leaves[trained[0]].shape[:1]
    every = torch.arange(shape.numel(), device="cpu")

    def gradient(rows: Tensor, count: int) -> Tensor:
        """Returns those of the first `count` rows."""
        own = [leaf[rows] if isinstance(leaf, Tensor) and shape and leaf.shape[:1] == shape else leaf for leaf in leaves]
        outputs = [own[position].detach().requires_grad_() for position in trained]
        for position, output in zip(trained, outputs, strict=True):
            own[position] = output
        with torch.enable_grad(), _OnTheHost():
            args, kwargs = tree_unflatten(own, structure)
            found = torch.autograd.grad(criterion(*args, **kwargs), outputs, allow_unused=True)
        return torch.cat([g[:count].flatten().double() for g in found if g is not None])

    for rows in (every.repeat(2), every[: len(every) // 2]):
        count = min(len(rows), len(every))
        try:
            before, after = gradient(every, count), gradient(rows, count)
        except Exception:  # of a criterion of one's own that takes but batches of its own kind
            continue
        squares = float(before @ before)
        return abs(float(after @ before) / squares - 1) < 0.25 if 0 < squares < float("inf") else None
    return False
