"""Linear algebra that torch.linalg does not have."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def pos_eig(eigenvalues: Tensor, gamma: float) -> Tensor:
    """Applies Pos-Eig: a negative eigenvalue l becomes gamma * l."""
    return torch.where(eigenvalues < 0, gamma * eigenvalues, eigenvalues)


def conjugate_gradient(matrix: Callable[[Tensor], Tensor], rhs: Tensor, max_iter: int, tol: float) -> tuple[Tensor, int]:
    """Solves matrix(x) = rhs by conjugate gradients from 0.

    Args:
        matrix: multiplies by a symmetric positive definite matrix.
        rhs: of any shape.
        max_iter: the most iterations.
        tol: stops where |r| <= tol |rhs|.

    Returns:
        x, NaN where a residual was, and the iterations done. x is the last iterate before a p with p^T A p <= 0, which
        comes of an indefinite matrix, or of a p too small for its square.
    """
    x = torch.zeros_like(rhs)
    r, p = rhs.clone(), rhs.clone()
    rr = first = (r * r).sum()
    for iteration in range(max_iter):
        if math.isnan(rr):
            return torch.full_like(rhs, math.nan), iteration
        if rr <= tol**2 * first:
            return x, iteration
        ap = matrix(p)
        curvature = (p * ap).sum()
        if curvature <= 0:
            return x, iteration
        step = rr / curvature
        x += step * p
        r -= step * ap
        rr, previous = (r * r).sum(), rr
        p = r + (rr / previous) * p
    return x, max_iter
