"""Symmetric matrices: inverses and eigendecompositions that rounding cannot break, Pos-Eig, conjugate gradients."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from secondorder.errors import NonFiniteError


def pos_eig(eigenvalues: Tensor, gamma: float) -> Tensor:
    """Returns Pos-Eig_gamma of eigenvalues: a negative one l becomes gamma l (Chen et al., between Eq. 3 and 4)."""
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
    size = rhs.abs().max() if rhs.numel() else rhs.new_ones(())
    size = torch.where(size > 0, size, 1)  # so that a small rhs has squares
    x, r = torch.zeros_like(rhs), rhs / size
    p = r.clone()
    rr = first = (r * r).sum()
    for iteration in range(max_iter):
        ap = matrix(p)
        curvature = (p * ap).sum()
        # By one wait for the device. No curvature: an indefinite matrix, or p has become too small for its square.
        if not (rr > tol**2 * first) & ~(curvature <= 0):
            return torch.where(rr.isnan(), math.nan, x * size), iteration
        step = rr / curvature
        x += step * p
        r -= step * ap
        rr, previous = (r * r).sum(), rr
        p = r + (rr / previous) * p
    return x * size, max_iter


_UNCHECKED: ContextVar[list[Tensor] | None] = ContextVar("_UNCHECKED", default=None)


@contextmanager
def unchecked() -> Iterator[list[Tensor]]:
    """Has `inverse` take every matrix within it for positive definite, so that it need not wait for the device.

    It adds a tensor of 0 to the list for each; where another number turns up there, what was computed is to be done anew.
    """
    infos: list[Tensor] = []
    token = _UNCHECKED.set(infos)
    try:
        yield infos
    finally:
        _UNCHECKED.reset(token)


def inverse(matrix: Tensor, name: str) -> Tensor:
    """Returns the inverse of a positive semi-definite matrix [..., n, n] that rounding may have left indefinite.

    A product with it is several times as fast as the two triangular solves with a Cholesky factor.

    Raises:
        NonFiniteError: it holds NaN or inf; the message names it.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    unchecked = _UNCHECKED.get()
    if unchecked is not None:
        unchecked.append(info)
    if unchecked is not None or not info.any():
        return torch.cholesky_inverse(factor)
    values, vectors = _eigh(matrix.double(), name)
    floor = values.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) * torch.finfo(matrix.dtype).eps
    return ((vectors / values.clamp(min=floor).unsqueeze(-2)) @ vectors.mT).to(matrix.dtype)


def eigh(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Returns the eigenvalues, rounding's negative ones set to 0, and eigenvectors of a positive semi-definite matrix [n, n].

    In float32 LAPACK may fail to converge on an ill-conditioned matrix; it is then done in float64.

    Raises:
        NonFiniteError: the matrix holds NaN or inf; the message names it.
    """
    try:
        values, vectors = _eigh(matrix, name)
    except torch.linalg.LinAlgError:
        values, vectors = (t.to(matrix.dtype) for t in _eigh(matrix.double(), name))
    return values.clamp(min=0), vectors


def _eigh(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Computes the eigendecomposition of a matrix, made symmetric, once its numbers are known to be finite."""
    if not torch.isfinite(matrix).all():
        raise NonFiniteError(f"NaN or inf in its {name}")
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return values, vectors


def gram(matrix: Tensor, result: Tensor) -> Tensor:
    """Writes M M^T [m, m] for M [m, n] by panels, at least its lower triangle: little more than half the whole product's work."""
    m = len(matrix)
    panel = max(64, -(-m // 8))
    for start in range(0, m, panel):
        stop = min(start + panel, m)
        torch.mm(matrix[start:stop], matrix[:stop].T, out=result[start:stop, :stop])
    return result


def shifted(matrix: Tensor, scale: float | Tensor, shift: float | Tensor) -> Tensor:
    """Returns scale M + shift I, a new tensor [n, n]."""
    result = scale * matrix
    result.diagonal().add_(shift)
    return result
