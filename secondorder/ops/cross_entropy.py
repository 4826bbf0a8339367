"""The Hessian of cross-entropy w.r.t. the network's output."""

from torch import Tensor

from secondorder.ops._library import library, operator, without_tangents


@without_tangents
def cross_entropy_hessian(output: Tensor, target: Tensor, ignore_index: int = -100, mean: bool = True) -> Tensor:
    """Returns the Hessian of cross-entropy with class indices, summed over its instances, from which the recursion starts.

        H = sum_i c_i (diag(p_i) - p_i p_i^T),   p_i = softmax(output_i).

    Args:
        output: [m, K], the logits.
        target: [m], integers.
        ignore_index: the target of instances that do not count.
        mean: c_i = 1 / (how many instances count) for those that do; else c_i = 1.

    Returns:
        H [K, K], of the output's dtype; NaN for a mean where no instance counts, but 0 where there are none at all (m = 0).
    """
    return library.cross_entropy_hessian(output, target, ignore_index, mean)


@operator("cross_entropy_hessian(Tensor output, Tensor target, int ignore_index, bool mean) -> Tensor")
def _(output: Tensor, target: Tensor, ignore_index: int, mean: bool) -> Tensor:
    return output.new_empty(output.shape[1], output.shape[1])
