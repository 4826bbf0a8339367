"""The linear layers of a model, their parameters, and why others have no curvature."""

from torch import Tensor, nn


def parameters_of(layer: nn.Linear) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Returns weight and bias; as attributes of the module they would take ten times as long."""
    return layer._parameters.get("weight"), layer._parameters.get("bias")  # type: ignore[return-value]


def linear_layers(model: nn.Module) -> dict[nn.Linear, str]:
    """Returns the model's nn.Linear modules that compute W h + b from parameters, with their names.

    If several share weight and bias, it returns the first; `tied_layers` returns the others.
    """
    users, layers = _users(model), {}
    for name, module in model.named_modules():
        if _is_plain(module):
            weight, bias = parameters_of(module)
            if users[weight][0] is module or not _is_one_layer(users[weight], weight, bias):
                layers[module] = name
    return layers


def tied_layers(model: nn.Module, layers: dict[nn.Linear, str]) -> dict[nn.Linear, nn.Linear]:
    """Maps every other nn.Linear of the model that has the weight and bias of one of `layers` to that layer."""
    users, tied = _users(model), {}
    for layer in layers:
        weight, bias = parameters_of(layer)
        if _is_one_layer(users.get(weight, []), weight, bias):
            tied.update({other: layer for other in users[weight] if other is not layer})
    return tied  # type: ignore[return-value]


def uncovered(model: nn.Module) -> dict[Tensor, str]:
    """Returns the trainable parameters of nn.Linear modules that no layer's curvature covers, each with the reason."""
    names = {module: name for name, module in model.named_modules()}
    users = _users(model)
    reasons: dict[Tensor, str] = {}
    for module, name in names.items():
        if not isinstance(module, nn.Linear):
            continue
        weight = module._parameters.get("weight")
        if weight is None:
            reason = f"layer {name!r} computes its weight from other parameters (a parametrization, norm or pruning mask)"
        elif isinstance(weight, nn.UninitializedParameter):
            reason = f"layer {name!r} does not know its size yet"
        elif type(module).forward is not nn.Linear.forward:
            reason = f"layer {name!r} has a forward of its own"
        elif not _is_one_layer(users[weight], weight, module._parameters["bias"]):
            shared = " and ".join(sorted(repr(names[user]) for user in users[weight]))
            reason = f"the weight of layer {name!r} is shared by {shared}, which are not all nn.Linear layers with the same bias"
        else:
            continue
        reasons.update(dict.fromkeys([p for p in module.parameters() if p.requires_grad], reason))
    return reasons


def _users(model: nn.Module) -> dict[Tensor, list[nn.Module]]:
    """Returns the modules that each parameter belongs to."""
    users: dict[Tensor, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(parameter, []).append(module)
    return users


def _is_plain(module: nn.Module) -> bool:
    """Tells whether a module computes W h + b from parameters."""
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return False
    weight = module._parameters.get("weight")
    return weight is not None and not isinstance(weight, nn.UninitializedParameter)


def _is_one_layer(users: list[nn.Module], weight: Tensor, bias: Tensor | None) -> bool:
    """Tells whether all modules with this weight are nn.Linear layers with this bias."""
    return all(_is_plain(user) and user._parameters["weight"] is weight and user._parameters["bias"] is bias for user in users)
