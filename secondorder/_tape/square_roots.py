"""Elementwise criteria as squares: phi(u) = rho(u)^2 + constant, by nodes of the autograd graph.

rho has the sign of phi' and is smooth where phi has its minimum. Gauss-Newton's curvature of rho^2 is phi'^2 / (2 phi): phi'' at
the minimum, and positive where phi grows linearly and phi'' is zero.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _mse(node: Any) -> Tensor:
    difference: Tensor = node._saved_self - node._saved_target
    return difference


def _huber(node: Any) -> Tensor:
    """Returns the root of u^2 / 2 within delta, delta (|u| - delta / 2) beyond."""
    return _linear_beyond(node._saved_self - node._saved_target, float(node._saved_delta), 0.5)


def _smooth_l1(node: Any) -> Tensor | None:
    """Returns the root of u^2 / (2 beta) within beta, |u| - beta / 2 beyond."""
    beta = float(node._saved_beta)
    return _linear_beyond(node._saved_self - node._saved_target, beta, 0.5 / beta) if beta > 0 else None


def _linear_beyond(u: Tensor, bound: float, factor: float) -> Tensor:
    """Returns the root of factor u^2 within the bound, and of its tangent beyond."""
    inside = u.abs() <= bound
    far = torch.where(inside, bound, u.abs())
    outside = torch.sign(u) * (factor * bound * (2 * far - bound)).sqrt()
    return torch.where(inside, math.sqrt(factor) * u, outside)


def _binary_cross_entropy(node: Any) -> Tensor | None:
    """Returns the root of binary cross-entropy, less its least value, the entropy of t in [0, 1].

    A positive class that counts p times is another target, p t / s, with the weight s = p t + 1 - t.
    """
    z, t, weight = node._saved_self, node._saved_target, node._saved_weight
    if t.requires_grad:
        return None
    if node._saved_pos_weight is not None:
        positive = node._saved_pos_weight * t
        scale = (positive + (1 - t)).clamp(min=torch.finfo(z.dtype).tiny)
        t, weight = positive / scale, scale if weight is None else weight * scale
    root = bernoulli_root(z, t)
    return root if weight is None else root * weight.sqrt()


def bernoulli_root(z: Tensor, t: Tensor) -> Tensor:
    """Returns the root of softplus(z) - t z, less its least value, the entropy of t in [0, 1]."""
    entropy = -torch.xlogy(t, t) - torch.xlogy(1 - t, 1 - t)
    least = torch.logit(t).clamp(-1e4, 1e4)  # where the least value is
    near = (z - least).abs() < torch.finfo(z.dtype).eps ** 0.2
    phi = F.softplus(-z) + (1 - t) * z - entropy
    floor = torch.finfo(z.dtype).tiny
    far = torch.sign(torch.sigmoid(z.detach()) - t) * torch.where(near, 1.0, phi).clamp(min=floor).sqrt()
    return far if not bool(near.any()) else torch.where(near, _near(z, least, t), far)


def _near(z: Tensor, least: Tensor, t: Tensor) -> Tensor:
    """Returns the root near its zero: z - least, times the root of half the second derivative there and two terms more."""
    d, h = z - least, t * (1 - t)
    third = h * (1 - 2 * t)
    fourth = h * (1 - 6 * h)
    return d * (h / 2 + third * d / 6 + fourth * d * d / 24).clamp(min=torch.finfo(z.dtype).tiny).sqrt()


def _soft_margin(node: Any) -> Tensor | None:
    """Returns the root of softplus(-t z)."""
    z, t = node._saved_self, node._saved_target
    if t.requires_grad:
        return None
    return (1 - 2 * (t > 0).to(z.dtype)) * F.softplus(-t * z).clamp(min=torch.finfo(z.dtype).tiny).sqrt()


def _cross_entropy(node: Any) -> Tensor | None:
    """Returns the root of the negative log-probability of each instance's class, times its weight: one residual each."""
    log_probability, target = node._saved_self, node._saved_target
    counts = target != node._saved_ignore_index
    chosen = target.where(counts, 0)
    axis = min(1, log_probability.dim() - 1)
    phi = -log_probability.gather(axis, chosen.unsqueeze(axis)).squeeze(axis)
    if node._saved_weight is not None:
        phi = phi * node._saved_weight[chosen]
    if node._saved_reduction == 1:  # a mean by weights, where a term's is one by numbers
        phi = phi * (phi.numel() / node._saved_total_weight)
    # A class that is certain has no gradient; nor has a row that does not count.
    return phi.where(counts, 0).clamp(min=torch.finfo(phi.dtype).tiny).sqrt()


def poisson_root(z: Tensor, t: Tensor) -> Tensor:
    """Returns the root of exp(z) - t z, less its least value, which is at log(t) for t > 0."""
    some = t > 0
    mean = t.where(some, 1)
    d = torch.where(some, z - mean.log(), 0)
    # (exp(d) - 1 - d) / d^2
    half = ratio(lambda d: (torch.expm1(d) - d) / d, d, [1 / math.factorial(k + 2) for k in range(12)], 0.1)
    return torch.where(some, d * (mean * half).sqrt(), torch.exp(z / 2))


# rho by the node's name; None: not of these arguments
ROOTS: dict[str, Callable[[Any], Tensor | None]] = {
    "MseLossBackward": _mse,
    "HuberLossBackward": _huber,
    "SmoothL1LossBackward": _smooth_l1,
    "BinaryCrossEntropyWithLogitsBackward": _binary_cross_entropy,
    "SoftMarginLossBackward": _soft_margin,
    "NllLossBackward": _cross_entropy,
    "NllLoss2DBackward": _cross_entropy,
}


def _softplus(node: Any) -> tuple[Tensor, float, float]:
    z = F.softplus(node._saved_self, float(node._saved_beta), float(node._saved_threshold))
    return _positive(z), 1.0, 0.0


def _positive(phi: Tensor) -> Tensor:
    """Returns the root of numbers above zero that may underflow."""
    return phi.clamp(min=torch.finfo(phi.dtype).tiny).sqrt()


# Functions of one number that are monotone and nowhere zero, or have their minimum at zero: rho, s and a constant for each
# node's name, whose value is s rho^2 + constant.
POSITIVE: dict[str, Callable[[Any], tuple[Tensor, float, float]]] = {
    "ExpBackward": lambda node: (_positive(node._saved_result), 1.0, 0.0),
    "SoftplusBackward": _softplus,
    "LogSigmoidBackward": lambda node: (_positive(F.softplus(-node._saved_self)), -1.0, 0.0),
    "CoshBackward": lambda node: (2**0.5 * torch.sinh(node._saved_self / 2), 1.0, 1.0),
}


def first_order(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Returns a function's value with a graph that has its first derivative, and no branches that change with the values."""
    leaf = t.detach().requires_grad_()
    with torch.enable_grad():
        value = function(leaf)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach() + slope * (t - leaf.detach())


def ratio(function: Callable[[Tensor], Tensor], u: Tensor, series: list[float], bound: float = 1e-2) -> Tensor:
    """Returns function(u) / u, for |u| below the bound by its power series."""
    near = u.abs() < bound
    far = u.where(~near, 1)
    small, total = u.where(near, 0), torch.zeros_like(u)
    for coefficient in reversed(series):
        total = total * small + coefficient
    return torch.where(near, total, function(far) / far)
