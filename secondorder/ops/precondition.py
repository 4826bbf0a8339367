"""A gradient between its inverse Kronecker factors."""

from torch import Tensor

from secondorder.ops._library import library, operator, without_tangents


@without_tangents
def precondition(left: Tensor | None, gradient: Tensor, right: Tensor | None) -> Tensor:
    """Computes L G R: a layer's gradient between the inverses of its two Kronecker factors (KFI, K-BFGS).

    Args:
        left: L [n_out, n_out], symmetric (L^T may be read for it); None: the identity.
        gradient: G [n_out, n_in].
        right: R [n_in, n_in]; None: the identity.

    Returns:
        L G R [n_out, n_in], a new tensor.
    """
    return library.precondition(left, gradient, right)


@operator("precondition(Tensor? left, Tensor gradient, Tensor? right) -> Tensor")
def _(left: Tensor | None, gradient: Tensor, right: Tensor | None) -> Tensor:
    return gradient.new_empty(gradient.shape)
