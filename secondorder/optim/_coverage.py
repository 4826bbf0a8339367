"""Which parameters of a model a curvature covers, and why it does not cover the others."""

import torch
from torch import Tensor, nn

from secondorder._layers import linear_layers, uncovered
from secondorder.optim._numbers import check_counts


def supported_layers(owner: str, model: nn.Module) -> dict[nn.Linear, str]:
    """Returns the model's linear layers with their names, after a check that curvatures can be taken of the trainable ones."""
    if next(model.parameters(), None) is None:
        raise ValueError(
            f"{owner}: expected a model, and then its criterion, got {type(model).__name__} as the model, which has no parameters"
        )
    layers, reasons = linear_layers(model), uncovered(model)
    lazy = [name for name, module in model.named_modules() if isinstance(module, nn.modules.lazy.LazyModuleMixin)]
    if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
        raise ValueError(
            f"{owner}: expected layers that know their sizes, got the lazy {' and '.join(map(repr, lazy))}; "
            "call the model once first"
        )
    trainable = [layer for layer in layers if layer.weight.requires_grad and layer.weight not in reasons]
    if not trainable:
        why = "".join(f"; {reason}" for reason in dict.fromkeys(reasons.values()))
        if any(p.requires_grad for n in layers if not n.weight.requires_grad for p in n.parameters(recurse=False)):
            why += "; the weights of its nn.Linear layers are frozen, and their biases alone have no curvature"
        raise ValueError(
            f"{owner}: expected a model with at least one trainable nn.Linear, got {type(model).__name__} with none{why}. "
            "secondorder.EigenAdam trains any model"
        )
    for layer in trainable:
        if not layer.weight.is_contiguous():
            raise ValueError(
                f"{owner}: expected contiguous weights, got strides {layer.weight.stride()} in layer {layers[layer]!r}; "
                "make it contiguous first: layer.weight.data = layer.weight.data.contiguous()"
            )
        if layer.weight.dtype not in (torch.float32, torch.float64, torch.bfloat16):
            raise TypeError(
                f"{owner}: expected parameters of dtype float32, float64 or bfloat16, got {layer.weight.dtype} "
                f"in layer {layers[layer]!r}; for float16 keep the parameters in float32 and use torch.autocast"
            )
    return layers


def too_wide(owner: str, layers: dict[nn.Linear, str], max_outputs: int | None, max_inputs: int | None) -> dict[Tensor, str]:
    """Returns the trainable parameters of layers above a limit, each with the reason.

    Args:
        owner: whose limits they are, for errors.
        layers: the linear layers with their names.
        max_outputs: `max_factor_dim`, or None.
        max_inputs: `max_input_dim`, or None.

    Raises:
        ValueError: a limit is no integer, or below 1.
    """
    limits = [("max_factor_dim", max_outputs, "out_features"), ("max_input_dim", max_inputs, "in_features")]
    check_counts(owner, 1, {key: limit for key, limit, _ in limits}, optional=True)
    reasons: dict[Tensor, str] = {}
    for layer, name in layers.items():
        for key, limit, side in limits:
            size = getattr(layer, side)
            if limit is not None and size > limit:
                reason = f"layer {name!r} has {size} {side.replace('_features', 'puts')}, more than {key} = {limit}"
                reasons.update({p: reason for p in layer.parameters(recurse=False) if p.requires_grad})
    return reasons


def fallback_reasons(layers: dict[nn.Linear, str], uncovered: dict[Tensor, str]) -> dict[Tensor, str]:
    """Returns why parameters of linear layers may have a gradient and no curvature.

    Args:
        layers: the linear layers with their names.
        uncovered: the parameters that are never covered, with the reasons.
    """
    unseen = "no recorded loss depends on what its layer returns in training mode"
    reasons = {
        p: unseen if layer.weight.requires_grad else f"the weight of layer {name!r} is frozen"
        for layer, name in layers.items()
        for p in layer.parameters(recurse=False)
    }
    return reasons | uncovered
