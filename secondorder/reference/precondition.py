"""The product of a gradient with a matrix on either side."""

from torch import Tensor


def precondition(left: Tensor | None, gradient: Tensor, right: Tensor | None) -> Tensor:
    """L G R, the direction of KFI and of K-BFGS; None stands for the identity."""
    half = gradient if left is None else left @ gradient
    return half.clone() if right is None else half @ right
