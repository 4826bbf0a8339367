"""The papers' criteria, and what makes a plain function a criterion."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


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
        """Returns the scalar loss.

        Args:
            output: logits [m, K].
            target: class indices [m], or probabilities [m, K]: y^T p then stands for p_y.
        """
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
        """Returns the scalar loss.

        Args:
            output: of any shape.
            target: of the same shape.

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


class CompositeLoss(nn.Module):
    """A criterion outer(inner(output), target) whose Gauss-Newton matrix is taken where it is convex: at inner(output).

    For a loss that is convex not in the network's output, but in a function of it, as the likelihood of a mixture is. With J_i
    the Jacobian of `inner` for instance i, the Hessian that "kflr", "fisher-exact", "fisher-mc" and the quadratic model of a step
    take for instance i is J_i^T F_i J_i, F_i the Fisher matrix of the label given inner(output): the Hessian of `outer`, or for
    nn.NLLLoss that of cross-entropy. The other curvatures take the Hessian of the whole.

        # a mixture of two binary classifiers (Botev et al., Eq. 27)
        def log_odds(output):
            gate, first, second = output.unbind(1)
            yes, no = (torch.logaddexp(F.logsigmoid(gate) + F.logsigmoid(sign * first),
                                       F.logsigmoid(-gate) + F.logsigmoid(sign * second)) for sign in (1, -1))
            return yes - no

        criterion = secondorder.criteria.CompositeLoss(log_odds, nn.BCEWithLogitsLoss())
        optimizer = secondorder.KFLR(model, criterion)

    Args:
        inner: a function, or a module without parameters, of the output [m, K]; returns [m, K'] or [m], each row from its own.
        outer: nn.CrossEntropyLoss, nn.NLLLoss of log-probabilities, nn.MSELoss or nn.BCEWithLogitsLoss; no subclass, no function.

    Raises:
        TypeError: `outer` is none of these.
    """

    def __init__(self, inner: Callable[[Tensor], Tensor], outer: nn.Module):
        super().__init__()
        if type(outer) not in (nn.CrossEntropyLoss, nn.NLLLoss, nn.MSELoss, nn.BCEWithLogitsLoss):
            raise TypeError(
                "CompositeLoss: expected outer to be nn.CrossEntropyLoss, nn.NLLLoss, nn.MSELoss or nn.BCEWithLogitsLoss, got "
                f"{type(outer).__name__}"
            )
        self.inner, self.outer = inner, outer

    @property
    def reduction(self) -> str:
        """Returns that of `outer`."""
        return str(self.outer.reduction)

    def forward(self, output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the scalar loss.

        Args:
            output: the network's [m, K].
            *args: what `outer` takes besides, the target first.
            **kwargs: the same by name.
        """
        return self.outer(self.inner(output), *args, **kwargs)


class FunctionCriterion(nn.Module):
    """Makes a plain function (output, target, ...) -> loss a module, so that its calls can be seen.

    Args:
        function: called with the module's arguments; returns the scalar loss.
    """

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Calls the function."""
        return self.function(*args, **kwargs)

    def extra_repr(self) -> str:
        """Returns the function's name."""
        return getattr(self.function, "__name__", repr(self.function))


def as_criterion(owner: str, criterion: Any) -> nn.Module:
    """Returns a criterion as a module, without torch.compile's wrapper.

    Raises:
        TypeError: it cannot be called.
    """
    if not callable(criterion):
        raise TypeError(
            f"{owner}: expected criterion to be an nn.Module or a function (output, target) -> loss, "
            f"got {'none' if criterion is None else type(criterion).__name__}"
        )
    criterion = getattr(criterion, "_orig_mod", criterion)
    return criterion if isinstance(criterion, nn.Module) else FunctionCriterion(criterion)


def _checked_reduction(reduction: str) -> str:
    """Returns a reduction, once it is known to be one."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"expected reduction 'mean' or 'sum', got {reduction!r}")
    return reduction
