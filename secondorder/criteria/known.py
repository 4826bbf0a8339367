"""Looks up what is known of a criterion, by its type or, for a function of torch.nn.functional, by the module of its name."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secondorder._tensors import Arriving, captured_now, to_compute_dtype, without_autocast
from secondorder.criteria.losses import CompositeLoss, FunctionCriterion

LOG_SOFTMAX = "LogSoftmaxBackward"  # the name of its autograd node
_FUNCTIONS: dict[Callable[..., Tensor], type[nn.Module]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.nll_loss: nn.NLLLoss,
    F.mse_loss: nn.MSELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    F.binary_cross_entropy: nn.BCELoss,
}
# Convex in their first argument, whatever it is; those of probabilities or their logarithms are in what these come from.
_CONVEX = (nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss)


def evaluated(
    table: dict[type, Callable[..., Any]], criterion: nn.Module, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Returns what the table's formula for this criterion gives, or None if it has none; all of them are for fixed targets."""
    if not is_fixed(args):
        return None
    if isinstance(criterion, FunctionCriterion):
        module = _module_of(criterion)
        if module is None or len(args) != 1 or not kwargs.keys() <= inspect.signature(module).parameters.keys():
            return None
        criterion, kwargs = module(**kwargs), {}
    formula = table.get(type(criterion))
    if formula is None or len(args) != 1 or kwargs:
        return None
    with torch.no_grad(), without_autocast(output.device):
        # Not in the dtype of half-precision outputs, as under autocast: rounded so, H would not be positive semi-definite.
        return formula(criterion, to_compute_dtype(output), args[0])


def by_position(criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns a criterion's arguments with output and target by position and, for functions that are known, all others by name.

    Those of a mean square in this order, also where the call has the target first.

    Args:
        criterion: a module or a `FunctionCriterion`.
        args: the criterion's arguments by position, of one call.
        kwargs: those by name.

    Returns:
        The arguments by position, and those that stay by name.
    """
    named = dict(kwargs)
    if len(args) > 2 and isinstance(criterion, FunctionCriterion) and is_known(criterion):
        args, others = args[:2], args[2:]
        named |= zip(list(inspect.signature(criterion.function).parameters)[2:], others, strict=False)
    for name in _leading(criterion)[len(args) :] if named else ():
        if name not in named:
            break
        args = (*args, named.pop(name))
    if _kind(criterion) is nn.MSELoss and len(args) == 2:  # it does not know which is which
        first, second = (isinstance(each, Tensor) and each.requires_grad for each in args)
        args = (args[1], args[0]) if second and not first else args
    return args, named


def _leading(criterion: Any) -> list[str]:
    """Returns the names of a criterion's first two arguments, as far as they are known."""
    if isinstance(criterion, CompositeLoss):
        return ["output", *_leading(criterion.outer)[1:]]
    try:
        parameters = inspect.signature(
            criterion.function if isinstance(criterion, FunctionCriterion) else criterion.forward
        ).parameters
    except (TypeError, ValueError):  # a callable without a signature
        return []
    return [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD][:2]


def normalizer(criterion: Any, count: int) -> float:
    """Returns what the sum over `count` terms is divided by; NaN for a mean over none, as the loss itself is."""
    return 1.0 if criterion.reduction == "sum" else float(count) or math.nan


def row_masses(criterion: nn.Module, *args: Any, **kwargs: Any) -> Tensor | None:
    """Returns the weight [m] of every row in what a mean is divided by; None: that is a number of rows, or of their elements.

    Args:
        criterion: a module or a `FunctionCriterion`; cross-entropy and the negative log-likelihood of class indices have such
            weights, 0 for ignored ones, and `F.mse_loss` with `weight`.
        args: of the criterion, the output [m, K, ...] and the target [m, ...].
        kwargs: of the criterion.
    """
    if not divides_by_masses(criterion, args):
        return None
    masses = element_masses(criterion, *args, **kwargs)
    return None if masses is None else masses.reshape(len(masses), -1).sum(1)


def divides_by_masses(criterion: nn.Module, args: tuple[Any, ...]) -> bool:
    """Tells whether a mean of the criterion is divided by the sum of its `element_masses`, rather than by their number.

    Args:
        criterion: a module or a `FunctionCriterion`.
        args: of its call.
    """
    kind = _kind(criterion.outer if isinstance(criterion, CompositeLoss) else criterion)
    return kind not in (nn.BCEWithLogitsLoss, nn.BCELoss) and not (kind is nn.CrossEntropyLoss and _has_probabilities(args))


def element_masses(criterion: nn.Module, *args: Any, **kwargs: Any) -> Tensor | None:
    """Returns the weight of every element of the target in a loss with ignored classes, or with weights of classes or elements.

    It waits for the device where there are ignored classes alone.

    Args:
        criterion: a module or a `FunctionCriterion`; such weights are known of cross-entropy, the negative log-likelihood, binary
            cross-entropy with and without logits (`weight`, `pos_weight`) and `F.mse_loss` (`weight`).
        args: of the criterion, the output [m, K, ...] and the target, [m, ...] where it is of class indices.
        kwargs: of the criterion.

    Returns:
        The weights in float64, 0 where an element is ignored, of the target's shape, or without its dimension of classes where
        it is of probabilities; None: all count alike.
    """
    own = _own_weights(criterion, args, kwargs)
    if own is not None:
        return own()
    found = _target_weights(criterion, args, kwargs)
    if found is None:
        return None
    target, weight, ignored = found
    kept = target != ignored
    if weight is None and bool(kept.all()):
        return None
    return kept.double() if weight is None else weight.double()[torch.where(kept, target, 0)] * kept


class LateMasses:
    """`element_masses` of a criterion's call, computed when they are asked for, without a wait where nothing is ignored.

    Where a CUDA graph is being captured nothing is taken to be ignored; `assumed` then tells on the device whether that is so.

    Args:
        criterion: as for `row_masses`.
        args: of the call.
        kwargs: of the call.
    """

    def __init__(self, criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self._of = (criterion, args, kwargs)
        found = _target_weights(criterion, args, kwargs)
        self._found = found is not None or _own_weights(criterion, args, kwargs) is not None
        self._masses: Tensor | None = None
        self._all_count: Arriving | None = None
        self.assumed: Tensor | None = None
        if found is not None and found[1] is None:
            all_count = (found[0] != found[2]).all()
            if captured_now():
                self._found, self.assumed = False, all_count
            else:
                self._all_count = Arriving(all_count)

    @property
    def possible(self) -> bool:
        """Tells whether there may be any."""
        return self._found

    def __call__(self) -> Tensor | None:
        """Returns the weights, or None where all count alike."""
        if not self._found:
            return None
        if self._all_count is not None and bool(self._all_count.read()):
            self._found = False
        elif self._masses is None:
            criterion, args, kwargs = self._of
            self._masses = element_masses(criterion, *args, **kwargs)
        return self._masses


def _target_weights(
    criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None, int] | None:
    """Returns a classifier's target, its class weights and the class that it ignores; None: it has no such target."""
    if isinstance(criterion, CompositeLoss):
        return _target_weights(criterion.outer, args, kwargs)
    if isinstance(criterion, FunctionCriterion):
        if criterion.function not in (F.cross_entropy, F.nll_loss):
            return None
        target, weight, ignored = args[1] if len(args) > 1 else None, kwargs.get("weight"), kwargs.get("ignore_index", -100)
    elif isinstance(criterion, nn.CrossEntropyLoss | nn.NLLLoss):
        target, weight, ignored = args[1] if len(args) > 1 else None, criterion.weight, criterion.ignore_index
    else:
        return None
    if not isinstance(target, Tensor) or target.is_floating_point() or target.dim() == 0:
        return None
    return target.long(), weight, ignored


def _own_weights(criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Tensor] | None:
    """Gives the weights of a target's elements that are given with them, or of classes by probabilities; None: there are none."""
    if isinstance(criterion, CompositeLoss):
        return _own_weights(criterion.outer, args, kwargs)
    target = args[1] if len(args) > 1 else None
    kind, function = _kind(criterion), isinstance(criterion, FunctionCriterion)

    def setting(name: str, default: Any = None) -> Any:
        return kwargs.get(name, default) if function else getattr(criterion, name, default)

    weight, positive = setting("weight"), setting("pos_weight")
    if not isinstance(target, Tensor) or (weight is None and positive is None):
        return None
    if kind is nn.CrossEntropyLoss and _has_probabilities(args):
        smoothing, dim = setting("label_smoothing", 0.0), min(1, target.dim() - 1)

        def of_classes() -> Tensor:
            smoothed = target.double() * (1 - smoothing) + smoothing / target.shape[dim]
            return torch.tensordot(smoothed, weight.double(), ([dim], [0]))

        return of_classes
    if kind not in (nn.BCEWithLogitsLoss, nn.BCELoss, nn.MSELoss):
        return None

    def masses() -> Tensor:
        own = torch.ones_like(target, dtype=torch.float64) if positive is None else 1 + (positive - 1) * target.double()
        return own if weight is None else own * weight

    return masses


def _has_probabilities(args: tuple[Any, ...]) -> bool:
    return len(args) > 1 and isinstance(args[1], Tensor) and args[1].is_floating_point()


def is_known(criterion: FunctionCriterion) -> bool:
    """Tells whether it is one of torch's functions that stand for a module here.

    Args:
        criterion: a function as a criterion.
    """
    return _module_of(criterion) is not None


def is_convex(criterion: nn.Module) -> bool:
    """Tells whether it is known to be convex in its first argument.

    Args:
        criterion: a module or a `FunctionCriterion`.
    """
    return _kind(criterion) in _CONVEX


def is_fixed(targets: tuple[Any, ...]) -> bool:
    """Tells whether a criterion's target depends on nothing that is trained.

    Args:
        targets: its arguments after the output.
    """
    return not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in targets)


def of_difference(criterion: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the arguments of a mean square of an output and a target that are both trained: their difference, and zero.

    Args:
        criterion: a module or a `FunctionCriterion`.
        args: of its call; those of any other come back as they are.
    """
    if _kind(criterion) is not nn.MSELoss or len(args) != 2 or is_fixed(args[:1]) or is_fixed(args[1:]):
        return args
    with torch.enable_grad():
        difference = args[0] - args[1]
        difference = difference.unsqueeze(-1) if difference.dim() == 1 else difference  # of one number for each instance
    return difference, torch.zeros_like(difference, requires_grad=False)


def link_of(criterion: nn.Module) -> str | None:
    """Returns the name of the autograd node that makes a likelihood's first argument of its logits; None: it takes these.

    The curvature of NLLLoss is in the log_softmax before it, and that of BCELoss in the sigmoid.

    Args:
        criterion: a module or a `FunctionCriterion`.
    """
    return {nn.NLLLoss: LOG_SOFTMAX, nn.BCELoss: "SigmoidBackward"}.get(_kind(criterion))


def _kind(criterion: nn.Module) -> type[nn.Module]:
    """Returns a criterion's type, or that of the module that its function stands for."""
    module = _module_of(criterion) if isinstance(criterion, FunctionCriterion) else None
    return type(criterion) if module is None else module


def _module_of(criterion: FunctionCriterion) -> type[nn.Module] | None:
    """Returns the module that a function of torch's stands for; callables of one's own may have no hash."""
    return next((module for function, module in _FUNCTIONS.items() if function is criterion.function), None)
