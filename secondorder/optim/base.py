"""What the optimizers share: which layers a model has, the tape on them, and the parameters that no curvature covers."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secondorder.criteria import FunctionCriterion
from secondorder.tape import Columns, LayerRecord, Tape

# What the numbers in param_groups must be, at construction and at every step.
_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "lr": (lambda v: 0 <= v < math.inf, ">= 0"),
    "alpha": (lambda v: 0 < v < 1, "in (0, 1)"),
    "momentum": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "weight_decay": (lambda v: 0 <= v < math.inf, ">= 0"),
    "factor_decay": (lambda v: 0 <= v < 1, "in [0, 1)"),
}


class CurvatureOptimizer(torch.optim.Optimizer):
    """A torch.optim.Optimizer for a model and a criterion, with a tape on its linear layers.

    Parameters outside of the linear layers that the recorded losses reach get the `fallback`: "sgd" updates them by
    SGD with the momentum, weight decay and learning rate of their group and says so once in a warning; "error" refuses.

    Args:
        model: a module with at least one trainable nn.Linear.
        criterion: a module or a function (output, target) -> scalar loss. The loop calls the module itself, or, for a
            function, `optimizer.criterion`.
        defaults: the param_group values.
        diagonal: whether the curvature needs the recursion's diagonal term.
        fallback: "sgd" or "error".
        grad_outputs: see `secondorder.tape.Tape`; likewise `columns`.
        columns: see there.
        keep_inputs: whether the tape keeps the model's and the criterion's arguments.
        samples: see `secondorder.tape.Tape`.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[..., Tensor],
        defaults: dict[str, Any],
        *,
        diagonal: bool,
        fallback: str,
        grad_outputs: bool = False,
        columns: Columns | None = None,
        keep_inputs: bool = False,
        samples: int | None = None,
    ):
        name = type(self).__name__
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{name}: expected model to be an nn.Module, got {type(model).__name__}; "
                "pass the model itself, not its parameters"
            )
        if not callable(criterion):
            raise TypeError(
                f"{name}: expected criterion to be an nn.Module or a function (output, target) -> loss, "
                f"got {type(criterion).__name__}"
            )
        if fallback not in ("sgd", "error"):
            raise ValueError(f"{name}: expected fallback 'sgd' or 'error', got {fallback!r}")
        layers = linear_layers(model)
        trainable = [layer for layer in layers if layer.weight.requires_grad]
        if not trainable:
            raise ValueError(
                f"{name}: expected a model with at least one trainable nn.Linear, got {type(model).__name__} with none"
            )
        for layer in trainable:
            if not layer.weight.is_contiguous():
                raise ValueError(
                    f"{name}: expected contiguous weights, got strides {layer.weight.stride()} in layer {layers[layer]!r}; "
                    "make it contiguous first: layer.weight.data = layer.weight.data.contiguous()"
                )
            if layer.weight.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"{name}: expected parameters of dtype float32 or float64, got {layer.weight.dtype} "
                    f"in layer {layers[layer]!r}"
                )
        check_numbers(name, defaults)
        super().__init__([p for p in model.parameters() if p.requires_grad], defaults)
        self.criterion = criterion if isinstance(criterion, nn.Module) else FunctionCriterion(criterion)
        self._layers = layers
        self._parameter_names = {p: n for n, p in model.named_parameters()}
        self._fallback = fallback
        self._fallback_warned: set[Tensor] = set()
        self._restart_warned: set[nn.Linear] = set()
        self._tape_options: dict[str, Any] = {
            "diagonal": diagonal,
            "grad_outputs": grad_outputs,
            "columns": columns,
            "model": model if keep_inputs else None,
            "samples": samples,
        }
        self._tape = Tape(layers, self.criterion, **self._tape_options)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the tape, which hangs on the model's hooks, and what a scheduler has put around `step`."""
        kept = {key: value for key, value in self.__dict__.items() if key not in ("_tape", "step")}
        return {**kept, "_recording": self._tape.recording}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Lays a tape on the copy's own model; `load_state_dict` comes here too, with the state alone."""
        recording = state.pop("_recording", None)
        super().__setstate__(state)
        if recording is not None:
            self._tape = Tape(self._layers, self.criterion, **self._tape_options)
            self._tape.recording = recording

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients, and with them what the tape recorded for them."""
        super().zero_grad(set_to_none)
        self._tape.clear()

    def remove_hooks(self) -> None:
        """Takes the tape off the model: it is an ordinary module again, and this optimizer can step no more."""
        self._tape.remove()

    def _groups(self) -> dict[Tensor, dict[str, Any]]:
        """The param_group of every parameter, once the groups' numbers are known to be valid."""
        for group in self.param_groups:
            check_numbers(f"{type(self).__name__}.step()", group)
        return {p: group for group in self.param_groups for p in group["params"]}

    def _check_gradients(self) -> None:
        if not any(p.grad is not None for group in self.param_groups for p in group["params"]):
            raise RuntimeError(f"{type(self).__name__}.step(): expected gradients, found none; call loss.backward() first")

    def _records(self) -> list[LayerRecord]:
        """The layers that the losses since the last step reach, or an error that says what is missing."""
        name = type(self).__name__
        records = self._tape.records()
        if not records:
            raise RuntimeError(
                f"{name}.step(): there are gradients, but no call of the criterion that leads to them was recorded. Compute "
                f"the loss by the criterion given to the optimizer ({self.criterion!r}; optimizer.criterion(output, target) "
                "where it is a function), with the model in training mode; optimizer.zero_grad() forgets the calls before it."
            )
        recursion = self._tape.columns is None and not self._tape.grad_outputs
        for record in records:
            if recursion and record.obstacle and record.layer not in self._restart_warned:
                self._restart_warned.add(record.layer)
                warnings.warn(
                    f"secondorder: the output of layer {self._layers[record.layer]!r} {record.obstacle}; the bias Hessian's "
                    "recursion is not defined there. The layer gets its empirical Fisher block, and the recursion "
                    "starts anew from it.",
                    stacklevel=3,
                )
        return records

    def _uncovered(self, covered: set[Tensor]) -> list[tuple[Tensor, float, float, float]]:
        """The fallback's updates: (parameter, lr, momentum, weight decay) of all with a gradient outside of `covered`.

        Raises RuntimeError unless everything about them is sound.
        """
        found = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None and p not in covered]
        new = [p for p, _ in found if p not in self._fallback_warned]
        if new:
            names = ", ".join(repr(self._parameter_names.get(p, "?")) for p in new)
            if self._fallback == "error":
                raise RuntimeError(
                    f"{type(self).__name__}.step(): no curvature covers the parameters {names}, and fallback='error'"
                )
            self._fallback_warned.update(new)
            warnings.warn(
                f"secondorder: no curvature covers the parameters {names}; they are updated by the fallback, SGD.",
                stacklevel=3,
            )
        updates = []
        for p, group in found:
            name, gradient = self._parameter_names.get(p, "?"), p.grad
            if gradient.layout is not torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__}.step(): expected dense gradients, got a sparse one for {name!r}; use sparse=False"
                )
            lr, momentum, decay = (float(group[key] or 0) for key in ("lr", "momentum", "weight_decay"))
            # |v| <= max |g| / (1 - momentum): bounded like this, no update overflows. NaN fails the comparison.
            reach = gradient.abs().amax() * (max(1.0, lr) / (1 - momentum)) if gradient.numel() else 0.0
            if not reach <= torch.finfo(gradient.dtype).max / 8:
                raise RuntimeError(
                    f"{type(self).__name__}.step(): the gradient of {name!r} holds NaN or inf, or is too large; "
                    "no parameter and no state has changed"
                )
            updates.append((p, lr, momentum, decay))
        return updates

    def _fallback_update(self, updates: list[tuple[Tensor, float, float, float]]) -> None:
        """SGD: v <- momentum v + g, p <- (1 - lr weight_decay) p - lr v."""
        for p, lr, momentum, decay in updates:
            direction = p.grad
            assert direction is not None
            if momentum != 0:
                state = self.state[p]
                if "momentum" in state:
                    direction = state["momentum"].mul_(momentum).add_(direction)
                else:
                    direction = state["momentum"] = direction.clone()
            p.mul_(1 - lr * decay).add_(direction, alpha=-lr)


def check_numbers(owner: str, values: dict[str, Any]) -> None:
    """Raises where one of the numbers that a param_group holds is not what it must be.

    Raises:
        TypeError: it is not a number.
        ValueError: it is out of range.
    """
    for name, (valid, expected) in _NUMBERS.items():
        value = values.get(name)
        if value is not None:  # lr=None: the quadratic model gives it
            try:
                number = float(value)
            except (TypeError, ValueError):
                raise TypeError(f"{owner}: expected {name} to be a number, got {value!r}") from None
            if not valid(number):
                raise ValueError(f"{owner}: expected {name} {expected}, got {value!r}")


def linear_layers(model: nn.Module) -> dict[nn.Linear, str]:
    """The model's nn.Linear modules that compute W h + b from parameters of their own, with their names.

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
            raise ValueError(
                f"expected each linear layer to have a weight of its own, but {' and '.join(map(repr, owners[weight]))} are one "
                "parameter; curvature of shared weights is not defined here"
            )
        layers[module] = name
    return layers
