"""Copies of models and criteria that diagnostics compute on, and the names of what they compute."""

import copy
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from secondorder._layers import linear_layers
from secondorder._random import preserved_generators
from secondorder.criteria import FunctionCriterion

Criterion = nn.Module | Callable[..., Tensor]


def copied(model: nn.Module, criterion: Criterion, dtype: torch.dtype | None = None) -> tuple[nn.Module, nn.Module]:
    """Returns copies of both without gradients, which no optimizer records."""
    loss = criterion if isinstance(criterion, nn.Module) else FunctionCriterion(criterion)
    model, loss = copy.deepcopy((getattr(model, "_orig_mod", model), getattr(loss, "_orig_mod", loss)))
    model.zero_grad()
    return (model, loss) if dtype is None else (model.to(dtype), loss.to(dtype))


def go_backward(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> None:
    """Makes a forward and a backward pass through copies that a tape is on."""
    for layer in linear_layers(model):
        layer.train()  # which means something to the tape alone
    with preserved_generators(model.parameters()), torch.enable_grad():
        loss(model(x), y).backward()


def parameter_names(layer: str) -> tuple[str, str]:
    """Returns the names of a layer's parameters."""
    prefix = f"{layer}." if layer else ""
    return f"{prefix}weight", f"{prefix}bias"


def fixed_values(model: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters and buffers by name, detached."""
    return {name: t.detach() for name, t in itertools.chain(model.named_parameters(), model.named_buffers())}
