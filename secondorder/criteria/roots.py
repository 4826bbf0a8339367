"""Square roots of a criterion's Hessian for every instance: the columns that KFLR and the Fisher matrices propagate."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def dense_root(hessians: Tensor, check: Callable[[Tensor], None] = lambda _: None) -> DenseRoot:
    """Returns the root of positive semi-definite H_i [..., K, K]; rounding's negative eigenvalues, past `check`, are 0."""
    if not torch.isfinite(hessians).all():
        return DenseRoot(hessians)  # NaN is left to the step's own check
    eigenvalues, vectors = torch.linalg.eigh((hessians + hessians.mT).double() / 2)
    check(eigenvalues)
    return DenseRoot((vectors * eigenvalues.clamp(min=0).sqrt().unsqueeze(-2)).to(hessians.dtype))
