"""The operators in plain PyTorch: what `secondorder.ops` must equal, and what the benchmarks compare it with.

Each function reads like its equation, has the signature of its twin in `secondorder.ops` (documented there), and works on
any device and dtype. Nothing here is fast on purpose.
"""

import math

import torch
from torch import Tensor


def pos_eig(eigenvalues: Tensor, gamma: float) -> Tensor:
    """Pos-Eig on eigenvalues: a negative one l becomes gamma * l (Chen et al., between Eq. 3 and 4)."""
    return torch.where(eigenvalues < 0, gamma * eigenvalues, eigenvalues)


def activation_derivatives(saved: Tensor, activation: str, parameter: float = 1.0) -> tuple[Tensor, Tensor]:
    """Sigma' and sigma'' by autograd, at the preactivation that `saved` stands for."""
    function, inverse = _ACTIVATIONS[activation]
    z = inverse(saved, parameter).detach().requires_grad_()
    with torch.enable_grad():
        ones = torch.ones_like(z)
        (d1,) = torch.autograd.grad(function(z, parameter), z, ones, create_graph=True)
        if not d1.requires_grad:
            return d1, torch.zeros_like(d1)
        (d2,) = torch.autograd.grad(d1, z, ones, allow_unused=True, materialize_grads=True)
    return d1.detach(), d2


_F = torch.nn.functional
# name -> (the activation of z, the preactivation z from what autograd saves: the output, or z itself)
_ACTIVATIONS = {
    "identity": (lambda z, p: z * 1, lambda h, p: h),
    "sigmoid": (lambda z, p: torch.sigmoid(z), lambda h, p: torch.logit(h)),
    "tanh": (lambda z, p: torch.tanh(z), lambda h, p: torch.atanh(h)),
    "relu": (lambda z, p: torch.relu(z), lambda h, p: h),
    "leaky_relu": (lambda z, p: _F.leaky_relu(z, p), lambda h, p: torch.where(h > 0, h, h / p)),
    "elu": (lambda z, p: _F.elu(z, p), lambda h, p: torch.where(h > 0, h, torch.log1p(h.clamp(max=0) / p))),
    "softplus": (lambda z, p: _F.softplus(z, p), lambda z, p: z),
    "silu": (lambda z, p: _F.silu(z), lambda z, p: z),
    "gelu": (lambda z, p: _F.gelu(z), lambda z, p: z),
    "gelu_tanh": (lambda z, p: _F.gelu(z, approximate="tanh"), lambda z, p: z),
}


def bias_hessian(
    bias_hessian: Tensor, weight: Tensor, d1: Tensor, d2: Tensor | None, grad_input: Tensor | None, gamma: float
) -> Tensor:
    """Eq. 8b: (W^T H W) * E[d1 d1^T] + diag(PosEig(sum_i d2_i * grad_input_i))."""
    result = (weight.T @ bias_hessian @ weight) * (d1.T @ d1 / len(d1))
    if d2 is not None and grad_input is not None:
        result += torch.diag(pos_eig((d2 * grad_input).sum(0), gamma))
    return result


def eacg_hvp(bias_hessian: Tensor, mean_input: Tensor, p: Tensor) -> Tensor:
    """Eq. 11b: H P a a^T."""
    return torch.outer(bias_hessian @ (p @ mean_input), mean_input)


def eacg_solve(
    bias_hessian: Tensor,
    mean_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    alpha: float,
    max_iter: int,
    tol: float,
    truncated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 10a and 10b. `truncated`: CG on matrices, as the paper writes it; else CG on the reduced system alone."""
    h, a = bias_hessian, mean_input
    if truncated:
        direction, iterations = conjugate_gradient(
            lambda p: (1 - alpha) * eacg_hvp(h, a, p) + alpha * p, -grad_weight, max_iter, tol
        )
    else:
        s, u = a @ a, grad_weight @ a
        q, iterations = conjugate_gradient(lambda p: (1 - alpha) * s * (h @ p) + alpha * p, u, max_iter, tol)
        z = torch.where(s > 0, (u - alpha * q) / s, 0)
        direction = -(grad_weight - torch.outer(z, a)) / alpha
    if grad_bias is None:
        return direction, grad_weight.new_empty(0), torch.tensor(iterations)
    bias, _ = conjugate_gradient(lambda p: (1 - alpha) * (h @ p) + alpha * p, -grad_bias, max_iter, tol)
    return direction, bias, torch.tensor(iterations)


def conjugate_gradient(matrix, rhs: Tensor, max_iter: int, tol: float) -> tuple[Tensor, int]:  # type: ignore[no-untyped-def]
    """Textbook CG from 0 for a positive definite `matrix` (a function), until |r| <= tol |rhs| or max_iter times."""
    x = torch.zeros_like(rhs)
    r, p = rhs.clone(), rhs.clone()
    rr = first = (r * r).sum()
    for iteration in range(max_iter):
        if rr <= tol**2 * first or math.isnan(rr):
            return x, iteration
        ap = matrix(p)
        curvature = (p * ap).sum()
        if curvature <= 0:  # an indefinite matrix, or p has become too small for its square
            return x, iteration
        step = rr / curvature
        x += step * p
        r -= step * ap
        rr, previous = (r * r).sum(), rr
        p = r + (rr / previous) * p
    return x, max_iter
