"""The Hessian of cross-entropy with respect to the logits."""

import torch
from torch import Tensor


def cross_entropy_hessian(output: Tensor, target: Tensor, ignore_index: int = -100, mean: bool = True) -> Tensor:
    """The sum or the mean of diag(p) - p p^T over the instances whose target is not `ignore_index`."""
    p = output[target.long() != ignore_index].softmax(1)  # as int64, since uint8 has no -100
    return (torch.diag(p.sum(0)) - p.T @ p) / (len(p) if mean and len(output) else 1)
