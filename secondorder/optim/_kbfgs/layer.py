"""What K-BFGS computes for one layer: its parameters as one matrix, the bound on its step, and the curvature of its pairs."""

import math
from typing import Any

import torch
from torch import Tensor, nn

_FIRST_STEP = 0.1  # root mean square of a direction's rows while the layer's curvature is not known
# A pair's curvature s.y / s.s counts as at least this share of |y| / |s|: y also contains what the other layers have done, and
# may be orthogonal to s, or point against it.
_LEAST_CURVATURE = 0.3
Pair = tuple[Tensor, Tensor, list[float]]  # s, y and s.s, s.y, y.y


def damping_of(group: dict[str, Any], name: str) -> float:
    """Returns lambda_A or mu2 of a param_group, by their names there: if it is None, the root of the common damping."""
    return math.sqrt(group["damping"]) if group.get(name) is None else float(group[name])


def scaled_gradients(states: list[dict[str, Any]]) -> list[Tensor]:
    """Returns y / c of every layer."""
    return [state["y"] / (state.get("scale", 1.0) or 1.0) for state in states]


def products(s: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns s.s, s.y and y.y in float64, if the device has it: in float32 the squares may underflow."""
    s, y = (t.to(torch.float32 if t.device.type == "mps" else torch.float64) for t in (s, y))
    return s @ s, s @ y, y @ y


def update_scale(state: dict[str, Any], decay: float, ss: float, sy: float, yy: float) -> None:
    """Updates c after a pair: it is the bias-corrected geometric average of the pairs' curvatures, with this decay."""
    if not (0 < ss < math.inf and 0 < yy < math.inf):
        return  # nothing has moved, or moving made no difference
    curvature = math.log(max(sy / ss, _LEAST_CURVATURE * math.sqrt(yy / ss)))
    state["scale_pairs"] += 1
    share = (1 - decay) / (1 - decay ** state["scale_pairs"])
    before = math.log(state["scale"]) if state["scale"] else 0.0
    state["scale"] = math.exp(before + share * (curvature - before))


def damped_inverse(a: Tensor, damping: float, rows: Tensor | None = None) -> Tensor:
    """Returns (A + damping I)^-1 [n, n], symmetric; NaN if A + damping I is not positive definite.

    Args:
        a: A [n, n].
        damping: > 0.
        rows: X [m, n] with A = X^T X / m, if there is one. Few of them are cheaper by Woodbury's identity,
            (A + damping I)^-1 = (I - X^T (X X^T + m damping I)^-1 X) / damping.
    """
    if rows is not None and 0 < 2 * len(rows) < len(a):
        half = torch.linalg.solve_triangular(_cholesky(rows @ rows.T, len(rows) * damping), rows, upper=False)
        inverse = (half.T @ half).neg_()
        inverse.diagonal().add_(1)
        inverse /= damping
    else:
        inverse = torch.cholesky_inverse(_cholesky(a, damping))
    return ((inverse + inverse.T) / 2).contiguous()


def _cholesky(a: Tensor, shift: float) -> Tensor:
    """Returns L with L L^T = A + shift I; NaN if that is not positive definite."""
    factor, failed = torch.linalg.cholesky_ex(a + shift * torch.eye(len(a), dtype=a.dtype, device=a.device))
    return torch.where(failed == 0, factor, math.nan)


def alike(states: list[dict[str, Any]]) -> list[list[int]]:
    """Returns which layers' states have one dtype and device, as a call of an operator takes them, by their positions."""
    found: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for position, state in enumerate(states):
        found.setdefault((state["gradient"].dtype, state["gradient"].device), []).append(position)
    return list(found.values())


def trained_parameters(layer: nn.Linear, gradients: dict[Tensor, Tensor]) -> list[Tensor]:
    """Returns the weight, and the bias if there is one with a gradient."""
    return [p for p in (layer.weight, layer.bias) if p in gradients]


def columns(layer: nn.Linear) -> tuple[slice, slice]:
    """Returns the columns of W and of b in [W | b]."""
    return slice(0, layer.in_features), slice(layer.in_features, layer.in_features + 1)


def move(parameters: list[Tensor], old: list[Tensor], direction: Tensor, groups: list[dict[str, Any]], share: float) -> None:
    """Sets [W | b] = old - share lr direction, with weight decay if that is decoupled."""
    n = parameters[0].shape[1]
    for p, start, d, group in zip(parameters, old, (direction[:, :n], direction[:, n:].flatten()), groups, strict=False):
        lr = share * float(group["lr"])
        if group["decoupled_weight_decay"]:
            d = torch.add(d, start, alpha=float(group["weight_decay"]))
        torch.add(start, d, alpha=-lr, out=p)


def bounded(direction: Tensor, state: dict[str, Any], bound: float | None) -> Tensor:
    """Returns H_g M H_a / c, scaled down so that its rows have at most this root mean square length; None: no bound."""
    c = state.get("scale", 1.0)
    if bound is None and c == 1:
        return direction
    length = direction.norm() / math.sqrt(len(direction))
    factor = torch.where(length > 0, _FIRST_STEP / length, 0) if c == 0 else torch.full_like(length, 1 / c)
    return direction * (factor if bound is None else torch.where(factor * length > bound, bound / length, factor))


def averaged_gradient(layer: nn.Linear, average: Tensor, gradients: list[Tensor], share: float) -> Tensor:
    """Returns M [n_out, n_in + 1] after the gradients of W and b have entered with this share."""
    result = torch.empty_like(average)
    for gradient, own in zip(gradients, columns(layer), strict=False):
        part = average[:, own]
        torch.lerp(part, gradient.view_as(part), share, out=result[:, own])
    return result
