"""EA-CG: the product with the Hessian, the two systems of a layer, and the step along their solutions."""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from secondorder.ops._library import library, operator, without_tangents


@without_tangents
def eacg_hvp(bias_hessian: Tensor, mean_input: Tensor, p: Tensor) -> Tensor:
    """Computes EA-CG's Hessian-vector product H P a a^T (Chen et al., Eq. 11b).

    Plain PyTorch, for experiments with Eq. 11b: `eacg_solve` works in n_out dimensions and needs no such product.

    Args:
        bias_hessian: H [n_out, n_out].
        mean_input: a [n_in].
        p: P [n_out, n_in].

    Returns:
        H P a a^T [n_out, n_in].
    """
    if bias_hessian.dim() != 2 or bias_hessian.shape[0] != bias_hessian.shape[1]:
        raise ValueError(f"eacg_hvp: expected a square bias_hessian, got shape {list(bias_hessian.shape)}")
    if bias_hessian.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"eacg_hvp: expected bias_hessian of dtype float32 or float64, got {bias_hessian.dtype}")
    if mean_input.dim() != 1:
        raise ValueError(f"eacg_hvp: expected mean_input with 1 dimension, got {mean_input.dim()}")
    shape = [bias_hessian.shape[0], mean_input.shape[0]]
    if list(p.shape) != shape:
        raise ValueError(f"eacg_hvp: expected p of shape {shape}, got {list(p.shape)}")
    for name, t in (("mean_input", mean_input), ("p", p)):
        if t.dtype != bias_hessian.dtype:
            raise TypeError(f"eacg_hvp: expected {name} of dtype {bias_hessian.dtype} as bias_hessian, got {t.dtype}")
        if t.device != bias_hessian.device:
            raise ValueError(f"eacg_hvp: expected {name} on {bias_hessian.device} as bias_hessian, got {t.device}")
    return torch.outer(bias_hessian @ (p @ mean_input), mean_input)


@overload
def eacg_solve(
    bias_hessian: Tensor,
    mean_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    alpha: float,
    max_iter: int,
    tol: float,
    truncated: bool,
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def eacg_solve(
    bias_hessian: Sequence[Tensor],
    mean_input: Sequence[Tensor],
    grad_weight: Sequence[Tensor],
    grad_bias: Sequence[Tensor | None] | None,
    alpha: float | Sequence[float],
    max_iter: int,
    tol: float,
    truncated: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]: ...
@without_tangents
def eacg_solve(
    bias_hessian: Tensor | Sequence[Tensor],
    mean_input: Tensor | Sequence[Tensor],
    grad_weight: Tensor | Sequence[Tensor],
    grad_bias: Tensor | Sequence[Tensor | None] | None,
    alpha: float | Sequence[float],
    max_iter: int,
    tol: float,
    truncated: bool,
) -> tuple[Tensor, Tensor, Tensor] | tuple[list[Tensor], list[Tensor], Tensor]:
    """Solves EA-CG's two systems (Chen et al., Eq. 10a, 10b with 11b), for one layer or, given lists, for all layers of a net.

    (1 - alpha) H P a a^T + alpha P = -B     and     ((1 - alpha) H + alpha I) d = -g.

    Both are solved by conjugate gradients from zero, until the residual is at most `tol` times the first one or `max_iter`
    iterations are done. All iterates are c B' + v a^T for a scalar c and a vector v [n_out], B' being the part of B across the
    mean input, B' a = 0, so that an iteration costs one product with H. With `truncated` P is, iterate by iterate, what CG on
    the n_out x n_in system gives; without, the part of P across the mean input is exact (-B' / alpha), and only the part along
    it is iterated.

    Args:
        bias_hessian: H [n_out, n_out], symmetric positive semi-definite.
        mean_input: a [n_in].
        grad_weight: B [n_out, n_in].
        grad_bias: g [n_out], or None for a layer without bias.
        alpha: in (0, 1), the damping of Eq. 9; one for all layers, or one each.
        max_iter: at least 1.
        tol: at least 0, relative.
        truncated: whether P is the paper's iterate, rather than exact across the mean input.

    Returns:
        P [n_out, n_in], d [n_out] (empty without grad_bias), and the iterations of the weight system, a 0-dim int64 tensor;
        given lists, two lists and an int64 tensor [layers]. Input that is not finite gives a solution that is not, either.
    """
    if isinstance(bias_hessian, Tensor):
        return library.eacg_solve(bias_hessian, mean_input, grad_weight, grad_bias, alpha, max_iter, tol, truncated)
    alphas = [alpha] * len(bias_hessian) if isinstance(alpha, float) else list(alpha)
    biases = [
        h.new_empty(0) if g is None else g for g, h in zip(grad_bias or [None] * len(bias_hessian), bias_hessian, strict=True)
    ]
    return library.eacg_solve.list(
        list(bias_hessian), list(mean_input), list(grad_weight), biases, alphas, max_iter, tol, truncated
    )


@operator(
    "eacg_solve(Tensor bias_hessian, Tensor mean_input, Tensor grad_weight, Tensor? grad_bias, float alpha, int max_iter, float"
    " tol, bool truncated) -> (Tensor direction_weight, Tensor direction_bias, Tensor iterations)"
)
def _(
    bias_hessian: Tensor, mean_input: Tensor, grad_weight: Tensor, grad_bias: Tensor | None, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    bias = grad_weight.new_empty(0 if grad_bias is None else grad_bias.shape[0])
    return grad_weight.new_empty(grad_weight.shape), bias, grad_weight.new_empty((), dtype=torch.int64)


@operator(
    "eacg_solve.list(Tensor[] bias_hessian, Tensor[] mean_input, Tensor[] grad_weight, Tensor[] grad_bias, float[] alpha, int "
    "max_iter, float tol, bool truncated) -> (Tensor[] direction_weight, Tensor[] direction_bias, Tensor iterations)"
)
def _(
    bias_hessian: list[Tensor], mean_input: list[Tensor], grad_weight: list[Tensor], grad_bias: list[Tensor], *rest: object
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    return (
        [g.new_empty(g.shape) for g in grad_weight],
        [g.new_empty(g.shape) for g in grad_bias],
        grad_weight[0].new_empty(len(grad_weight), dtype=torch.int64),
    )


@without_tangents
def eacg_update_(
    bias_hessian: list[Tensor],
    mean_input: list[Tensor],
    grad_weight: list[Tensor],
    grad_bias: list[Tensor],
    weight: list[Tensor],
    bias: list[Tensor],
    weight_momentum: list[Tensor],
    bias_momentum: list[Tensor],
    lr: list[float],
    alpha: list[float],
    momentum: list[float],
    weight_decay: list[float],
    max_iter: int,
    tol: float,
    truncated: bool,
    max_norm: list[float] | None = None,
) -> Tensor:
    """Does `eacg_solve` for all layers of a net and updates their parameters, without storing a direction.

    V <- momentum V + P,   W <- (1 - lr weight_decay) W + lr V,   and likewise for the biases.

    Args:
        bias_hessian: H [n_out, n_out] of every layer, symmetric positive semi-definite.
        mean_input: a [n_in] of every layer.
        grad_weight: B [n_out, n_in] of every layer.
        grad_bias: g [n_out] of every layer; an empty tensor for one without bias.
        weight: W, contiguous, written in place; no two may overlap, since threads write them.
        bias: b, likewise; an empty tensor where there is none. A bias of two layers is refused.
        weight_momentum: V, contiguous, written in place; an empty list for no momentum.
        bias_momentum: its twin for the biases.
        lr: one number per layer; likewise the next three.
        alpha: in (0, 1), the damping of Eq. 9.
        momentum: in [0, 1).
        weight_decay: decoupled: it shrinks the parameters and does not enter the gradient.
        max_iter: of conjugate gradients, at least 1.
        tol: they stop at this residual, relative to the first one, at least 0.
        truncated: whether P is the paper's iterate, rather than exact across the mean input.
        max_norm: one number per layer, >= 0: where [P, d] is longer than this (Frobenius norm), it is shortened to it; otherwise
            P and d are the solutions, to the bit. None: no bound.

    Returns:
        int64 [layers], the iterations of each weight system; -1 for a layer whose solution is not finite, which any NaN or
        inf in its gradients, its mean input or its bias Hessian makes it, or so large that lr V or V itself could overflow.
        If there is one, nothing has been written.
    """
    return library.eacg_update_(
        bias_hessian, mean_input, grad_weight, grad_bias, weight, bias, weight_momentum, bias_momentum,
        lr, alpha, momentum, weight_decay, max_iter, tol, truncated, max_norm,
    )  # fmt: skip


@operator(
    "eacg_update_(Tensor[] bias_hessian, Tensor[] mean_input, Tensor[] grad_weight, Tensor[] grad_bias, Tensor(a!)[] weight, "
    "Tensor(b!)[] bias, Tensor(c!)[] weight_momentum, Tensor(d!)[] bias_momentum, float[] lr, float[] alpha, float[] momentum, "
    "float[] weight_decay, int max_iter, float tol, bool truncated, float[]? max_norm=None) -> Tensor iterations"
)
def _(bias_hessian: list[Tensor], mean_input: list[Tensor], grad_weight: list[Tensor], *rest: object) -> Tensor:
    return grad_weight[0].new_empty(len(grad_weight), dtype=torch.int64)
