"""The roots of criteria known to be negative log-likelihoods: the Fisher matrix of a model is their Gauss-Newton matrix."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secondorder._tensors import gradients_by_seed
from secondorder.criteria.known import evaluated, normalizer
from secondorder.criteria.losses import CompositeLoss
from secondorder.criteria.roots import (
    BernoulliRoot,
    ClassesElsewhere,
    GaussianRoot,
    LikelihoodRoot,
    PulledBackRoot,
    ScalarRoot,
    SoftmaxRoot,
)


def likelihood_root(criterion: nn.Module, output: Tensor, *args: Any, **kwargs: Any) -> LikelihoodRoot | None:
    """Returns the root for the criteria known to be a negative log-likelihood, at `output` [..., K]; None for every other.

    They are nn.CrossEntropyLoss (categorical), nn.NLLLoss (the same, of the logits that log_softmax was taken of), nn.MSELoss
    (Gaussian), nn.BCEWithLogitsLoss (Bernoulli) and nn.BCELoss (the same, of the logits that the sigmoid was taken of), and their
    functions. For them it is a root of the Hessian itself, since the Fisher matrix is the Gauss-Newton matrix. For a
    `CompositeLoss` of one of them it is a root of J_i^T H_i J_i.

    Args:
        criterion: a module.
        output: what it is called on, [..., K], or one number []; by cross-entropy and NLL [m, K, ...], or [K] for one instance.
        *args: what else it is called with, the target first.
        **kwargs: the same by name.
    """
    if not isinstance(criterion, CompositeLoss):
        root = evaluated(_ROOTS, criterion, output, args, kwargs)
        return ScalarRoot(root) if isinstance(root, GaussianRoot) and output.dim() == 0 else root
    with torch.enable_grad():
        leaf = output.detach().requires_grad_()
        value = criterion.inner(leaf)
    root = likelihood_root(criterion.outer, value.detach(), *args, **kwargs)
    if isinstance(root, GaussianRoot) and value.dim() == 1 < output.dim():
        root = ScalarRoot(root)

    def transposed(columns: Tensor) -> Tensor:
        (rows,) = gradients_by_seed(value, [leaf], columns.to(value.dtype))
        assert rows is not None
        return rows

    return None if root is None else PulledBackRoot(root, transposed)


def _cross_entropy_root(criterion: nn.CrossEntropyLoss, output: Tensor, target: Tensor) -> SoftmaxRoot | ClassesElsewhere | None:
    if output.dim() == 2:
        return cross_entropy_root(criterion, output, target)
    if output.dim() == 0:
        return None
    dim = min(1, output.dim() - 1)
    logits, probabilities = output.movedim(dim, -1), target.is_floating_point()
    labels = target.movedim(1 if target.dim() > 1 else 0, -1) if probabilities else target
    rows = logits.reshape(-1, logits.shape[-1])
    root = cross_entropy_root(criterion, rows, labels.reshape(rows.shape if probabilities else -1))
    return None if root is None else ClassesElsewhere(root, logits.shape, dim)


def cross_entropy_root(criterion: nn.CrossEntropyLoss, output: Tensor, target: Tensor) -> SoftmaxRoot | None:
    """Returns the root of cross-entropy with weights, smoothing and ignored targets, at logits [m, K]; None for other shapes."""
    # L = -sum_i sum_k t_ik log p_ik / N with t the weighted, smoothed target: H_i = (sum_k t_ik) (diag p_i - p_i p_i^T) / N.
    if output.dim() != 2:
        return None
    k, smoothing, weight = output.shape[1], criterion.label_smoothing, criterion.weight
    if target.is_floating_point():
        smoothed = target * (1 - smoothing) + smoothing / k
        mass = smoothed.sum(1) if weight is None else smoothed @ weight
        count: float | Tensor = len(output)
    else:
        target = target.long()  # uint8 has no ignore_index of -100, and indexes as a mask
        kept = target != criterion.ignore_index
        if weight is None:
            mass = own = kept.to(output.dtype)
        else:
            own = weight[torch.where(kept, target, 0)] * kept
            mass = (1 - smoothing) * own + smoothing / k * weight.sum() * kept
        count = own.sum()
    return SoftmaxRoot(output.softmax(1), mass if criterion.reduction == "sum" else mass / count)


def _nll_root(criterion: nn.NLLLoss, output: Tensor, target: Tensor) -> SoftmaxRoot | ClassesElsewhere | None:
    return _cross_entropy_root(as_cross_entropy(criterion), output, target)  # softmax of log-probabilities gives probabilities


def as_cross_entropy(criterion: nn.NLLLoss) -> nn.CrossEntropyLoss:
    """Returns what a negative log-likelihood is of the logits that log_softmax was taken of."""
    return nn.CrossEntropyLoss(criterion.weight, ignore_index=criterion.ignore_index, reduction=criterion.reduction)


def _mse_root(criterion: nn.MSELoss, output: Tensor, target: Tensor) -> GaussianRoot | None:
    if target.shape != output.shape:  # broadcast: autograd counts the terms
        return None
    return GaussianRoot(output.new_full(output.shape, (2 / normalizer(criterion, output.numel())) ** 0.5))


def bce_with_logits_root(criterion: nn.BCEWithLogitsLoss, output: Tensor, target: Tensor) -> BernoulliRoot:
    """Returns the root of binary cross-entropy with weights, at logits [..., K]."""
    return _bernoulli_root(criterion, output.sigmoid(), target, criterion.pos_weight)


def _bce_root(criterion: nn.BCELoss, output: Tensor, target: Tensor) -> BernoulliRoot:
    return _bernoulli_root(criterion, output, target, None)


def _bernoulli_root(
    criterion: nn.BCEWithLogitsLoss | nn.BCELoss, p: Tensor, target: Tensor, pos_weight: Tensor | None
) -> BernoulliRoot:
    """Returns the root at the logits of the probabilities p [..., K]."""
    mass = torch.full_like(p, 1 / normalizer(criterion, p.numel()))
    if pos_weight is not None:
        mass = mass * (1 + (pos_weight - 1) * target)
    if criterion.weight is not None:
        mass = mass * criterion.weight
    return BernoulliRoot((mass * p * (1 - p)).sqrt(), p, mass)


_ROOTS: dict[type, Callable[..., LikelihoodRoot | None]] = {
    nn.CrossEntropyLoss: _cross_entropy_root,
    nn.NLLLoss: _nll_root,
    nn.MSELoss: _mse_root,
    nn.BCEWithLogitsLoss: bce_with_logits_root,
    nn.BCELoss: _bce_root,
}
