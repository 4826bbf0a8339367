"""The Hessian of a criterion with respect to the network's output, and the papers' criteria.

A batch's loss is L = reduction_i xi(z_i), z_i the network's output for instance i. What the curvatures need is

    H = sum_i d^2 L / dz_i dz_i^T   [K, K],

the expectation of the criterion's Hessian for a mean reduction. It is on the scale of L itself: for a sum it is the sum, as the
gradient is, so that a Newton step does not depend on the reduction (but for the damping).

Criteria whose Hessian is diagonal give it as a vector [K].
"""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from secondorder import ops
from secondorder.activations import irregular, widened
from secondorder.errors import NonFiniteError
from secondorder.linalg import pos_eig


@dataclass(eq=False, slots=True)
class OutputHessian:
    """H [K, K], or its diagonal [K]; `convex` where it is known to be positive semi-definite."""

    values: Tensor
    convex: bool

    def positive(self, gamma: float) -> Tensor:
        """Pos-Eig_gamma(H) (Chen et al., Eq. 8a), dense [K, K], a new tensor.

        Raises:
            NonFiniteError: H has entries that are not finite.
        """
        if self.values.dim() == 1:
            return torch.diag(self.values if self.convex else pos_eig(self.values, gamma))
        if self.convex:
            return self.values.clone()
        # In float64: eigh of an ill-conditioned float32 matrix can fail to converge.
        eigenvalues, vectors = torch.linalg.eigh(_finite(self.values).double())
        return ((vectors * pos_eig(eigenvalues, gamma)) @ vectors.T).to(self.values.dtype)

    def semidefinite(self) -> Tensor:
        """H itself, dense [K, K], a new tensor, which Gauss-Newton needs to be positive semi-definite.

        Raises:
            NonFiniteError: it has entries that are not finite.
            ValueError: it is not positive semi-definite.
        """
        if not self.convex:
            dense = torch.diag(self.values) if self.values.dim() == 1 else self.values
            _check_semidefinite(torch.linalg.eigvalsh(_finite(dense).double()), self.values.dtype)
        return self.positive(0.0)


class OutputRoot(Protocol):
    """A square root of the criterion's Hessian for every instance, H_i = sum_c s_ic s_ic^T, on the scale of the loss.

    It has `count` columns s_i1, s_i2, ... for each instance.
    """

    @property
    def count(self) -> int:
        """How many columns an instance has."""

    def columns(self, begin: int, end: int) -> Tensor:
        """The columns from `begin` to before `end`, [end - begin, *output.shape]."""


class LikelihoodRoot(OutputRoot, Protocol):
    """The root of a criterion that is -log p(target | output)."""

    def sample(self) -> Tensor:
        """The gradient of the loss where each label is drawn from the model, [*output.shape]; E[s_i s_i^T] = H_i."""


@dataclass(frozen=True)
class SoftmaxRoot:
    """Of H_i = mass_i (diag p_i - p_i p_i^T): one column sqrt(mass_i p_ik) (p_i - e_k) for each class k."""

    p: Tensor  # [m, K]
    mass: Tensor  # [m]

    @property
    def count(self) -> int:
        """K."""
        return self.p.shape[1]

    def columns(self, begin: int, end: int) -> Tensor:
        """See `OutputRoot`."""
        one_hot = torch.eye(self.count, dtype=self.p.dtype, device=self.p.device)[begin:end]
        return (self.p - one_hot.unsqueeze(1)) * (self.mass * self.p[:, begin:end].T).sqrt().unsqueeze(-1)

    def sample(self) -> Tensor:
        """Categorical labels."""
        # NaN is left to the step's own check: it stays in p, and so in the column.
        label = torch.multinomial(self.p.nan_to_num(nan=1.0), 1).squeeze(1)
        return (self.p - F.one_hot(label, self.count).to(self.p.dtype)) * self.mass.sqrt().unsqueeze(1)


@dataclass(frozen=True)
class GaussianRoot:
    """Of a diagonal H_i = diag(root_i^2): one column root_ik e_k for each output k."""

    root: Tensor  # [..., K]

    @property
    def count(self) -> int:
        """K."""
        return self.root.shape[-1]

    def columns(self, begin: int, end: int) -> Tensor:
        """See `OutputRoot`."""
        columns = self.root.new_zeros(end - begin, *self.root.shape)
        for row, k in enumerate(range(begin, end)):
            columns[row, ..., k] = self.root[..., k]
        return columns

    def sample(self) -> Tensor:
        """Labels with Gaussian noise."""
        return self.root * torch.randn_like(self.root)


@dataclass(frozen=True)
class BernoulliRoot(GaussianRoot):
    """Of H_i = diag(mass_i p_i (1 - p_i))."""

    p: Tensor  # [..., K]
    mass: Tensor  # [..., K]

    def sample(self) -> Tensor:
        """Bernoulli labels."""
        return self.mass.sqrt() * (self.p - (torch.rand_like(self.p) < self.p).to(self.p.dtype))


@dataclass(frozen=True)
class DenseRoot:
    """Of any positive semi-definite H_i = R_i R_i^T."""

    root: Tensor  # R [..., K, K]

    @property
    def count(self) -> int:
        """K."""
        return self.root.shape[-1]

    def columns(self, begin: int, end: int) -> Tensor:
        """See `OutputRoot`."""
        return self.root[..., begin:end].movedim(-1, 0)


def analytic_hessian(criterion: nn.Module, output: Tensor, *args: Any, **kwargs: Any) -> OutputHessian | None:
    """H for the criteria that have an analytic form here, at `output` [..., K]; None for every other."""
    return _evaluated(_FORMULAS, criterion, output, args, kwargs) if output.dim() >= 2 else None


def likelihood_root(criterion: nn.Module, output: Tensor, *args: Any, **kwargs: Any) -> LikelihoodRoot | None:
    """The root for the criteria known to be a negative log-likelihood, at `output` [..., K]; None for every other.

    They are nn.CrossEntropyLoss (categorical), nn.MSELoss (Gaussian) and nn.BCEWithLogitsLoss (Bernoulli) and their functions.
    For them it is a root of the Hessian itself: the Fisher matrix is the Gauss-Newton matrix.
    """
    return _evaluated(_ROOTS, criterion, output, args, kwargs)


def _evaluated(
    table: dict[type, Callable[..., Any]], criterion: nn.Module, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What the table's formula for this criterion gives, or None if it has none."""
    if isinstance(criterion, FunctionCriterion):
        module = _FUNCTIONS.get(criterion.function)
        if module is None or len(args) != 1 or not kwargs.keys() <= inspect.signature(module).parameters.keys():
            return None
        criterion, kwargs = module(**kwargs), {}
    formula = table.get(type(criterion))
    if formula is None or len(args) != 1 or kwargs:
        return None
    with torch.no_grad():
        # Rounded as half-precision outputs are, as under autocast, H would not be positive semi-definite.
        return formula(criterion, widened(output), args[0])


def autograd_hessian(loss: Tensor, source: Node) -> OutputHessian:
    """H of any scalar `loss` with respect to autograd node `source`'s tensor z [..., K], by double backward.

    Needs K backward passes through the criterion, or two where it acts on every element of z on its own. Instances must not
    be coupled by the criterion; a coupling enters as if it stood within the instances.
    """
    diagonal, rows = _autograd_rows(loss, source)
    k = diagonal.shape[-1]
    if rows is None:
        return OutputHessian(diagonal.reshape(-1, k).sum(0), convex=not bool(diagonal.any()))
    return OutputHessian(torch.stack([row.reshape(-1, k).sum(0) for row in rows]), convex=False)


def autograd_root(loss: Tensor, source: Node) -> OutputRoot:
    """The root of every instance's H_i, as `autograd_hessian` computes it.

    Raises:
        ValueError: an H_i is not positive semi-definite.
    """
    diagonal, rows = _autograd_rows(loss, source)
    if rows is None:
        _check_semidefinite(diagonal, diagonal.dtype)
        return GaussianRoot(diagonal.clamp(min=0).sqrt())
    hessians = torch.stack(list(rows), -1)
    if not torch.isfinite(hessians).all():
        return DenseRoot(hessians)  # NaN is left to the step's own check
    eigenvalues, vectors = torch.linalg.eigh(_finite(hessians).double())
    _check_semidefinite(eigenvalues, diagonal.dtype)
    return DenseRoot((vectors * eigenvalues.clamp(min=0).sqrt().unsqueeze(-2)).to(diagonal.dtype))


def _autograd_rows(loss: Tensor, source: Node) -> tuple[Tensor, Iterator[Tensor] | None]:
    """Every instance's H_i: its diagonal [..., K] and None, or its row sums and its rows, K tensors [..., K]."""
    edge = GradientEdge(source, 0)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss, edge, create_graph=True)
    if not gradient.requires_grad:  # a loss that is linear in z
        return torch.zeros_like(gradient), None

    def product(v: Tensor) -> Tensor:
        (hv,) = torch.autograd.grad(gradient, edge, v, retain_graph=True, allow_unused=True)
        return torch.zeros_like(gradient) if hv is None else hv.detach()

    # A diagonal Hessian has H v = (H 1) * v for every v.
    diagonal, v = product(torch.ones_like(gradient)), irregular(gradient)
    if ((product(v) - diagonal * v).abs() <= 1e-4 * diagonal.abs().max()).all():
        return diagonal, None

    def unit(k: int) -> Tensor:
        v = torch.zeros_like(gradient)
        v[..., k] = 1
        return v

    return diagonal, (product(unit(k)) for k in range(gradient.shape[-1]))


def _finite(hessian: Tensor) -> Tensor:
    if not torch.isfinite(hessian).all():
        raise NonFiniteError("expected a finite Hessian of the criterion with respect to the network output, got NaN or inf")
    return (hessian + hessian.mT) / 2


def _check_semidefinite(eigenvalues: Tensor, dtype: torch.dtype) -> None:
    lowest, tolerance = eigenvalues.min(), torch.finfo(dtype).eps ** 0.5 * eigenvalues.abs().max()
    if lowest < -tolerance:  # NaN is left to the step's own check
        raise ValueError(
            "expected a criterion whose Hessian with respect to the network output is positive semi-definite, got the eigenvalue "
            f"{lowest:.3g}; the Gauss-Newton matrix is then indefinite: use the positive-curvature Hessian, curvature='pch-abs' "
            "or 'pch-clip'"
        )


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
        """The scalar loss of an output and a target of the same shape.

        Raises:
            ValueError: the shapes differ.
        """
        if output.shape != target.shape:
            raise ValueError(
                f"TukeyBiweightLoss: expected a target of the output's shape {tuple(output.shape)}, got {tuple(target.shape)}"
            )
        inside = (1 - ((output - target) / self.c) ** 2).clamp(min=0)
        losses = self.c**2 / 6 * (1 - inside**3)
        return losses.mean() if self.reduction == "mean" else losses.sum()


def _checked_reduction(reduction: str) -> str:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"expected reduction 'mean' or 'sum', got {reduction!r}")
    return reduction


def _normalizer(criterion: Any, count: int) -> float:
    """What the sum over `count` terms is divided by; NaN for a mean over none, as the loss itself is."""
    return 1.0 if criterion.reduction == "sum" else float(count) or math.nan


def _cross_entropy_root(criterion: nn.CrossEntropyLoss, output: Tensor, target: Tensor) -> SoftmaxRoot | None:
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


def _cross_entropy(criterion: nn.CrossEntropyLoss, output: Tensor, target: Tensor) -> OutputHessian | None:
    if output.dim() == 2 and criterion.weight is None and not target.is_floating_point():
        mean = criterion.reduction == "mean"
        return OutputHessian(ops.cross_entropy_hessian(output, target, criterion.ignore_index, mean), convex=True)
    root = _cross_entropy_root(criterion, output, target)
    if root is None:
        return None
    weighted = root.p * root.mass.unsqueeze(1)
    return OutputHessian(torch.addmm(torch.diag(weighted.sum(0)), root.p.T, weighted, alpha=-1), convex=True)


def _mse(criterion: nn.MSELoss, output: Tensor, target: Tensor) -> OutputHessian | None:
    if target.shape != output.shape:  # broadcast: autograd counts the terms
        return None
    k = output.shape[-1]
    count = output.numel()
    return OutputHessian(output.new_full((k,), 2 * (count / k) / _normalizer(criterion, count)), convex=True)


def _mse_root(criterion: nn.MSELoss, output: Tensor, target: Tensor) -> GaussianRoot:
    return GaussianRoot(output.new_full(output.shape, (2 / _normalizer(criterion, output.numel())) ** 0.5))


def _bce_with_logits_root(criterion: nn.BCEWithLogitsLoss, output: Tensor, target: Tensor) -> BernoulliRoot:
    p = output.sigmoid()
    mass = torch.full_like(p, 1 / _normalizer(criterion, output.numel()))
    if criterion.pos_weight is not None:
        mass = mass * (1 + (criterion.pos_weight - 1) * target)
    if criterion.weight is not None:
        mass = mass * criterion.weight
    return BernoulliRoot((mass * p * (1 - p)).sqrt(), p, mass)


def _bce_with_logits(criterion: nn.BCEWithLogitsLoss, output: Tensor, target: Tensor) -> OutputHessian:
    root = _bce_with_logits_root(criterion, output, target)
    return OutputHessian((root.mass * root.p * (1 - root.p)).reshape(-1, output.shape[-1]).sum(0), convex=True)


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

_ROOTS: dict[type, Callable[..., LikelihoodRoot | None]] = {
    nn.CrossEntropyLoss: _cross_entropy_root,
    nn.MSELoss: _mse_root,
    nn.BCEWithLogitsLoss: _bce_with_logits_root,
}

_FUNCTIONS: dict[Callable[..., Tensor], type[nn.Module]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.mse_loss: nn.MSELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
}
