"""The first and second derivative of an activation."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# From here on the derivatives of SiLU and of both GELUs are their limits; powers of a larger z overflow.
_FAR = 1024.0


def activation_derivatives(saved: Tensor, activation: str, parameter: float = 1.0) -> tuple[Tensor, Tensor]:
    """Sigma' and sigma'' from what autograd saves of an activation: its output h, or its preactivation z."""
    return _DERIVATIVES[activation](saved, parameter)


def _elu(h: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    return torch.where(h > 0, 1, h + alpha), torch.where(h > 0, 0, h + alpha)


def _softplus(z: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    s, linear = torch.sigmoid(beta * z), beta * z > 20  # from there on torch's own is the identity
    return torch.where(linear, 1, s), torch.where(linear, 0, beta * s * (1 - s))


def _silu(z: Tensor, _: float) -> tuple[Tensor, Tensor]:
    z = z.clamp(-_FAR, _FAR)
    s = torch.sigmoid(z)
    return s + z * s * (1 - s), s * (1 - s) * (2 + z * (1 - 2 * s))


def _gelu(z: Tensor, _: float) -> tuple[Tensor, Tensor]:
    z = z.clamp(-_FAR, _FAR)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return (1 + torch.erf(z / math.sqrt(2))) / 2 + z * density, density * (2 - z * z)


def _gelu_tanh(z: Tensor, _: float) -> tuple[Tensor, Tensor]:
    z = z.clamp(-_FAR, _FAR)
    scale, cubic = math.sqrt(2 / math.pi), 0.044715  # z (1 + tanh(y)) / 2 = z sigmoid(2 y), y = scale (z + cubic z^3)
    y, dy, d2y = scale * (z + cubic * z**3), scale * (1 + 3 * cubic * z * z), 6 * scale * cubic * z
    s, dt = torch.sigmoid(2 * y), 4 * torch.sigmoid(2 * y) * torch.sigmoid(-2 * y)
    return s + z * dt * dy / 2, dt * (dy + z * (d2y / 2 - torch.tanh(y) * dy * dy))


# By the name of the activation, of what autograd saves and the parameter; at a kink torch's own choice.
_DERIVATIVES: dict[str, Callable[[Tensor, float], tuple[Tensor, Tensor]]] = {
    "identity": lambda h, _: (torch.ones_like(h), torch.zeros_like(h)),
    "sigmoid": lambda h, _: (h * (1 - h), h * (1 - h) * (1 - 2 * h)),
    "tanh": lambda h, _: ((1 - h) * (1 + h), -2 * h * (1 - h) * (1 + h)),
    "relu": lambda h, _: ((h > 0).to(h), torch.zeros_like(h)),
    "leaky_relu": lambda h, slope: (torch.where(h > 0, h.new_ones(()), slope), torch.zeros_like(h)),
    "elu": _elu,
    "softplus": _softplus,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}
