"""Looks up what is known of a criterion, by its type or, for a function of torch.nn.functional, by the module of its name."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secondorder._tensors import to_compute_dtype
from secondorder.criteria.losses import FunctionCriterion

_FUNCTIONS: dict[Callable[..., Tensor], type[nn.Module]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.mse_loss: nn.MSELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
}


def evaluated(
    table: dict[type, Callable[..., Any]], criterion: nn.Module, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What the table's formula for this criterion gives, or None if it has none."""
    if isinstance(criterion, FunctionCriterion):
        module = _FUNCTIONS.get(criterion.function)
        if module is None or len(args) != 1 or not kwargs.keys() <= inspect.signature(module).parameters.keys():
            return None
        criterion, kwargs = module(**kwargs), {}
    formula = table.get(type(criterion))
    if formula is None or len(args) != 1 or kwargs:
        return None
    with torch.no_grad():
        # Rounded as half-precision outputs are, as under autocast, H would not be positive semi-definite.
        return formula(criterion, to_compute_dtype(output), args[0])


def normalizer(criterion: Any, count: int) -> float:
    """What the sum over `count` terms is divided by; NaN for a mean over none, as the loss itself is."""
    return 1.0 if criterion.reduction == "sum" else float(count) or math.nan
