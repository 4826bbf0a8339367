"""The backward recursion of the bias Hessian."""

from collections.abc import Sequence

from torch import Tensor

from secondorder.ops._library import library, operator, without_tangents


@without_tangents
def bias_hessian(
    bias_hessian: Tensor, weight: Tensor, d1: Tensor, d2: Tensor | None, grad_input: Tensor | None, gamma: float
) -> Tensor:
    """Makes one step of the backward recursion of the bias Hessian (Chen et al., Eq. 8b; without diagonal: KFRA, Eq. 26).

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
    return library.bias_hessian(bias_hessian, weight, d1, d2, grad_input, gamma)


@operator("bias_hessian(Tensor bias_hessian, Tensor weight, Tensor d1, Tensor? d2, Tensor? grad_input, float gamma) -> Tensor")
def _(bias_hessian: Tensor, weight: Tensor, *rest: object) -> Tensor:
    return bias_hessian.new_empty(weight.shape[1], weight.shape[1])


@without_tangents
def bias_hessian_activation(
    bias_hessian: Tensor,
    weight: Tensor,
    saved: Tensor,
    activation: str,
    parameter: float,
    grad_input: Tensor | None,
    gamma: float,
) -> Tensor:
    """Does `bias_hessian`, and computes d1 and d2 from `saved` [m, n_in] as `activation_derivatives` does.

    Saves writing and reading d1 and d2.

    Args:
        bias_hessian: H [n_out, n_out] of this layer, symmetric.
        weight: W [n_out, n_in] of this layer.
        saved: [m, n_in], m >= 1, what autograd itself keeps of the activation below: its output for "identity", "sigmoid",
            "tanh", "relu", "leaky_relu" and "elu", its preactivation for "softplus", "silu", "gelu" and "gelu_tanh".
        activation: one of the names above.
        parameter: the slope of "leaky_relu", the alpha of "elu", the beta of "softplus" (each > 0); else unused.
        grad_input: [m, n_in], gradient of the mean loss w.r.t. this layer's input; None leaves the diagonal out (Gauss-Newton).
        gamma: <= 0. -1 takes absolute values (PCH-1), 0 clips (PCH-2).

    Returns:
        G [n_in, n_in], the bias Hessian of the layer below.
    """
    return library.bias_hessian.activation(bias_hessian, weight, saved, activation, parameter, grad_input, gamma)


@operator(
    "bias_hessian.activation(Tensor bias_hessian, Tensor weight, Tensor saved, str activation, float parameter, Tensor? "
    "grad_input, float gamma) -> Tensor"
)
def _(bias_hessian: Tensor, weight: Tensor, *rest: object) -> Tensor:
    return bias_hessian.new_empty(weight.shape[1], weight.shape[1])


@without_tangents
def bias_hessian_chain(
    bias_hessian: Tensor,
    weight: Sequence[Tensor],
    saved: Sequence[Tensor],
    activation: Sequence[str],
    parameter: Sequence[float],
    grad_input: Sequence[Tensor | None],
    gamma: float,
) -> list[Tensor]:
    """Does `bias_hessian_activation` layer after layer down a net: each step starts from the H that the one before returned.

    Args:
        bias_hessian: H [n_0, n_0] of the chain's last layer, that nearest to the loss.
        weight: W_l [n_l, n_(l+1)], from that layer down; likewise the lists below, one element for each step.
        saved: [m, n_(l+1)].
        activation: the name of the activation below W_l, of those that `activation_derivatives` takes.
        parameter: its parameter, 1 where it has none.
        grad_input: [m, n_(l+1)], or None.
        gamma: of Pos-Eig on the diagonals, <= 0. -1 takes absolute values, 0 clips.

    Returns:
        The bias Hessians [n_(l+1), n_(l+1)] of the layers below.
    """
    return library.bias_hessian.chain(
        bias_hessian, list(weight), list(saved), list(activation), list(parameter), list(grad_input), gamma
    )


@operator(
    "bias_hessian.chain(Tensor bias_hessian, Tensor[] weight, Tensor[] saved, str[] activation, float[] parameter, Tensor?[] "
    "grad_input, float gamma) -> Tensor[]"
)
def _(bias_hessian: Tensor, weight: list[Tensor], *rest: object) -> list[Tensor]:
    return [bias_hessian.new_empty(w.shape[1], w.shape[1]) for w in weight]
