"""K-BFGS (Goldfarb, Ren & Bahamou, "Practical Quasi-Newton Methods for Training Deep Neural Networks", 2020).

H approximates the inverse of a layer's Hessian w.r.t. its preactivations [n, n], symmetric positive definite; s and y [n]
are the changes of the mean preactivation and of the mean gradient there. An update whose curvature s.y is not positive,
or whose result would not be finite, is skipped: H stays as it was, and the status of the layer lacks UPDATED.
"""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from secondorder import reference
from secondorder.ops._library import library, operator, without_tangents

UPDATED, DAMPED_S, DAMPED_Y = 1, 2, 4
"""The bits of the status of a BFGS update: H was updated; s was damped (theta1 < 1); y was damped (theta2 != 1)."""


@overload
def double_damping(s: Tensor, y: Tensor, inverse_hessian: Tensor, mu1: float, mu2: float) -> tuple[Tensor, Tensor]: ...
@overload
def double_damping(
    s: Sequence[Tensor], y: Sequence[Tensor], inverse_hessian: Sequence[Tensor], mu1: float, mu2: float
) -> tuple[list[Tensor], list[Tensor]]: ...
@without_tangents
def double_damping(
    s: Tensor | Sequence[Tensor],
    y: Tensor | Sequence[Tensor],
    inverse_hessian: Tensor | Sequence[Tensor],
    mu1: float,
    mu2: float,
) -> tuple[Tensor, Tensor] | tuple[list[Tensor], list[Tensor]]:
    """Applies Powell's double damping (Algorithm 3), which bounds how much a BFGS update can change H and its inverse.

    theta1 = (1 - mu1) y.Hy / (y.Hy - s.y)       if s.y < mu1 y.Hy, else 1;      s~ = theta1 s + (1 - theta1) H y
    theta2 = (1 - mu2) s~.s~ / (s~.s~ - s~.y)    if s~.y < mu2 s~.s~, else 1;    y~ = theta2 y + (1 - theta2) s~

    Then s~.y >= mu1 y.Hy and s~.y~ >= mu2 s~.s~.

    Args:
        s: the change of the variables, [n], or a list with one per layer.
        y: the change of the gradient, [n], or a list.
        inverse_hessian: H [n, n], symmetric positive definite, or a list.
        mu1: in (0, 1): the bound on s~.y, relative to y.H y.
        mu2: in (0, 1]: the bound on s~.y~, relative to s~.s~.

    Returns:
        s~ and y~ [n] each, or two lists.
    """
    if isinstance(inverse_hessian, Tensor):
        return library.double_damping(s, y, inverse_hessian, mu1, mu2)
    return library.double_damping.list(list(s), list(y), list(inverse_hessian), mu1, mu2)


@operator("double_damping(Tensor s, Tensor y, Tensor inverse_hessian, float mu1, float mu2) -> (Tensor s, Tensor y)")
def _(s: Tensor, y: Tensor, inverse_hessian: Tensor, mu1: float, mu2: float) -> tuple[Tensor, Tensor]:
    return s.new_empty(s.shape), y.new_empty(y.shape)


@operator(
    "double_damping.list(Tensor[] s, Tensor[] y, Tensor[] inverse_hessian, float mu1, float mu2) -> (Tensor[] s, Tensor[] y)"
)
def _(
    s: list[Tensor], y: list[Tensor], inverse_hessian: list[Tensor], mu1: float, mu2: float
) -> tuple[list[Tensor], list[Tensor]]:
    return [t.new_empty(t.shape) for t in s], [t.new_empty(t.shape) for t in y]


@overload
def bfgs_update_(inverse_hessian: Tensor, s: Tensor, y: Tensor) -> Tensor: ...
@overload
def bfgs_update_(inverse_hessian: Sequence[Tensor], s: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor: ...
@without_tangents
def bfgs_update_(
    inverse_hessian: Tensor | Sequence[Tensor], s: Tensor | Sequence[Tensor], y: Tensor | Sequence[Tensor]
) -> Tensor:
    """Makes the BFGS update of an inverse Hessian (Eq. 6), by one matrix-vector product and one symmetric rank-two update.

    H <- (I - rho s y^T) H (I - rho y s^T) + rho s s^T,   rho = 1/(s.y).

    H stays symmetric to the bit and positive definite, and H y = s. Skipped where s.y is not positive or the result not finite.

    Args:
        inverse_hessian: H [n, n], symmetric positive definite, contiguous, written in place; or a list with one per layer.
        s: [n], or a list.
        y: [n], or a list.

    Returns:
        H itself; given lists, the statuses, int64 [layers]: `UPDATED` where H was updated, 0 where the update was skipped.
    """
    if isinstance(inverse_hessian, Tensor):
        library.bfgs_update_(inverse_hessian, s, y)
        return inverse_hessian
    return library.bfgs_update_.list(list(inverse_hessian), list(s), list(y))


@operator(
    "bfgs_update_(Tensor(a!) inverse_hessian, Tensor s, Tensor y) -> Tensor status",
    plain=lambda *layer: reference.bfgs_update_(*([t] for t in layer))[0],
)
def _(inverse_hessian: Tensor, s: Tensor, y: Tensor) -> Tensor:
    return inverse_hessian.new_empty((), dtype=torch.int64)


@operator("bfgs_update_.list(Tensor(a!)[] inverse_hessian, Tensor[] s, Tensor[] y) -> Tensor status")
def _(inverse_hessian: list[Tensor], s: list[Tensor], y: list[Tensor]) -> Tensor:
    return _statuses(inverse_hessian)


@without_tangents
def damped_bfgs_update_(
    inverse_hessian: Sequence[Tensor],
    s: Sequence[Tensor],
    y: Sequence[Tensor],
    mu1: float,
    mu2: float,
    damped: bool = True,
    bounded: bool = False,
) -> Tensor:
    """Applies `double_damping` and then `bfgs_update_` to all layers of a net, and reads each H once less than both do.

    Args:
        inverse_hessian: H [n, n] of every layer, symmetric positive definite, contiguous, written in place.
        s: s [n] of every layer.
        y: y [n] of every layer.
        mu1: in (0, 1): the first damping's bound, y.H y <= s.y / mu1.
        mu2: in (0, 1]: the second damping's, s.y >= mu2 s.s.
        damped: whether the pair is damped; False: it is taken as it is.
        bounded: whether H is updated only if the pair satisfies both bounds, up to rounding. The second damping may break the
            first bound.

    Returns:
        The statuses, int64 [layers], of the bits `UPDATED` (the update was made), `DAMPED_S` (theta1 < 1) and `DAMPED_Y`
        (theta2 != 1). An update is skipped where s.y is not positive, the result not finite, or a bound asked for is broken.
    """
    return library.damped_bfgs_update_(list(inverse_hessian), list(s), list(y), mu1, mu2, damped, bounded)


@operator(
    "damped_bfgs_update_(Tensor(a!)[] inverse_hessian, Tensor[] s, Tensor[] y, float mu1, float mu2, bool damped=True, "
    "bool bounded=False) -> Tensor status"
)
def _(inverse_hessian: list[Tensor], *rest: object) -> Tensor:
    return _statuses(inverse_hessian)


@without_tangents
def hessian_action_update_(
    inverse: Sequence[Tensor], matrix: Sequence[Tensor], vector: Sequence[Tensor], damping: float
) -> Tensor:
    """Moves `inverse` towards the inverse of a known matrix by Hessian-action BFGS (Section 4), for all layers of a net.

    `bfgs_update_` with s = H a and y = (A + damping I) s, whose curvature is positive where A is positive semi-definite.
    If H is the inverse of A + damping I up to a multiple of a a^T, the result is the inverse (Theorem 1).

    Args:
        inverse: a list with one H [n, n] per layer, symmetric positive definite, contiguous, written in place.
        matrix: A [n, n] of every layer, symmetric positive semi-definite.
        vector: a [n] of every layer.
        damping: lambda_A >= 0.

    Returns:
        The statuses, int64 [layers]: `UPDATED` where H was updated, 0 where the update was skipped.
    """
    return library.hessian_action_update_(list(inverse), list(matrix), list(vector), damping)


@operator("hessian_action_update_(Tensor(a!)[] inverse, Tensor[] matrix, Tensor[] vector, float damping) -> Tensor status")
def _(inverse: list[Tensor], matrix: list[Tensor], vector: list[Tensor], damping: float) -> Tensor:
    return _statuses(inverse)


@overload
def lbfgs_product(s_pairs: Tensor, y_pairs: Tensor, v: Tensor) -> Tensor: ...
@overload
def lbfgs_product(s_pairs: Sequence[Tensor], y_pairs: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]: ...
@without_tangents
def lbfgs_product(
    s_pairs: Tensor | Sequence[Tensor], y_pairs: Tensor | Sequence[Tensor], v: Tensor | Sequence[Tensor]
) -> Tensor | list[Tensor]:
    """Returns H V for the H that BFGS updates make of the identity, without forming H.

    By Byrd, Nocedal & Schnabel (1994), Theorem 2.2,

    H V = V + [S^T, Y^T] [[R^-T (D + Y Y^T) R^-1, -R^-T], [-R^-1, 0]] [S; Y] V,   R = triu(S Y^T),   D = diag(S Y^T):

    two products with the pairs, however many columns V has.

    Args:
        s_pairs: S [p, n], the oldest pair first; or a list with one per layer, likewise the next two. A pair of zero
            vectors is an empty place.
        y_pairs: Y [p, n].
        v: V [n, k].

    Returns:
        H V [n, k], or a list.
    """
    if isinstance(v, Tensor):
        return library.lbfgs_product(s_pairs, y_pairs, v)
    return library.lbfgs_product.list(list(s_pairs), list(y_pairs), list(v))


@operator("lbfgs_product(Tensor s_pairs, Tensor y_pairs, Tensor v) -> Tensor")
def _(s_pairs: Tensor, y_pairs: Tensor, v: Tensor) -> Tensor:
    return v.new_empty(v.shape)


@operator("lbfgs_product.list(Tensor[] s_pairs, Tensor[] y_pairs, Tensor[] v) -> Tensor[]")
def _(s_pairs: list[Tensor], y_pairs: list[Tensor], v: list[Tensor]) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in v]


@without_tangents
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
    """Does `damped_bfgs_update_` for an H that only its pairs represent: damps, drops the oldest pair, appends the new one.

    Args:
        s_pairs: a list with one S [p, n] per layer, the oldest pair first, contiguous, written in place. A pair of zero vectors
            is an empty place.
        y_pairs: Y [p, n] of every layer, in the same way.
        s: s [n] of every layer.
        y: y [n] of every layer.
        mu1: in (0, 1): the first damping's bound, y.H y <= s.y / mu1.
        mu2: in (0, 1]: the second damping's, s.y >= mu2 s.s.
        damped: whether the pair is damped; False: it is taken as it is.
        bounded: whether the memory takes a pair only if that satisfies both bounds, up to rounding. The second damping may break
            the first bound.

    Returns:
        The statuses, int64 [layers], of the bits `UPDATED` (the update was made), `DAMPED_S` (theta1 < 1) and `DAMPED_Y`
        (theta2 != 1). An update is skipped where s.y is not positive, the result not finite, or a bound asked for is broken.
    """
    return library.damped_lbfgs_update_(list(s_pairs), list(y_pairs), list(s), list(y), mu1, mu2, damped, bounded)


@operator(
    "damped_lbfgs_update_(Tensor(a!)[] s_pairs, Tensor(b!)[] y_pairs, Tensor[] s, Tensor[] y, float mu1, float mu2, "
    "bool damped=True, bool bounded=False) -> Tensor status"
)
def _(s_pairs: list[Tensor], *rest: object) -> Tensor:
    return _statuses(s_pairs)


def _statuses(layers: list[Tensor]) -> Tensor:
    """Makes the fake statuses of an update of these layers."""
    return layers[0].new_empty(len(layers), dtype=torch.int64)
