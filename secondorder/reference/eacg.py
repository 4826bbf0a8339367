"""EA-CG (Chen et al., Eq. 10 and 11): conjugate gradients, the solve of a layer, and the update of a whole net."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from secondorder.reference._lists import also_lists


def eacg_hvp(bias_hessian: Tensor, mean_input: Tensor, p: Tensor) -> Tensor:
    """Eq. 11b: H P a a^T."""
    return torch.outer(bias_hessian @ (p @ mean_input), mean_input)


@also_lists
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
    """Solves Eq. 10a and 10b for one layer.

    `truncated` runs conjugate gradients on matrices, as the paper writes it. Otherwise they solve the system along the mean input
    alone; across it the solution is known.
    """
    h, a = bias_hessian, mean_input
    if truncated:
        direction, iterations = conjugate_gradient(
            lambda p: (1 - alpha) * eacg_hvp(h, a, p) + alpha * p, -grad_weight, max_iter, tol
        )
    else:
        s, u = a @ a, grad_weight @ a
        q, iterations = conjugate_gradient(lambda p: (1 - alpha) * s * (h @ p) + alpha * p, u, max_iter, tol)
        z = torch.where(s > 0, (u - alpha * q) / s, 0 * q)
        direction = -(grad_weight - torch.outer(z, a)) / alpha
    count = torch.tensor(iterations, device=h.device)
    if grad_bias is None or not len(grad_bias):
        return direction, grad_weight.new_empty(0), count
    bias, _ = conjugate_gradient(lambda p: (1 - alpha) * (h @ p) + alpha * p, -grad_bias, max_iter, tol)
    return direction, bias, count


def eacg_update_(
    bias_hessian: Sequence[Tensor],
    mean_input: Sequence[Tensor],
    grad_weight: Sequence[Tensor],
    grad_bias: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    weight_momentum: Sequence[Tensor],
    bias_momentum: Sequence[Tensor],
    lr: Sequence[float],
    alpha: Sequence[float],
    momentum: Sequence[float],
    weight_decay: Sequence[float],
    max_iter: int,
    tol: float,
    truncated: bool,
    max_norm: Sequence[float] | None = None,
) -> Tensor:
    """Solves Eq. 10a and 10b for every layer, then sets V <- momentum V + P and W <- (1 - lr weight_decay) W + lr V.

    [P, d] is shortened to the Frobenius norm `max_norm` where it is longer. Nothing is written if the solution of any layer is
    not finite, or so large that lr V could overflow now or later, since |V| <= max |P| / (1 - momentum).
    """
    solutions, counts = [], []
    for h, a, b, g, damping, rate, mu in zip(bias_hessian, mean_input, grad_weight, grad_bias, alpha, lr, momentum, strict=True):
        p, d, iterations = eacg_solve(h, a, b, g, damping, max_iter, tol, truncated)
        solutions.append((p, d))
        reach = max(float(x.abs().max()) if x.isfinite().all() else math.inf for x in (p, d) if x.numel()) if p.numel() else 0.0
        reach *= max(1.0, abs(rate)) / max(1e-3, 1 - mu)
        counts.append(int(iterations) if reach <= torch.finfo(p.dtype).max / 8 else -1)
    for layer, (directions, bound) in enumerate(zip(solutions, max_norm or [], strict=bool(max_norm))):
        length = torch.cat([x.flatten() for x in directions]).norm()
        if length > bound:
            solutions[layer] = tuple(x * (bound / length) for x in directions)
    if all(count >= 0 for count in counts):
        for layer, directions in enumerate(solutions):
            for p, x, v in zip(directions, (weight, bias), (weight_momentum, bias_momentum), strict=True):
                if v:
                    p = v[layer].mul_(momentum[layer]).add_(p)
                x[layer].mul_(1 - lr[layer] * weight_decay[layer]).add_(p, alpha=lr[layer])
    return torch.tensor(counts, dtype=torch.int64, device=bias_hessian[0].device)


def conjugate_gradient(matrix: Callable[[Tensor], Tensor], rhs: Tensor, max_iter: int, tol: float) -> tuple[Tensor, int]:
    """Textbook CG from 0 for a positive definite `matrix` (a function), until |r| <= tol |rhs| or max_iter times."""
    size = rhs.abs().max() if rhs.numel() else rhs.new_ones(())
    size = torch.where(size > 0, size, 1)  # scaled, so that the squares of a small rhs do not underflow
    x, r = torch.zeros_like(rhs), rhs / size
    p = r.clone()
    rr = first = (r * r).sum()
    if first == 0:
        return matrix(p), 0  # 0; or NaN, where the matrix is not finite
    for iteration in range(max_iter):
        if math.isnan(rr):
            return torch.full_like(rhs, math.nan), iteration
        if rr <= tol**2 * first:
            return x * size, iteration
        ap = matrix(p)
        curvature = (p * ap).sum()
        if curvature <= 0:  # the matrix is indefinite, or the square of p underflows
            return x * size, iteration
        step = rr / curvature
        x += step * p
        r -= step * ap
        rr, previous = (r * r).sum(), rr
        p = r + (rr / previous) * p
    return x * size, max_iter
