"""K-BFGS (Goldfarb, Ren & Bahamou, 2020): double damping, BFGS updates, and limited memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from secondorder.reference._lists import also_lists


@also_lists
def double_damping(s: Tensor, y: Tensor, inverse_hessian: Tensor, mu1: float, mu2: float) -> tuple[Tensor, Tensor]:
    """Goldfarb et al., Algorithm 3: Powell's damping on H, then with B = I."""
    hy = inverse_hessian @ y
    sy, yhy = s @ y, y @ hy
    theta = (1 - mu1) * yhy / (yhy - sy)
    s = torch.where(sy < mu1 * yhy, theta * s + (1 - theta) * hy, s)
    sy, ss = s @ y, s @ s
    theta = (1 - mu2) * ss / (ss - sy)
    return s, torch.where(sy < mu2 * ss, theta * y + (1 - theta) * s, y)


def bfgs_update_(
    inverse_hessian: Tensor | Sequence[Tensor], s: Tensor | Sequence[Tensor], y: Tensor | Sequence[Tensor]
) -> Tensor:
    """Goldfarb et al., Eq. 6, multiplied out: H - rho (s q^T + q s^T) + rho (1 + rho y.q) s s^T with q = H y."""
    if isinstance(inverse_hessian, Tensor):
        _bfgs(inverse_hessian, s, y)
        return inverse_hessian
    pairs = list(zip(s, y, strict=True))
    return _statuses(inverse_hessian, [(_bfgs(h, *pair), pair, pair) for h, pair in zip(inverse_hessian, pairs, strict=True)])


def damped_bfgs_update_(
    inverse_hessian: Sequence[Tensor],
    s: Sequence[Tensor],
    y: Sequence[Tensor],
    mu1: float,
    mu2: float,
    damped: bool = True,
    bounded: bool = False,
) -> Tensor:
    """Goldfarb et al., Algorithm 3 and Eq. 6, layer by layer."""
    updates = []
    for h, *pair in zip(inverse_hessian, s, y, strict=True):
        s_given, y_given = double_damping(*pair, h, mu1, mu2) if damped else pair
        taken = not bounded or _within_bounds(s_given, y_given, h @ y_given, mu1, mu2)
        updates.append((taken and _bfgs(h, s_given, y_given), pair, (s_given, y_given)))
    return _statuses(s, updates)


def hessian_action_update_(
    inverse: Sequence[Tensor], matrix: Sequence[Tensor], vector: Sequence[Tensor], damping: float
) -> Tensor:
    """Goldfarb et al., Section 4: BFGS with s = H a and y = (A + lambda_A I) s, layer by layer."""
    updates = []
    for h, a, mean in zip(inverse, matrix, vector, strict=True):
        s = h @ mean
        pair = s, a @ s + damping * s
        updates.append((_bfgs(h, *pair), pair, pair))
    return _statuses(inverse, updates)


@also_lists
def lbfgs_product(s_pairs: Tensor, y_pairs: Tensor, v: Tensor) -> Tensor:
    """Applies the two-loop recursion from H = I (Nocedal & Wright, Algorithm 7.4) to the columns of v; skips empty places."""
    pairs = [(s, y, 1 / (s @ y)) for s, y in zip(s_pairs, y_pairs, strict=True) if s @ y != 0]
    shares, v = [], v.clone()
    for s, y, rho in reversed(pairs):
        shares.append(rho * (s @ v))
        v = v - torch.outer(y, shares[-1])
    for s, y, rho in pairs:
        v = v + torch.outer(s, shares.pop() - rho * (y @ v))
    return v


def damped_lbfgs_update_(
    s_pairs: Sequence[Tensor],
    y_pairs: Sequence[Tensor],
    s: Sequence[Tensor],
    y: Sequence[Tensor],
    mu1: float,
    mu2: float,
    damped: bool = True,
    bounded: bool = False,
) -> Tensor:
    """Goldfarb et al., Algorithm 3 with the H that the pairs represent, layer by layer. The new pair replaces the oldest."""
    updates = []
    for *memories, s_layer, y_layer in zip(s_pairs, y_pairs, s, y, strict=True):
        h = lbfgs_product(*memories, torch.eye(len(s_layer), dtype=s_layer.dtype, device=s_layer.device))
        given = double_damping(s_layer, y_layer, h, mu1, mu2) if damped else (s_layer, y_layer)
        curvature = given[0] @ given[1]
        updated = bool(curvature > 0 and all(torch.isfinite(x @ x / curvature) for x in given))
        updated = updated and (not bounded or _within_bounds(given[0], given[1], h @ given[1], mu1, mu2))
        for memory, new in zip(memories, given if updated else ()):
            memory.copy_(torch.cat([memory[1:], new[None]]))
        updates.append((updated, (s_layer, y_layer), given))
    return _statuses(s, updates)


def _bfgs(h: Tensor, s: Any, y: Any) -> bool:
    """Updates H, unless the curvature is not positive or a number would not be finite. Returns whether it did."""
    q, rho = h @ y, 1 / (s @ y)
    update = rho * (1 + rho * (y @ q)) * torch.outer(s, s) - rho * (torch.outer(s, q) + torch.outer(q, s))
    updated = bool(s @ y > 0 and torch.isfinite(h + update).all())
    if updated:
        h += update
    return updated


def _within_bounds(s: Tensor, y: Tensor, hy: Tensor, mu1: float, mu2: float) -> bool:
    """Tells whether y.Hy / s.y <= 1 / mu1 and s.s / s.y <= 1 / mu2, up to rounding: damped pairs lie on a bound."""
    curvature = (1 + 1e-3) * (s @ y)
    return bool(mu1 * (y @ hy) <= curvature and mu2 * (s @ s) <= curvature)


def _statuses(layers: Sequence[Tensor], updates: Sequence[tuple[bool, Any, Any]]) -> Tensor:
    """Encodes updates by the bits `ops.UPDATED`, `ops.DAMPED_S` and `ops.DAMPED_Y`.

    Args:
        layers: tensors whose device the result is on.
        updates: for each layer whether it was updated, its pair (s, y), and the damped pair.
    """
    bits = []
    for updated, pair, damped in updates:
        s_damped, y_damped = (not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(pair, damped, strict=True))
        bits.append(updated + 2 * s_damped + 4 * y_damped)
    return torch.tensor(bits, device=layers[0].device)
