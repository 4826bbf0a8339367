"""Damped least squares: the minimum of |r + J d|^2 + sum_j t_j (theta_j + d_j)^2 + mu |d|^2 over d, for several mu."""

from collections.abc import Callable

import torch
from torch import Tensor

from secondorder._tape.factored import Buffer, Jacobian
from secondorder.linalg import gram

DIRECT = 1500  # rows up to which J J^T is formed and factorised: beyond, that costs more than an approximation
RANK = 200  # of Nystrom's approximation
ITERATIONS = 30  # of conjugate gradients with it, at most
RESIDUAL = 1e-2  # where they end, relative to the right-hand side
SOLVERS = ("auto", "rows", "parameters", "nystrom")


class DampedLeastSquares:
    """Solves (J^T J + diag(t) + mu I) x = J^T b for one J and as many mu and b as are asked for.

    By "rows": J^T (J J^T + mu I)^-1 b, m numbers; by "parameters", P numbers: the smaller system of both is solved by Cholesky's
    method. By "nystrom": the system of the rows by conjugate gradients, preconditioned by an approximation of J J^T of rank 200
    (Frangella et al., 2021) that serves all mu; "auto" takes it beyond 1500 rows. With penalties it gives way to "rows".

    Args:
        jacobian: J [m, P].
        penalties: t [P], >= 0, or None: zero.
        solver: "rows", "parameters", "nystrom" or "auto".
        memory: bytes that J may take; a larger one is formed for "parameters" and with penalties alone.
        generator: for the random directions of "nystrom".
        buffer: memory for matrices.
    """

    def __init__(
        self, jacobian: Jacobian, penalties: Tensor | None, solver: str, memory: int, generator: torch.Generator, buffer: Buffer
    ):
        m, n = jacobian.rows, jacobian.columns
        if solver == "auto":
            solver = "parameters" if n < m else "nystrom" if m > DIRECT and penalties is None else "rows"
        if solver == "nystrom" and penalties is not None:
            solver = "rows"
        fits = m * n * jacobian.like.element_size() <= memory
        if solver == "parameters" or penalties is not None or (fits and (solver == "nystrom" or jacobian.prefers_dense())):
            jacobian.dense()
        self._jacobian, self._penalties, self._buffer = jacobian, penalties, buffer
        self._nystrom = _nystrom(jacobian, generator) if solver == "nystrom" else None
        self.solver = "rows" if solver == "nystrom" and self._nystrom is None else solver
        #: tr(J J^T), the scale of mu.
        self.trace: Tensor
        if self.solver == "nystrom" or (self.solver == "rows" and penalties is not None):
            self.trace = jacobian.squared_norm()
            return
        if self.solver == "rows":
            self._matrix = jacobian.gram()
        else:
            self._matrix = gram(jacobian.dense().T, buffer.matrix("gram", n, n, jacobian.like))
        self._diagonal = self._matrix.diagonal().clone()
        self.trace = self._diagonal.sum()
        if self.solver == "parameters" and penalties is not None:
            self._diagonal += penalties

    def at(self, mu: Tensor | float) -> "tuple[Callable[[Tensor], Tensor], Tensor | float]":
        """Returns b [m] -> x [P] at a damping, and not 0 if rounding leaves the matrix indefinite: then x is nothing."""
        jacobian = self._jacobian
        if self.solver == "nystrom":
            assert self._nystrom is not None
            vectors, values = self._nystrom
            return lambda b: jacobian.rmv(_conjugate_gradients(jacobian, vectors, values, mu, b)), 0.0
        scale = None
        if self.solver == "rows" and self._penalties is not None:  # by columns divided by the root of t + mu
            scale = 1 / (self._penalties + mu)
            m = jacobian.rows
            matrix = gram(jacobian.dense() * scale.sqrt(), self._buffer.matrix("gram", m, m, jacobian.like))
            matrix.diagonal().add_(1)
        else:
            matrix = self._matrix
            matrix.diagonal().copy_(self._diagonal + mu)
        factor, info = torch.linalg.cholesky_ex(matrix)
        if self.solver == "parameters":
            return lambda b: torch.cholesky_solve(jacobian.rmv(b).unsqueeze(1), factor).squeeze(1), info

        def solve(b: Tensor) -> Tensor:
            x = jacobian.rmv(torch.cholesky_solve(b.unsqueeze(1), factor).squeeze(1))
            return x if scale is None else scale * x

        return solve, info

    def step(self, solve: Callable[[Tensor], Tensor], r: Tensor, theta: Tensor, mu: Tensor | float) -> Tensor:
        """Returns the minimum d [P], with the solve of this mu."""
        if self._penalties is None:
            return -solve(r)
        # With base = -t theta / (t + mu) the rest is the minimum of |r + J base + J d'|^2 + d'^T diag(t + mu) d'.
        base = -self._penalties * theta / (self._penalties + mu)
        return base - solve(r + self._jacobian.mv(base))


def _nystrom(jacobian: Jacobian, generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
    """Returns U [m, k] and l [k] with U diag(l) U^T near J J^T; None where rounding forbids."""
    m = jacobian.rows
    k = min(RANK, m)
    like = jacobian.like
    directions = torch.randn(m, k, dtype=like.dtype, generator=generator, device="cpu").to(like.device)
    directions = torch.linalg.qr(directions)[0]
    sketch = jacobian.mm(jacobian.rmm(directions))
    shift = 45 * torch.finfo(like.dtype).eps * _norm(sketch)
    sketch = sketch + shift * directions
    core = directions.T @ sketch
    factor, info = torch.linalg.cholesky_ex((core + core.T) / 2)
    if info.item():
        return None
    b = torch.linalg.solve_triangular(factor, sketch.T, upper=False)  # b^T b is near J J^T + shift I
    values, vectors = torch.linalg.eigh(b @ b.T)
    values = values.clamp_min(torch.finfo(like.dtype).tiny)
    basis = (b.T @ vectors) / values.sqrt()
    if not bool(torch.isfinite(basis).all()):
        return None
    return basis, (values - shift).clamp_min(0)


def _conjugate_gradients(jacobian: Jacobian, vectors: Tensor, values: Tensor, mu: Tensor | float, b: Tensor) -> Tensor:
    """Returns (J J^T + mu I)^-1 b to `RESIDUAL`, preconditioned by U diag(l) U^T."""
    size = _norm(b).clamp_min(torch.finfo(b.dtype).tiny)
    weights = (values.min() + mu) / (values + mu) - 1

    def precondition(r: Tensor) -> Tensor:
        return r + vectors @ (weights * (vectors.T @ r))

    x, r = torch.zeros_like(b), b / size
    z = precondition(r)
    p, rz = z.clone(), r @ z
    for _ in range(ITERATIONS):
        q = jacobian.mv(jacobian.rmv(p)) + mu * p
        step = rz / (p @ q)
        x += step * p
        r -= step * q
        if not bool(r.norm() > RESIDUAL):
            break
        z = precondition(r)
        rz, previous = r @ z, rz
        p = z + (rz / previous) * p
    return size * x


def _norm(t: Tensor) -> Tensor:
    """Returns the norm of small numbers, too, whose squares single precision does not have."""
    return torch.linalg.vector_norm(t, dtype=torch.float64).to(t.dtype)
