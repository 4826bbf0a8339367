"""The operators of `secondorder`: fused C++ behind PyTorch's dispatcher, each with a plain twin in `secondorder.reference`.

Notation (docs/math.md): a linear layer computes z = W h + b. H is its bias Hessian [n_out, n_out], a = E[h] its mean input
[n_in], B and g the gradients of the mean loss with respect to W [n_out, n_in] and b [n_out]. All tensors of a call have one
dtype (float32 or float64) and one device; they need not be contiguous unless an operator writes to them. Wrong shapes,
devices and values raise ValueError, wrong dtypes TypeError, before anything is computed. No operator is differentiable.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from secondorder import _C  # noqa: F401  (importing it registers torch.ops.secondorder)

_ops = torch.ops.secondorder

__all__ = [
    "DAMPED_S",
    "DAMPED_Y",
    "UPDATED",
    "activation_derivatives",
    "average_",
    "bfgs_update_",
    "bias_hessian",
    "bias_hessian_activation",
    "bias_hessian_chain",
    "cross_entropy_hessian",
    "damped_bfgs_update_",
    "damped_lbfgs_update_",
    "double_damping",
    "eacg_hvp",
    "eacg_solve",
    "eacg_update_",
    "hessian_action_update_",
    "lbfgs_product",
    "mean_inputs",
    "precondition",
]


def activation_derivatives(saved: Tensor, activation: str, parameter: float = 1.0) -> tuple[Tensor, Tensor]:
    """First and second derivative of an activation, d1 = sigma'(z) and d2 = sigma''(z), elementwise.

    Args:
        saved: any shape. What autograd itself keeps: the output sigma(z) for "identity", "sigmoid", "tanh", "relu",
            "leaky_relu" and "elu"; the preactivation z for "softplus", "silu", "gelu" and "gelu_tanh".
        activation: one of the names above.
        parameter: the slope of "leaky_relu", the alpha of "elu", the beta of "softplus" (each > 0); else unused.

    Returns:
        d1 and d2, each of the shape of `saved`. At a kink they are what torch's backward takes there, and d2 = 0.
    """
    return _ops.activation_derivatives(saved, activation, parameter)


def bias_hessian(
    bias_hessian: Tensor, weight: Tensor, d1: Tensor, d2: Tensor | None, grad_input: Tensor | None, gamma: float
) -> Tensor:
    """One step of the backward recursion of the bias Hessian (Chen et al., Eq. 8b; without diagonal: KFRA, Eq. 26).

    G = (W^T H W) * (1/m) sum_i d1_i d1_i^T + diag(PosEig_gamma(sum_i d2_i * grad_input_i)),   * elementwise,

    where PosEig_gamma turns a negative entry l into gamma * l. G is symmetric to the bit, and positive semi-definite where H is.
    On CUDA float32's products obey torch.set_float32_matmul_precision, as PyTorch's own do (docs/cuda.md).

    Args:
        bias_hessian: H [n_out, n_out] of this layer, symmetric (only H^T is read where it is not).
        weight: W [n_out, n_in] of this layer.
        d1: [m, n_in], sigma' at the preactivation of the layer below, m >= 1.
        d2: [m, n_in], sigma'' there; None together with `grad_input` leaves the diagonal out (Gauss-Newton).
        grad_input: [m, n_in], gradient of the mean loss w.r.t. this layer's input: the sum over i is the expectation.
        gamma: <= 0. -1 takes absolute values (PCH-1), 0 clips (PCH-2).

    Returns:
        G [n_in, n_in], the bias Hessian of the layer below.
    """
    return _ops.bias_hessian(bias_hessian, weight, d1, d2, grad_input, gamma)


def bias_hessian_activation(
    bias_hessian: Tensor,
    weight: Tensor,
    saved: Tensor,
    activation: str,
    parameter: float,
    grad_input: Tensor | None,
    gamma: float,
) -> Tensor:
    """`bias_hessian` with d1 and d2 computed inside from `saved` [m, n_in], as `activation_derivatives` would.

    Saves writing and reading d1 and d2. Without `grad_input` the diagonal is left out.
    """
    return _ops.bias_hessian.activation(bias_hessian, weight, saved, activation, parameter, grad_input, gamma)


def bias_hessian_chain(
    bias_hessian: Tensor,
    weight: Sequence[Tensor],
    saved: Sequence[Tensor],
    activation: Sequence[str],
    parameter: Sequence[float],
    grad_input: Sequence[Tensor | None],
    gamma: float,
) -> list[Tensor]:
    """`bias_hessian_activation` from layer to layer down a net: each step starts from the H that the one before returned.

    Args:
        bias_hessian: H [n_0, n_0] of the chain's last layer, that nearest to the loss.
        weight: W_l [n_l, n_(l+1)], from that layer down; likewise the lists below, one element for each step.
        saved: [m, n_(l+1)].
        activation: see `bias_hessian_activation`.
        parameter: see `bias_hessian_activation`.
        grad_input: [m, n_(l+1)], or None.
        gamma: see `bias_hessian`.

    Returns:
        The bias Hessians [n_(l+1), n_(l+1)] of the layers below.
    """
    return _ops.bias_hessian.chain(
        bias_hessian, list(weight), list(saved), list(activation), list(parameter), list(grad_input), gamma
    )


def cross_entropy_hessian(output: Tensor, target: Tensor, ignore_index: int = -100, mean: bool = True) -> Tensor:
    """The Hessian of cross-entropy with class indices, summed over its instances: where the recursion starts.

        H = sum_i c_i (diag(p_i) - p_i p_i^T),   p_i = softmax(output_i).

    Args:
        output: [m, K], the logits.
        target: [m], integers.
        ignore_index: the target of instances that do not count.
        mean: c_i = 1 / (how many instances count) for those that do; else c_i = 1.

    Returns:
        H [K, K], of the output's dtype; NaN for a mean where no instance counts, but 0 where there are none at all (m = 0).
    """
    return _ops.cross_entropy_hessian(output, target, ignore_index, mean)


def mean_inputs(input: Sequence[Tensor]) -> list[Tensor]:
    """The mean inputs a = E[h] [n_in] of all layers of a net, from their inputs h [m, n_in]; NaN where m = 0."""
    return _ops.mean_inputs(list(input))


def average_(new: Sequence[Tensor], old: Sequence[Tensor], share: float) -> None:
    """new <- (1 - share) new + share old for all tensors of two lists.

    Args:
        new: contiguous, written in place; no two may overlap.
        old: of the same shapes and dtypes.
        share: in [0, 1).
    """
    _ops.average_(list(new), list(old), share)


def precondition(left: Tensor | None, gradient: Tensor, right: Tensor | None) -> Tensor:
    """L G R: a layer's gradient between the inverses of its two Kronecker factors (KFI, K-BFGS).

    Args:
        left: L [n_out, n_out], symmetric (L^T may be read for it); None: the identity.
        gradient: G [n_out, n_in].
        right: R [n_in, n_in]; None: the identity.

    Returns:
        L G R [n_out, n_in], a new tensor.
    """
    return _ops.precondition(left, gradient, right)


def eacg_hvp(bias_hessian: Tensor, mean_input: Tensor, p: Tensor) -> Tensor:
    """EA-CG's Hessian-vector product H P a a^T (Chen et al., Eq. 11b), for P [n_out, n_in]; returns [n_out, n_in]."""
    return _ops.eacg_hvp(bias_hessian, mean_input, p)


def eacg_solve(
    bias_hessian: Tensor | Sequence[Tensor],
    mean_input: Tensor | Sequence[Tensor],
    grad_weight: Tensor | Sequence[Tensor],
    grad_bias: Tensor | Sequence[Tensor | None] | None,
    alpha: float | Sequence[float],
    max_iter: int,
    tol: float,
    truncated: bool,
) -> tuple[Any, Any, Tensor]:
    """Solves EA-CG's two systems (Chen et al., Eq. 10a, 10b with 11b), for one layer or, given lists, for all layers of a net.

    (1 - alpha) H P a a^T + alpha P = -B     and     ((1 - alpha) H + alpha I) d = -g.

    Both are solved by conjugate gradients from zero, until the residual is at most `tol` times the first one or `max_iter`
    iterations are done, in an n_out-dimensional space (docs/math.md). With `truncated` P is, iterate by iterate, what CG on
    the n_out x n_in system gives; without, the part of P across the mean input is exact (-B/alpha there), and only the part
    along it is iterated.

    Args:
        bias_hessian: H [n_out, n_out], symmetric positive semi-definite.
        mean_input: a [n_in].
        grad_weight: B [n_out, n_in].
        grad_bias: g [n_out], or None for a layer without bias.
        alpha: in (0, 1), the damping of Eq. 9; one for all layers, or one each.
        max_iter: at least 1.
        tol: at least 0, relative.
        truncated: see above.

    Returns:
        P [n_out, n_in], d [n_out] (empty without grad_bias), and the iterations of the weight system, a 0-dim int64 tensor;
        given lists, two lists and an int64 tensor [layers]. Input that is not finite gives a solution that is not, either.
    """
    if isinstance(bias_hessian, Tensor):
        return _ops.eacg_solve(bias_hessian, mean_input, grad_weight, grad_bias, alpha, max_iter, tol, truncated)
    alphas = [alpha] * len(bias_hessian) if isinstance(alpha, float) else list(alpha)
    biases = [
        h.new_empty(0) if g is None else g for g, h in zip(grad_bias or [None] * len(bias_hessian), bias_hessian, strict=True)
    ]
    return _ops.eacg_solve.list(list(bias_hessian), list(mean_input), list(grad_weight), biases, alphas, max_iter, tol, truncated)


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
) -> Tensor:
    """`eacg_solve` for all layers of a net and the update of their parameters, without storing a direction.

    V <- momentum V + P,   W <- (1 - lr weight_decay) W + lr V,   and likewise for the biases.

    Args:
        bias_hessian: a list with one tensor per layer, as in `eacg_solve`; likewise the next three.
        mean_input: see `eacg_solve`.
        grad_weight: see `eacg_solve`.
        grad_bias: see `eacg_solve`; an empty tensor for a layer without bias.
        weight: W, contiguous, written in place; no two may overlap, since threads write them.
        bias: b, contiguous, written in place; an empty tensor where there is none.
        weight_momentum: V, contiguous, written in place; an empty list for no momentum.
        bias_momentum: its twin for the biases.
        lr: one number per layer; likewise the next three.
        alpha: see `eacg_solve`.
        momentum: see above.
        weight_decay: decoupled: it shrinks the parameters and does not enter the gradient.
        max_iter: see `eacg_solve`.
        tol: see `eacg_solve`.
        truncated: see `eacg_solve`.

    Returns:
        int64 [layers], the iterations of each weight system; -1 for a layer whose solution is not finite, which any NaN or
        inf in its gradients, its mean input or its bias Hessian makes it, or so large that lr V or V itself could overflow.
        If there is one, nothing has been written.
    """
    return _ops.eacg_update_(
        bias_hessian, mean_input, grad_weight, grad_bias, weight, bias, weight_momentum, bias_momentum,
        lr, alpha, momentum, weight_decay, max_iter, tol, truncated,
    )  # fmt: skip


# Fake implementations: shapes and dtypes alone, for torch.compile and torch.export, and for tensors on "meta".


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a fake implementation, whose tensors must be on one device, as the real one's must."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any) -> Any:
            devices = {leaf.device for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
            if len(devices) > 1:
                raise ValueError(f"{name}: expected all tensors on one device, got {', '.join(sorted(map(str, devices)))}")
            return function(*args)

        torch.library.register_fake(f"secondorder::{name}", checked)
        return function

    return register


@_fake("activation_derivatives")
def _(saved, activation, parameter):  # type: ignore[no-untyped-def]
    return (
        torch.empty_like(saved, memory_format=torch.contiguous_format),
        torch.empty_like(saved, memory_format=torch.contiguous_format),
    )


@_fake("bias_hessian")
def _(bias_hessian, weight, d1, d2, grad_input, gamma):  # type: ignore[no-untyped-def]
    return bias_hessian.new_empty(weight.shape[1], weight.shape[1])


@_fake("bias_hessian.activation")
def _(bias_hessian, weight, saved, activation, parameter, grad_input, gamma):  # type: ignore[no-untyped-def]
    return bias_hessian.new_empty(weight.shape[1], weight.shape[1])


@_fake("cross_entropy_hessian")
def _(output, target, ignore_index, mean):  # type: ignore[no-untyped-def]
    return output.new_empty(output.shape[1], output.shape[1])


@_fake("mean_inputs")
def _(input):  # type: ignore[no-untyped-def]
    return [h.new_empty(h.shape[1]) for h in input]


@_fake("average_")
def _(new, old, share):  # type: ignore[no-untyped-def]
    return None


@_fake("precondition")
def _(left, gradient, right):  # type: ignore[no-untyped-def]
    return gradient.new_empty(gradient.shape)


@_fake("eacg_hvp")
def _(bias_hessian, mean_input, p):  # type: ignore[no-untyped-def]
    return p.new_empty(p.shape)


@_fake("eacg_solve")
def _(bias_hessian, mean_input, grad_weight, grad_bias, alpha, max_iter, tol, truncated):  # type: ignore[no-untyped-def]
    bias = grad_weight.new_empty(0 if grad_bias is None else grad_bias.shape[0])
    return grad_weight.new_empty(grad_weight.shape), bias, grad_weight.new_empty((), dtype=torch.int64)


@_fake("eacg_solve.list")
def _(bias_hessian, mean_input, grad_weight, grad_bias, alpha, max_iter, tol, truncated):  # type: ignore[no-untyped-def]
    return (
        [g.new_empty(g.shape) for g in grad_weight],
        [g.new_empty(g.shape) for g in grad_bias],
        grad_weight[0].new_empty(len(grad_weight), dtype=torch.int64),
    )


@_fake("eacg_update_")
def _(bias_hessian, mean_input, grad_weight, *rest):  # type: ignore[no-untyped-def]
    return grad_weight[0].new_empty(len(grad_weight), dtype=torch.int64)


# K-BFGS (Goldfarb, Ren & Bahamou, "Practical Quasi-Newton Methods for Training Deep Neural Networks", 2020).
#
# H approximates the inverse of a layer's Hessian w.r.t. its preactivations [n, n], symmetric positive definite; s and y [n]
# are the changes of the mean preactivation and of the mean gradient there. An update whose curvature s.y is not positive,
# or whose result would not be finite, is skipped: H stays as it was, and the status of the layer lacks UPDATED.

UPDATED, DAMPED_S, DAMPED_Y = 1, 2, 4
"""The bits of an update's status: H was updated; s was damped (theta1 < 1); y was damped (theta2 != 1)."""


def double_damping(s, y, inverse_hessian, mu1: float, mu2: float):  # type: ignore[no-untyped-def]  # tensors in, tensors out; lists in, lists out
    """Powell's double damping (Algorithm 3), which bounds the change that a BFGS update can make to H and to its inverse.

    theta1 = (1 - mu1) y.Hy / (y.Hy - s.y)       if s.y < mu1 y.Hy, else 1;      s~ = theta1 s + (1 - theta1) H y
    theta2 = (1 - mu2) s~.s~ / (s~.s~ - s~.y)    if s~.y < mu2 s~.s~, else 1;    y~ = theta2 y + (1 - theta2) s~

    Then s~.y >= mu1 y.Hy and s~.y~ >= mu2 s~.s~.

    Args:
        s: [n], or a list with one per layer; likewise the next two.
        y: [n].
        inverse_hessian: H [n, n], symmetric positive definite.
        mu1: in (0, 1).
        mu2: in (0, 1].

    Returns:
        s~ and y~ [n] each, or two lists.
    """
    if isinstance(inverse_hessian, Tensor):
        return _ops.double_damping(s, y, inverse_hessian, mu1, mu2)
    return _ops.double_damping.list(list(s), list(y), list(inverse_hessian), mu1, mu2)


def bfgs_update_(inverse_hessian, s, y):  # type: ignore[no-untyped-def]  # one layer's tensors, or lists
    """The BFGS update of an inverse Hessian (Eq. 6), by one matrix-vector product and one symmetric rank-two update.

    H <- (I - rho s y^T) H (I - rho y s^T) + rho s s^T,   rho = 1/(s.y).

    H stays symmetric to the bit and positive definite, and H y = s. Skipped where s.y is not positive or the result not finite.

    Args:
        inverse_hessian: H [n, n], symmetric positive definite, contiguous, written in place; or a list with one per layer.
        s: [n], or a list.
        y: [n], or a list.

    Returns:
        H itself; given lists, the statuses, int64 [layers].
    """
    if isinstance(inverse_hessian, Tensor):
        _ops.bfgs_update_(inverse_hessian, s, y)
        return inverse_hessian
    return _ops.bfgs_update_.list(list(inverse_hessian), list(s), list(y))


def damped_bfgs_update_(
    inverse_hessian: Sequence[Tensor], s: Sequence[Tensor], y: Sequence[Tensor], mu1: float, mu2: float
) -> Tensor:
    """`double_damping` and then `bfgs_update_` of all layers of a net, each H read once less.

    Args:
        inverse_hessian: a list with one H per layer, as in `bfgs_update_`; likewise the next two.
        s: see `double_damping`.
        y: see `double_damping`.
        mu1: see `double_damping`.
        mu2: see `double_damping`.

    Returns:
        The statuses, int64 [layers].
    """
    return _ops.damped_bfgs_update_(list(inverse_hessian), list(s), list(y), mu1, mu2)


def hessian_action_update_(
    inverse: Sequence[Tensor], matrix: Sequence[Tensor], vector: Sequence[Tensor], damping: float
) -> Tensor:
    """Hessian-action BFGS (Section 4): one step of `inverse` towards the inverse of a known matrix, for all layers of a net.

    `bfgs_update_` with s = H a and y = (A + damping I) s, whose curvature is positive where A is positive semi-definite.
    If H is the inverse of A + damping I up to a multiple of a a^T, the result is the inverse (Theorem 1).

    Args:
        inverse: a list with one H [n, n] per layer, symmetric positive definite, contiguous, written in place.
        matrix: A [n, n], symmetric positive semi-definite.
        vector: a [n].
        damping: lambda_A >= 0.

    Returns:
        The statuses, int64 [layers].
    """
    return _ops.hessian_action_update_(list(inverse), list(matrix), list(vector), damping)


def lbfgs_product(s_pairs, y_pairs, v):  # type: ignore[no-untyped-def]  # one layer's tensors, or lists
    """H V for the H that BFGS updates make of the identity, without forming it (Byrd, Nocedal & Schnabel 1994, Theorem 2.2).

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
        return _ops.lbfgs_product(s_pairs, y_pairs, v)
    return _ops.lbfgs_product.list(list(s_pairs), list(y_pairs), list(v))


def damped_lbfgs_update_(
    s_pairs: Sequence[Tensor],
    y_pairs: Sequence[Tensor],
    s: Sequence[Tensor],
    y: Sequence[Tensor],
    mu1: float,
    mu2: float,
) -> Tensor:
    """`damped_bfgs_update_` for an H that only its pairs represent: damps, drops the oldest pair, appends the new one.

    Args:
        s_pairs: a list with one S [p, n] per layer, as in `lbfgs_product`, contiguous, written in place; likewise `y_pairs`.
        y_pairs: Y [p, n].
        s: a list with one s [n] per layer; likewise `y`.
        y: see `double_damping`.
        mu1: see `double_damping`.
        mu2: see `double_damping`.

    Returns:
        The statuses, int64 [layers].
    """
    return _ops.damped_lbfgs_update_(list(s_pairs), list(y_pairs), list(s), list(y), mu1, mu2)


@_fake("double_damping")
def _(s, y, inverse_hessian, mu1, mu2):  # type: ignore[no-untyped-def]
    return s.new_empty(s.shape), y.new_empty(y.shape)


@_fake("double_damping.list")
def _(s, y, inverse_hessian, mu1, mu2):  # type: ignore[no-untyped-def]
    return [t.new_empty(t.shape) for t in s], [t.new_empty(t.shape) for t in y]


@_fake("bfgs_update_")
def _(inverse_hessian, s, y):  # type: ignore[no-untyped-def]
    return inverse_hessian.new_empty((), dtype=torch.int64)


@_fake("bfgs_update_.list")
@_fake("damped_bfgs_update_")
@_fake("hessian_action_update_")
@_fake("damped_lbfgs_update_")
def _(first, *rest):  # type: ignore[no-untyped-def]
    return first[0].new_empty(len(first), dtype=torch.int64)


@_fake("lbfgs_product")
def _(s_pairs, y_pairs, v):  # type: ignore[no-untyped-def]
    return v.new_empty(v.shape)


@_fake("lbfgs_product.list")
def _(s_pairs, y_pairs, v):  # type: ignore[no-untyped-def]
    return [t.new_empty(t.shape) for t in v]
