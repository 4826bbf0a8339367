"""The first and second derivative of an activation, by autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

# name -> (the activation of z; z from what autograd saves of the activation, which is its output or z itself)
ACTIVATIONS = {
    "identity": (lambda z, p: z * 1, lambda h, p: h),
    "sigmoid": (lambda z, p: torch.sigmoid(z), lambda h, p: torch.logit(h)),
    "tanh": (lambda z, p: torch.tanh(z), lambda h, p: torch.atanh(h)),
    "relu": (lambda z, p: torch.relu(z), lambda h, p: h),
    "leaky_relu": (lambda z, p: F.leaky_relu(z, p), lambda h, p: torch.where(h > 0, h, h / p)),
    "elu": (lambda z, p: F.elu(z, p), lambda h, p: torch.where(h > 0, h, torch.log1p(h.clamp(max=0) / p))),
    "softplus": (lambda z, p: F.softplus(z, p), lambda z, p: z),
    "silu": (lambda z, p: F.silu(z), lambda z, p: z),
    "gelu": (lambda z, p: F.gelu(z), lambda z, p: z),
    "gelu_tanh": (lambda z, p: F.gelu(z, approximate="tanh"), lambda z, p: z),
}


def activation_derivatives(saved: Tensor, activation: str, parameter: float = 1.0) -> tuple[Tensor, Tensor]:
    """Sigma' and sigma'' by autograd, at the preactivation that gave `saved`."""
    function, inverse = ACTIVATIONS[activation]
    z = inverse(saved, parameter).detach().requires_grad_()
    with torch.enable_grad():
        ones = torch.ones_like(z)
        (d1,) = torch.autograd.grad(function(z, parameter), z, ones, create_graph=True)
        if not d1.requires_grad:
            return d1, torch.zeros_like(d1)
        (d2,) = torch.autograd.grad(d1, z, ones, allow_unused=True, materialize_grads=True)
    return d1.detach(), d2
