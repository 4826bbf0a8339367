"""The Hessian of a criterion with respect to the network's output, by formula where the criterion is known.

A batch's loss is L = reduction_i xi(z_i), z_i the network's output for instance i. What the curvatures need is

    H = sum_i d^2 L / dz_i dz_i^T   [K, K],

the expectation of the criterion's Hessian for a mean reduction. It is on the scale of L itself: for a sum it is the sum, as the
gradient is, so that a Newton step does not depend on the reduction (but for the damping).

Criteria whose Hessian is diagonal give it as a vector [K].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secondorder import ops
from secondorder._tensors import refuse_capture
from secondorder.criteria.known import evaluated, is_convex, normalizer
from secondorder.criteria.likelihoods import as_cross_entropy, bce_with_logits_root, cross_entropy_root, likelihood_root
from secondorder.criteria.losses import BoundedClassificationLoss, CompositeLoss, TukeyBiweightLoss
from secondorder.criteria.roots import OutputRoot
from secondorder.errors import WITHOUT, NonFiniteError
from secondorder.linalg import pos_eig


@dataclass(eq=False, slots=True)
class OutputHessian:
    """The Hessian of a criterion with respect to the network's output, on the scale of the loss.

    Args:
        values: H [K, K], or its diagonal [K].
        convex: whether H is known to be positive semi-definite.
        scale: [], by which H is to be multiplied; None: 1. A negative one, as for a loss that is maximised, turns convex into
            concave. Its sign need not be known on the host.
    """

    values: Tensor
    convex: bool
    scale: Tensor | None = None

    def scaled(self) -> "OutputHessian":
        """Returns the Hessian multiplied by `scale`, and so without one; waits for the device."""
        if self.scale is None:
            return self
        return OutputHessian(self.values * self.scale, self.convex and bool(self.scale >= 0))

    def positive(self, gamma: float) -> Tensor:
        """Returns Pos-Eig_gamma(H) (Chen et al., Eq. 8a), dense [K, K], a new tensor.

        Args:
            gamma: what a negative eigenvalue is multiplied by, <= 0.

        Raises:
            NonFiniteError: H has entries that are not finite.
        """
        if self.scale is not None:
            if not self.convex:
                return OutputHessian(self.values * self.scale, False).positive(gamma)
            # Of a concave one every eigenvalue is negative.
            return OutputHessian(self.values * pos_eig(self.scale, gamma), True).positive(gamma)
        if self.values.dim() == 1:
            return torch.diag(self.values if self.convex else pos_eig(self.values, gamma))
        if self.convex:
            return self.values.clone()
        refuse_capture("eigenvalues of a criterion's Hessian")
        # In float64: eigh of an ill-conditioned float32 matrix can fail to converge.
        eigenvalues, vectors = torch.linalg.eigh(symmetrized(self.values).double())
        return ((vectors * pos_eig(eigenvalues, gamma)) @ vectors.T).to(self.values.dtype)

    def is_semidefinite(self) -> bool:
        """Tells whether H is known, or seen, to be positive semi-definite; also where it is not finite, which the step says."""
        if self.convex or not self.values.isfinite().all():
            return True
        if self.values.dim() == 1:  # some instance's is not
            return False
        return lowest_eigenvalue(torch.linalg.eigvalsh(symmetrized(self.values).double()), self.values.dtype) is None

    def semidefinite(self) -> Tensor:
        """Returns H itself, dense [K, K], a new tensor, which Gauss-Newton needs to be positive semi-definite.

        Raises:
            NonFiniteError: it has entries that are not finite.
            ValueError: it is not positive semi-definite.
        """
        if self.scale is not None:
            return self.scaled().semidefinite()
        if not self.convex:
            dense = torch.diag(self.values) if self.values.dim() == 1 else self.values
            check_semidefinite(torch.linalg.eigvalsh(symmetrized(dense).double()), self.values.dtype)
        return self.positive(0.0)


def analytic_hessian(criterion: nn.Module, output: Tensor, *args: Any, **kwargs: Any) -> OutputHessian | None:
    """Returns H = sum_i d^2 L / dz_i dz_i^T for the criteria that have an analytic form here; None for every other.

    They are nn.CrossEntropyLoss, nn.NLLLoss, nn.MSELoss, nn.BCEWithLogitsLoss, their functions, and the two criteria of this
    package.

    Args:
        criterion: a module.
        output: z, what it is called on, [..., K]; by NLLLoss log_softmax of z.
        *args: what else it is called with, the target first.
        **kwargs: the same by name.
    """
    return evaluated(_FORMULAS, criterion, output, args, kwargs) if output.dim() >= 2 else None


# What the quadratic model of a step is told of a criterion.
KnownForm = OutputHessian | OutputRoot | Literal["convex"] | None


def known_form(criterion: nn.Module, output: Any, *args: Any, **kwargs: Any) -> KnownForm:
    """Returns what the quadratic model of a step takes for the Hessian of a criterion.

    H for the criteria that are known not to be convex; the root of J_i^T H_i J_i for a `CompositeLoss`; "convex" for those known
    to be so in the output; None for every other.

    Args:
        criterion: a module or a `FunctionCriterion`.
        output: the network's output [..., K].
        args: of the criterion after the output.
        kwargs: of the criterion.
    """
    if isinstance(criterion, CompositeLoss):
        return likelihood_root(criterion, output.detach(), *args, **kwargs)
    if not isinstance(criterion, BoundedClassificationLoss | TukeyBiweightLoss):
        return "convex" if is_convex(criterion) else None
    return analytic_hessian(criterion, output, *args, **kwargs)


def symmetrized(hessian: Tensor) -> Tensor:
    """Returns (H + H^T) / 2 [..., K, K], free of rounding's asymmetry.

    Raises:
        NonFiniteError: H holds NaN or inf.
    """
    if not torch.isfinite(hessian).all():
        raise NonFiniteError(
            "expected a finite Hessian of the criterion with respect to the network output, got NaN or inf. If its gradient is "
            f"finite, as that of a norm or a distance is at zero, take {WITHOUT}, or add a small number to what the "
            "root is taken of"
        )
    return (hessian + hessian.mT) / 2


def check_semidefinite(eigenvalues: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError where an eigenvalue is negative by more than rounding in `dtype` explains."""
    lowest = lowest_eigenvalue(eigenvalues, dtype)
    if lowest is not None:
        raise ValueError(
            "expected a criterion whose Hessian with respect to the network output is positive semi-definite, got the eigenvalue "
            f"{lowest:.3g}; the Gauss-Newton matrix is then indefinite: use the positive-curvature Hessian, curvature='pch-abs' "
            "or 'pch-clip', as LayerwiseNewton and EACG do"
        )


def lowest_eigenvalue(eigenvalues: Tensor, dtype: torch.dtype) -> float | None:
    """Returns the least eigenvalue, where it is negative by more than rounding in `dtype` explains; NaN never is."""
    lowest = eigenvalues.min()
    return float(lowest) if lowest < -(torch.finfo(dtype).eps ** 0.5) * eigenvalues.abs().max() else None


def _cross_entropy(criterion: nn.CrossEntropyLoss, output: Tensor, target: Tensor) -> OutputHessian | None:
    if output.dim() == 2 and criterion.weight is None and not target.is_floating_point():
        mean = criterion.reduction == "mean"
        return OutputHessian(ops.cross_entropy_hessian(output, target, criterion.ignore_index, mean), convex=True)
    root = cross_entropy_root(criterion, output, target)
    if root is None:
        return None
    weighted = root.p * root.mass.unsqueeze(1)
    return OutputHessian(torch.addmm(torch.diag(weighted.sum(0)), root.p.T, weighted, alpha=-1), convex=True)


def _nll(criterion: nn.NLLLoss, output: Tensor, target: Tensor) -> OutputHessian | None:
    return _cross_entropy(as_cross_entropy(criterion), output, target)  # softmax of log-probabilities gives the probabilities


def _mse(criterion: nn.MSELoss, output: Tensor, target: Tensor) -> OutputHessian | None:
    if target.shape != output.shape:  # broadcast: autograd counts the terms
        return None
    k = output.shape[-1]
    count = output.numel()
    return OutputHessian(output.new_full((k,), 2 * (count / k) / normalizer(criterion, count)), convex=True)


def _bce_with_logits(criterion: nn.BCEWithLogitsLoss, output: Tensor, target: Tensor) -> OutputHessian:
    root = bce_with_logits_root(criterion, output, target)
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
    return OutputHessian(hessian / normalizer(criterion, len(output)), convex=False)


def _tukey(criterion: TukeyBiweightLoss, output: Tensor, target: Tensor) -> OutputHessian:
    t = ((output - target) / criterion.c) ** 2
    second = torch.where(t <= 1, (1 - t) * (1 - 5 * t), 0)
    diagonal = second.reshape(-1, output.shape[-1]).sum(0)
    return OutputHessian(diagonal / normalizer(criterion, output.numel()), convex=False)


_FORMULAS: dict[type, Callable[..., OutputHessian | None]] = {
    nn.CrossEntropyLoss: _cross_entropy,
    nn.NLLLoss: _nll,
    nn.MSELoss: _mse,
    nn.BCEWithLogitsLoss: _bce_with_logits,
    BoundedClassificationLoss: _bounded_classification,
    TukeyBiweightLoss: _tukey,
}
