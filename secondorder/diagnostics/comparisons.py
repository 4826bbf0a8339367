"""How good a step is: its angle to exact steps, and the loss that it gains over what the quadratic model predicts."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from secondorder._layers import linear_layers
from secondorder._tape import Tape, TapeOptions
from secondorder._tensors import Transfer
from secondorder.diagnostics.copies import Criterion, copied, go_backward, parameter_names
from secondorder.diagnostics.steps import gauss_newton_step, newton_step
from secondorder.stepping import LocalLoss


class Cosines(NamedTuple):
    """Holds the cosines of the angles between two steps; NaN where one of the steps is 0.

    Args:
        layers: for every linear layer's parameters, by its name.
        total: for the parameters of all linear layers together.
    """

    layers: dict[str, float]
    total: float


def newton_cosine(
    model: nn.Module,
    criterion: Criterion,
    x: Tensor,
    y: Tensor,
    step: Mapping[str, Tensor],
    damping: float,
    max_size: int = 2048,
) -> Cosines:
    """Computes the cosine of the angle between a step and `newton_step`, for every linear layer and for all together.

    Args:
        model: from before the step: a module, called as model(x); one with random layers belongs in eval mode.
        criterion: a module or a function, called as criterion(output, y).
        x: a batch of inputs.
        y: their targets.
        step: {parameter name: change}; what it leaves out has not moved, what is not of a linear layer does not count.
        damping: of the Newton step, > 0.
        max_size: how many parameters a layer may have.

    Raises:
        ValueError: as `newton_step`; or the step is not one of this model's parameters.
    """
    _check_step("newton_cosine", model, step)
    return step_cosines(model, step, newton_step(model, criterion, x, y, damping, max_size))


def gauss_newton_cosine(
    model: nn.Module,
    criterion: Criterion,
    x: Tensor,
    y: Tensor,
    step: Mapping[str, Tensor],
    damping: float,
    *,
    blocks: bool = False,
    max_iter: int = 1000,
    tol: float = 1e-6,
) -> Cosines:
    """Computes the cosine of the angle between a step and `gauss_newton_step`, for every linear layer and for all together.

    Args:
        model: from before the step: a module, called as model(x); one with random layers belongs in eval mode.
        criterion: a module or a function, called as criterion(output, y), convex in the output.
        x: a batch of inputs.
        y: their targets.
        step: {parameter name: change}; what it leaves out has not moved, what is not of a linear layer does not count.
        damping: of the Gauss-Newton step, > 0.
        blocks: whether that is the block-diagonal matrix' step.
        max_iter: conjugate gradients' iterations for a system at most, >= 1.
        tol: they end where the residual is at most this times the gradient's length, >= 0.

    Raises:
        ValueError: as `gauss_newton_step`; or the step is not one of this model's parameters.
    """
    _check_step("gauss_newton_cosine", model, step)
    exact = gauss_newton_step(model, criterion, x, y, damping, blocks=blocks, max_iter=max_iter, tol=tol)
    return step_cosines(model, step, exact)


def step_cosines(model: nn.Module, step: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Cosines:
    """Computes the cosine of the angle between two steps, for every linear layer and for all together.

    Args:
        model: whose parameters they are of.
        step: {parameter name: change}; what it leaves out has not moved.
        other: the same; what is not in it does not count.

    Raises:
        ValueError: a step is not one of this model's parameters, or `other` has none of a linear layer.
    """
    model = getattr(model, "_orig_mod", model)
    for each in (step, other):
        _check_step("step_cosines", model, each)
    own = {key: step[key].double() if key in step else torch.zeros_like(value.double()) for key, value in other.items()}

    def cosine(keys: list[str]) -> float:
        a, b = (torch.cat([s[key].double().flatten() for key in keys]) for s in (own, other))
        return float(a @ b / (a.norm() * b.norm()))

    names = {name: [key for key in parameter_names(name) if key in other] for name in linear_layers(model).values()}
    layers = {name: keys for name, keys in names.items() if keys}
    if not layers:
        raise ValueError("step_cosines: expected other to have parameters of a linear layer, got none")
    return Cosines(
        {name: cosine(keys) for name, keys in layers.items()}, cosine([key for keys in layers.values() for key in keys])
    )


def reduction_ratio(
    model: nn.Module, criterion: Criterion, x: Tensor, y: Tensor, step: Mapping[str, Tensor], damping: float = 0.0
) -> float:
    """Computes rho of Levenberg and Marquardt: the change of the loss over that of the quadratic model (Botev et al., Eq. 42).

        rho = (L(theta + delta) - L(theta)) / (g^T delta + 1/2 delta^T (G + damping I) delta),

    G being the full Gauss-Newton matrix E[J^T H J], with J the derivatives of the output by the parameters and H the criterion's
    Hessian; for a criterion that is not convex, H is its mean over rows with the absolute values of its eigenvalues. Near 1 the
    model is trustworthy, below 0 the step went uphill. An optimizer that finds its own step has that of its last one, with its
    own damping and weight decay and on its subsample, in `optimizer.param_groups[0]["rho"]`; None: the step was taken back.

    Args:
        model: from before the step: a module, called as model(x); one with random layers belongs in eval mode.
        criterion: a module or a function, called as criterion(output, y).
        x: a batch of inputs.
        y: their targets.
        step: {parameter name: change}; what it leaves out has not moved.
        damping: of the model, >= 0.

    Raises:
        ValueError: the step is not one of this model's parameters.
    """
    _check_step("reduction_ratio", model, step)
    model, loss = copied(model, criterion)
    parameters = dict(model.named_parameters())
    whole = nn.Sequential(model)  # in training mode, which the tape asks for, whatever the mode of the model
    tape = Tape(linear_layers(whole), loss, TapeOptions(keep_inputs=True), whole)
    go_backward(whole, loss, x, y)
    local = LocalLoss(whole, loss, tape.losses, list(parameters.values()), 1.0, 0, tape)
    deltas = [step[name].to(p) if name in step else torch.zeros_like(p) for name, p in parameters.items()]
    first, second = local.products([deltas], Transfer())()
    predicted = float(first + second / 2) + damping / 2 * sum(float(d.double().square().sum()) for d in deltas)
    moved = [p.detach() + d for p, d in zip(parameters.values(), deltas, strict=True)]
    return (local.value(moved) - local.start) / predicted


def _check_step(name: str, model: nn.Module, step: Mapping[str, Tensor]) -> None:
    """Raises ValueError where a step is not one of a model's parameters."""
    shapes = {key: p.shape for key, p in getattr(model, "_orig_mod", model).named_parameters()}
    for key, change in step.items():
        if key not in shapes:
            raise ValueError(f"{name}: expected a step by parameter name, got {key!r}, which the model does not have")
        if change.shape != shapes[key]:
            raise ValueError(f"{name}: expected {list(shapes[key])} for {key!r}, got {list(change.shape)}")
