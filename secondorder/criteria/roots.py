"""Square roots of a criterion's Hessian for every instance: the columns that KFLR and the Fisher matrices propagate."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secondorder.criteria.known import evaluated, normalizer
from secondorder.criteria.losses import CompositeLoss

_DENSE = 2**24  # so many numbers may the H_i have that are added up as matrices


class OutputRoot(Protocol):
    """A square root of the criterion's Hessian for every instance, H_i = sum_c s_ic s_ic^T, on the scale of the loss.

    It has `count` columns s_i1, s_i2, ... for each instance.
    """

    @property
    def count(self) -> int:
        """Returns how many columns an instance has."""

    def columns(self, begin: int, end: int) -> Tensor:
        """Returns the columns from `begin` to before `end`, [end - begin, *output.shape]."""


class LikelihoodRoot(OutputRoot, Protocol):
    """The root of a criterion that is -log p(target | output)."""

    def sample(self) -> Tensor:
        """Returns the gradient of the loss where each label is drawn from the model, [*output.shape]; E[s_i s_i^T] = H_i."""


@dataclass(frozen=True)
class SoftmaxRoot:
    """Of H_i = mass_i (diag p_i - p_i p_i^T): one column sqrt(mass_i p_ik) (p_i - e_k) for each class k."""

    p: Tensor  # [m, K]
    mass: Tensor  # [m]

    @property
    def count(self) -> int:
        """Returns K."""
        return self.p.shape[1]

    def columns(self, begin: int, end: int) -> Tensor:
        """Returns the columns from `begin` to before `end`, [end - begin, *output.shape]."""
        one_hot = torch.eye(self.count, dtype=self.p.dtype, device=self.p.device)[begin:end]
        return (self.p - one_hot.unsqueeze(1)) * (self.mass * self.p[:, begin:end].T).sqrt().unsqueeze(-1)

    def sample(self) -> Tensor:
        """Draws categorical labels."""
        # The label is drawn as torch.multinomial draws it, without its checks, which wait for the device. A NaN stays in p and so
        # in the result, where the step's own check sees it.
        label = (self.p.nan_to_num(nan=1.0) / torch.empty_like(self.p).exponential_()).argmax(1)
        return (self.p - F.one_hot(label, self.count).to(self.p.dtype)) * self.mass.sqrt().unsqueeze(1)


@dataclass(frozen=True)
class GaussianRoot:
    """Of a diagonal H_i = diag(root_i^2): one column root_ik e_k for each output k."""

    root: Tensor  # [..., K]

    @property
    def count(self) -> int:
        """Returns K."""
        return self.root.shape[-1]

    def columns(self, begin: int, end: int) -> Tensor:
        """Returns the columns from `begin` to before `end`, [end - begin, *output.shape]."""
        columns = self.root.new_zeros(end - begin, *self.root.shape)
        for row, k in enumerate(range(begin, end)):
            columns[row, ..., k] = self.root[..., k]
        return columns

    def sample(self) -> Tensor:
        """Draws labels with Gaussian noise."""
        return self.root * torch.randn_like(self.root)


@dataclass(frozen=True)
class BernoulliRoot(GaussianRoot):
    """Of H_i = diag(mass_i p_i (1 - p_i))."""

    p: Tensor  # [..., K]
    mass: Tensor  # [..., K]

    def sample(self) -> Tensor:
        """Draws Bernoulli labels."""
        return self.mass.sqrt() * (self.p - (torch.rand_like(self.p) < self.p).to(self.p.dtype))


@dataclass(frozen=True)
class DenseRoot:
    """Of any positive semi-definite H_i = R_i R_i^T."""

    root: Tensor  # R [..., K, K]

    @property
    def count(self) -> int:
        """Returns K."""
        return self.root.shape[-1]

    def columns(self, begin: int, end: int) -> Tensor:
        """Returns the columns from `begin` to before `end`, [end - begin, *output.shape]."""
        return self.root[..., begin:end].movedim(-1, 0)


@dataclass(frozen=True)
class ScalarRoot:
    """Of a likelihood of one number per instance, [m], or in all, []: one column, where `GaussianRoot` sees m numbers of one."""

    root: GaussianRoot  # [m], or []
    count = 1

    def columns(self, begin: int, end: int) -> Tensor:
        """Returns the columns from `begin` to before `end`, [end - begin, m], or [end - begin]."""
        return self.root.root.unsqueeze(0)[begin:end]

    def sample(self) -> Tensor:
        """Draws labels of the root's likelihood."""
        return self.root.sample()


@dataclass(frozen=True)
class PulledBackRoot:
    """Of J_i^T H_i J_i, J_i the Jacobian of a function for every instance: the columns J_i^T s_ic."""

    root: LikelihoodRoot  # of H_i
    transposed: Callable[[Tensor], Tensor]  # J^T, of [count, *value.shape]

    @property
    def count(self) -> int:
        """Returns that of the root."""
        return self.root.count

    def columns(self, begin: int, end: int) -> Tensor:
        """Returns the columns from `begin` to before `end`, [end - begin, *output.shape]."""
        return self.transposed(self.root.columns(begin, end))

    def sample(self) -> Tensor:
        """Draws labels of the root's likelihood."""
        return self.transposed(self.root.sample().unsqueeze(0)).squeeze(0)


@dataclass(frozen=True)
class SampledRoot:
    """What stands for a root where a criterion draws its own labels.

    Args:
        criterion: with a method `sample(output)` that returns a target for every instance.
        output: what it is called on, [..., K], or [m].
        others: what it is called with after the target.
        named: the same by name.
    """

    criterion: nn.Module
    output: Tensor
    others: tuple[Any, ...] = ()
    named: dict[str, Any] = field(default_factory=dict)

    def sample(self) -> Tensor:
        """Returns the loss's gradient for labels drawn from the model, [*output.shape], on the scale of a root's column."""
        with torch.no_grad():
            target = self.criterion.sample(self.output)  # type: ignore[operator]
        with torch.enable_grad():
            leaf = self.output.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.criterion(leaf, target, *self.others, **self.named), leaf)
        # A mean's gradient holds 1 / m for each of the m instances, whose outer products are to be summed over m.
        instances = len(self.output) if self.output.dim() == 1 else self.output.shape[:-1].numel()
        mean = getattr(self.criterion, "reduction", "mean") != "sum"
        return gradient * instances**0.5 if mean else gradient


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
        (rows,) = torch.autograd.grad(value, leaf, columns.to(value.dtype), retain_graph=True, is_grads_batched=True)
        return rows

    return None if root is None else PulledBackRoot(root, transposed)


@dataclass(frozen=True)
class ClassesElsewhere:
    """Of logits of another shape than [m, K]: of one instance, [K], or with the classes in another dimension, [m, K, ...]."""

    root: SoftmaxRoot  # of the logits as rows [.., K]
    shape: torch.Size  # of the logits with the classes last
    dim: int  # where their classes are

    @property
    def count(self) -> int:
        """Returns K."""
        return self.root.count

    def columns(self, begin: int, end: int) -> Tensor:
        """Returns the columns from `begin` to before `end`, [end - begin, *output.shape]."""
        return self.placed(self.root.columns(begin, end))

    def sample(self) -> Tensor:
        """Draws categorical labels."""
        return self.placed(self.root.sample().unsqueeze(0)).squeeze(0)

    def placed(self, columns: Tensor) -> Tensor:
        """Returns columns [count, rows, K] in the shape of the logits."""
        return columns.reshape(len(columns), *self.shape).movedim(-1, 1 + self.dim)


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


def added_up(root: OutputRoot, positions: Tensor, shape: torch.Size, dim: int | None) -> OutputRoot | None:
    """Returns the root at a tensor of which the output's numbers are taken, some of them several times: their H_i add up.

    Args:
        root: at the output.
        positions: of the output's numbers among those of this tensor, of the output's shape.
        shape: of this tensor.
        dim: where its classes are; None: it has none.

    Returns:
        None: it is a root of which this is not known, or all are one number, which is no row of a layer.
    """
    if not shape:
        return None

    def back(t: Tensor) -> Tensor:
        return _sums_at(positions, t, shape)

    if isinstance(root, BernoulliRoot):
        mass = back(root.mass)
        p = _shared(back(root.mass * root.p), mass)
        return BernoulliRoot((mass * p * (1 - p)).sqrt(), p, mass)
    if type(root) is GaussianRoot:
        return GaussianRoot(back(root.root.square()).sqrt())
    if dim is None:
        return None
    # All uses of a row have its p: sum_i mass_i p_ik adds up to mass p_k.
    if isinstance(root, SoftmaxRoot):
        weighted = back(root.p * root.mass.unsqueeze(1))
    elif isinstance(root, ClassesElsewhere):
        weighted = back(root.placed((root.root.p * root.root.mass.unsqueeze(1)).unsqueeze(0)).squeeze(0))
    else:
        return None
    weighted = weighted.movedim(dim, -1)
    flat = weighted.reshape(-1, weighted.shape[-1])
    mass = flat.sum(1)
    return ClassesElsewhere(SoftmaxRoot(_shared(flat, mass.unsqueeze(1)), mass), weighted.shape, dim)


def densely_added_up(root: OutputRoot, positions: Tensor, shape: torch.Size) -> OutputRoot | None:
    """Returns the same for any root of an output whose instances are rows, by the matrices H_i themselves.

    Args:
        root: at the output [m, K], or with its classes elsewhere.
        positions: as for `added_up`.
        shape: of the tensor that the numbers are taken of, [..., n]; those of an instance are of one of its rows.

    Returns:
        None: an instance has numbers of several rows, or the matrices are too large.
    """
    dim = root.dim if isinstance(root, ClassesElsewhere) else 1
    if not shape or (positions.dim() != 2 and not isinstance(root, ClassesElsewhere)):
        return None
    n, places = shape[-1], positions.movedim(dim, -1).flatten(0, -2)
    m, k = places.shape
    if max(m * k * max(k, root.count), shape.numel() * n) > _DENSE:
        return None
    rows, places = places // n, places % n
    if (rows != rows[:, :1]).any():
        return None
    columns = root.columns(0, root.count).movedim(1 + dim, -1).flatten(1, -2)
    entries = (rows * n + places).unsqueeze(2) * n + places.unsqueeze(1)
    return dense_root(_sums_at(entries, torch.einsum("cik,cil->ikl", columns, columns), torch.Size((*shape, n))))


def differences_added_up(root: GaussianRoot, first: Tensor, second: Tensor, shape: torch.Size) -> OutputRoot | None:
    """Returns the root at a tensor whose numbers are subtracted from each other, its rows' H_i added up over all differences.

    Args:
        root: at the differences [..., K], whose rows are the instances.
        first: positions of what is subtracted from, among the numbers of the tensor, of the differences' shape.
        second: likewise of what is subtracted.
        shape: of the tensor, [..., n].

    Returns:
        None: no row of the tensor is in several instances, whose own columns are exact; or the matrices are too large.
    """
    n = shape[-1]
    rows = torch.cat([first, second], -1).flatten(0, -2) // n
    instances = torch.arange(len(rows), device=rows.device).unsqueeze(1).expand_as(rows)
    last = instances.new_zeros(shape[:-1].numel()).scatter_(0, rows.flatten(), instances.flatten())
    if (last[rows] == instances).all():
        return None
    weights = root.root.square().masked_fill(first == second, 0)  # a difference of a number from itself is zero
    within = (first // n == second // n) & (first != second)
    if not within.any():
        return GaussianRoot(_sums_at(torch.cat([first, second]), torch.cat([weights, weights]), shape).sqrt())
    if shape.numel() * n > _DENSE:
        return None
    coupled = -weights * within
    places = [p * n + q % n for p, q in ((first, first), (second, second), (first, second), (second, first))]
    return dense_root(_sums_at(torch.cat(places), torch.cat([weights, weights, coupled, coupled]), torch.Size((*shape, n))))


def dense_root(hessians: Tensor, check: Callable[[Tensor], None] = lambda _: None) -> DenseRoot:
    """Returns the root of positive semi-definite H_i [..., K, K]; rounding's negative eigenvalues, past `check`, are 0."""
    if not torch.isfinite(hessians).all():
        return DenseRoot(hessians)  # NaN is left to the step's own check
    eigenvalues, vectors = torch.linalg.eigh((hessians + hessians.mT).double() / 2)
    check(eigenvalues)
    return DenseRoot((vectors * eigenvalues.clamp(min=0).sqrt().unsqueeze(-2)).to(hessians.dtype))


def _sums_at(positions: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """Returns a tensor of this shape whose numbers are the sums of the values at their positions."""
    return values.new_zeros(shape.numel()).index_add_(0, positions.flatten(), values.flatten()).view(shape)


def _shared(weighted: Tensor, mass: Tensor) -> Tensor:
    """Returns weighted / mass; 0 where both are."""
    return weighted / mass.masked_fill(mass == 0, 1)


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
