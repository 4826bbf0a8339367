"""The Hessian of a criterion with respect to the network's output, and the papers' criteria.

A batch's loss is L = reduction_i xi(z_i), z_i the network's output for instance i. What the curvatures need is

    H = sum_i d^2 L / dz_i dz_i^T   [K, K],

the expectation of the criterion's Hessian for a mean reduction. It is on the scale of L itself: for a sum it is the sum, as the
gradient is, so that a Newton step does not depend on the reduction (but for the damping).

Criteria whose Hessian is diagonal give it as a vector [K].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from secondorder.activations import mixed_signs
from secondorder.reference import pos_eig


@dataclass(frozen=True)
class OutputHessian:
    """H [K, K], or its diagonal [K]; `convex` where it is known to be positive semi-definite."""

    values: Tensor
    convex: bool

    def positive(self, gamma: float) -> Tensor:
        """Pos-Eig_gamma(H) (Chen et al., Eq. 8a), dense [K, K].

        Raises:
            ValueError: H has entries that are not finite.
        """
        if self.values.dim() == 1:
            return torch.diag(self.values if self.convex else pos_eig(self.values, gamma))
        if self.convex:
            return self.values
        if not torch.isfinite(self.values).all():
            raise ValueError("expected a finite Hessian of the criterion with respect to the network output, got NaN or inf")
        # In float64: eigh of an ill-conditioned float32 matrix can fail to converge.
        symmetric = self.values.double()
        eigenvalues, vectors = torch.linalg.eigh((symmetric + symmetric.T) / 2)
        return ((vectors * pos_eig(eigenvalues, gamma)) @ vectors.T).to(self.values.dtype)


def analytic_hessian(criterion: nn.Module, output: Tensor, *args: Any, **kwargs: Any) -> OutputHessian | None:
    """H for the criteria that have an analytic form here, at `output` [..., K]; None for every other."""
    if isinstance(criterion, FunctionCriterion):
        module = _FUNCTIONS.get(criterion.function)
        if module is None or len(args) != 1:
            return None
        criterion, kwargs = module(**kwargs), {}
    formula = _FORMULAS.get(type(criterion))
    if formula is None or len(args) != 1 or kwargs or output.dim() < 2:
        return None
    with torch.no_grad():
        return formula(criterion, output, args[0])


def autograd_hessian(loss: Tensor, source: Node) -> OutputHessian:
    """H of any scalar `loss` with respect to autograd node `source`'s tensor z [..., K], by double backward.

    Needs K backward passes through the criterion, or two where it acts on every element of z on its own. Instances must not
    be coupled by the criterion; a coupling enters as if it stood within the instances.
    """
    edge = GradientEdge(source, 0)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss, edge, create_graph=True)
        k = gradient.shape[-1]
        if not gradient.requires_grad:  # a loss that is linear in z
            return OutputHessian(gradient.new_zeros(k), convex=True)

        def product(v: Tensor) -> Tensor:
            (hv,) = torch.autograd.grad(gradient, edge, v, retain_graph=True, allow_unused=True)
            return torch.zeros_like(gradient) if hv is None else hv.detach()

        # A diagonal Hessian has H v = (H 1) * v for every v.
        diagonal, signs = product(torch.ones_like(gradient)), mixed_signs(gradient)
        if ((product(signs) - diagonal * signs).abs() <= 1e-4 * diagonal.abs().max()).all():
            return OutputHessian(diagonal.reshape(-1, k).sum(0), convex=False)
        rows = []
        for column in range(k):
            v = torch.zeros_like(gradient)
            v[..., column] = 1
            rows.append(product(v).reshape(-1, k).sum(0))
        return OutputHessian(torch.stack(rows), convex=False)


class FunctionCriterion(nn.Module):
    """Makes a plain function (output, target, ...) -> loss a module, so that its calls can be seen."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Calls the function."""
        return self.function(*args, **kwargs)

    def extra_repr(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", repr(self.function))


class BoundedClassificationLoss(nn.Module):
    """The non-convex criterion of Chen et al., Eq. 14: 1 / (1 + exp(delta (p_y - epsilon))), p = softmax(output).

    It lies between 0 and 1 per instance, so a wrong label costs at most 1: robust where cross-entropy is not.

    Args:
        delta: how steep it is; the paper's 5.
        epsilon: the probability at which it is 1/2; the paper's 0.2.
        reduction: "mean" or "sum" over the instances.
    """

    def __init__(self, delta: float = 5.0, epsilon: float = 0.2, reduction: str = "mean"):
        super().__init__()
        self.delta, self.epsilon, self.reduction = delta, epsilon, _checked_reduction(reduction)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """The scalar loss of logits [m, K] and class indices [m], or probabilities [m, K] (y^T p then stands for p_y)."""
        p = output.softmax(-1)
        picked = (p * target).sum(-1) if target.is_floating_point() else p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        losses = torch.sigmoid(-self.delta * (picked - self.epsilon))
        return losses.mean() if self.reduction == "mean" else losses.sum()


class TukeyBiweightLoss(nn.Module):
    """Tukey's biweight: c^2/6 (1 - (1 - (r/c)^2)^3) for a residual |r| <= c, else c^2/6. Beyond c an outlier has no pull at all.

    Args:
        c: where it becomes flat, in units of the target; 4.685 where residuals of good data have scale 1.
        reduction: "mean" or "sum" over all elements, as in nn.MSELoss.
    """

    def __init__(self, c: float = 4.685, reduction: str = "mean"):
        super().__init__()
        if not c > 0:
            raise ValueError(f"TukeyBiweightLoss: expected c > 0, got {c}")
        self.c, self.reduction = c, _checked_reduction(reduction)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """The scalar loss of an output and a target of the same shape."""
        inside = (1 - ((output - target) / self.c) ** 2).clamp(min=0)
        losses = self.c**2 / 6 * (1 - inside**3)
        return losses.mean() if self.reduction == "mean" else losses.sum()


def _checked_reduction(reduction: str) -> str:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"expected reduction 'mean' or 'sum', got {reduction!r}")
    return reduction


def _normalizer(criterion: Any, count: float | Tensor) -> float | Tensor:
    return 1.0 if criterion.reduction == "sum" else count


def _cross_entropy(criterion: nn.CrossEntropyLoss, output: Tensor, target: Tensor) -> OutputHessian | None:
    # L = -sum_i sum_k t_ik log p_ik / N with t the weighted, smoothed target:
    # H = sum_i (sum_k t_ik) (diag p_i - p_i p_i^T) / N.
    if output.dim() != 2:
        return None
    k, smoothing = output.shape[1], criterion.label_smoothing
    weight = output.new_ones(k) if criterion.weight is None else criterion.weight
    if target.is_floating_point():
        mass = (target * (1 - smoothing) + smoothing / k) @ weight
        count: float | Tensor = len(output)
    else:
        kept = target != criterion.ignore_index
        own = weight[torch.where(kept, target, 0)] * kept
        mass = (1 - smoothing) * own + smoothing / k * weight.sum() * kept
        count = own.sum()
    p = output.softmax(1)
    weighted = p * mass.unsqueeze(1)
    hessian = torch.diag(weighted.sum(0)) - p.T @ weighted
    return OutputHessian(hessian / _normalizer(criterion, count), convex=True)


def _mse(criterion: nn.MSELoss, output: Tensor, target: Tensor) -> OutputHessian:
    k = output.shape[-1]
    count = output.numel()
    return OutputHessian(output.new_full((k,), 2 * (count / k)) / _normalizer(criterion, count), convex=True)


def _bce_with_logits(criterion: nn.BCEWithLogitsLoss, output: Tensor, target: Tensor) -> OutputHessian:
    p = output.sigmoid()
    second = p * (1 - p)
    if criterion.pos_weight is not None:
        second = second * (1 + (criterion.pos_weight - 1) * target)
    if criterion.weight is not None:
        second = second * criterion.weight
    diagonal = second.reshape(-1, output.shape[-1]).sum(0)
    return OutputHessian(diagonal / _normalizer(criterion, output.numel()), convex=True)


def _bounded_classification(criterion: BoundedClassificationLoss, output: Tensor, target: Tensor) -> OutputHessian | None:
    # C(q), q = p_y: C'' grad q grad q^T + C' Hess q with grad q = q v, v = e_y - p, and Hess q = q (v v^T - diag p + p p^T).
    if output.dim() != 2 or target.is_floating_point():
        return None
    p = output.softmax(1)
    q = p.gather(1, target.unsqueeze(1)).squeeze(1)
    c = torch.sigmoid(-criterion.delta * (q - criterion.epsilon))
    first = -criterion.delta * c * (1 - c)
    second = criterion.delta**2 * c * (1 - c) * (1 - 2 * c)
    v = F.one_hot(target, output.shape[1]).to(p.dtype) - p
    along, across = (first * q + second * q**2).unsqueeze(1), (first * q).unsqueeze(1)
    hessian = v.T @ (along * v) + p.T @ (across * p) - torch.diag((across * p).sum(0))
    return OutputHessian(hessian / _normalizer(criterion, len(output)), convex=False)


def _tukey(criterion: TukeyBiweightLoss, output: Tensor, target: Tensor) -> OutputHessian:
    t = ((output - target) / criterion.c) ** 2
    second = torch.where(t <= 1, (1 - t) * (1 - 5 * t), 0)
    diagonal = second.reshape(-1, output.shape[-1]).sum(0)
    return OutputHessian(diagonal / _normalizer(criterion, output.numel()), convex=False)


_FORMULAS: dict[type, Callable[..., OutputHessian | None]] = {
    nn.CrossEntropyLoss: _cross_entropy,
    nn.MSELoss: _mse,
    nn.BCEWithLogitsLoss: _bce_with_logits,
    BoundedClassificationLoss: _bounded_classification,
    TukeyBiweightLoss: _tukey,
}

_FUNCTIONS: dict[Callable[..., Tensor], type[nn.Module]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.mse_loss: nn.MSELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
}
