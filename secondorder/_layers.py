"""The linear layers of a model, and their parameters."""

from torch import Tensor, nn


def parameters_of(layer: nn.Linear) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weight and bias; as attributes of a module they take ten times as long."""
    return layer._parameters["weight"], layer._parameters["bias"]  # type: ignore[return-value]


def linear_layers(model: nn.Module, shared: bool = False) -> dict[nn.Linear, str]:
    """The model's nn.Linear modules that compute W h + b from parameters of their own, with their names.

    Args:
        model: any module.
        shared: whether a weight may be shared: its layers are then left out.

    Raises:
        ValueError: a weight is shared, with another linear layer or with another module.
    """
    owners: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name)
    layers = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
            continue
        weight = module._parameters.get("weight")
        if weight is None or isinstance(weight, nn.UninitializedParameter):
            continue
        if weight.requires_grad and len(owners[weight]) > 1:
            if shared:
                continue
            raise ValueError(
                f"expected each linear layer to have a weight of its own, but {' and '.join(map(repr, owners[weight]))} are one "
                "parameter; curvature of shared weights is not defined here"
            )
        layers[module] = name
    return layers
