"""The derivatives of activations."""

from torch import Tensor

from secondorder.ops._library import library, operator, without_tangents


@without_tangents
def activation_derivatives(saved: Tensor, activation: str, parameter: float = 1.0) -> tuple[Tensor, Tensor]:
    """Computes the first and second derivative of an activation, d1 = sigma'(z) and d2 = sigma''(z), elementwise.

    Args:
        saved: any shape. What autograd itself keeps: the output sigma(z) for "identity", "sigmoid", "tanh", "relu",
            "leaky_relu" and "elu"; the preactivation z for "softplus", "silu", "gelu" and "gelu_tanh".
        activation: one of the names above.
        parameter: the slope of "leaky_relu", the alpha of "elu", the beta of "softplus" (each > 0); else unused.

    Returns:
        d1 and d2, each of the shape of `saved`. At a kink they are what torch's backward takes there, and d2 = 0.
    """
    return library.activation_derivatives(saved, activation, parameter)


@operator("activation_derivatives(Tensor saved, str activation, float parameter) -> (Tensor d1, Tensor d2)")
def _(saved: Tensor, activation: str, parameter: float) -> tuple[Tensor, Tensor]:
    return saved.new_empty(saved.shape), saved.new_empty(saved.shape)
