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
    """Returns the root of softplus(z) - t z, less its least value, the entropy of t in [0, 1].

    A positive class that counts p times is another target, p t / s, with the weight s = p t + 1 - t.
    """
    z, t, weight = node._saved_self, node._saved_target, node._saved_weight
    if t.requires_grad:
        return None
    if node._saved_pos_weight is not None:
        positive = node._saved_pos_weight * t
        scale = (positive + (1 - t)).clamp(min=torch.finfo(z.dtype).tiny)
        t, weight = positive / scale, scale if weight is None else weight * scale
    entropy = -torch.xlogy(t, t) - torch.xlogy(1 - t, 1 - t)
    least = torch.logit(t).clamp(-1e4, 1e4)  # where the least value is
    near = (z - least).abs() < torch.finfo(z.dtype).eps ** 0.2
    phi = F.softplus(-z) + (1 - t) * z - entropy
    floor = torch.finfo(z.dtype).tiny
    far = torch.sign(torch.sigmoid(z.detach()) - t) * torch.where(near, 1.0, phi).clamp(min=floor).sqrt()
    root = far if not bool(near.any()) else torch.where(near, _near(z, least, t), far)
    return root if weight is None else root * weight.sqrt()


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
