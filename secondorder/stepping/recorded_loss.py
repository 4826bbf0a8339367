"""One recorded loss, evaluated anew at other parameters: from the record of its layers alone, or by the model and the criterion.

Some rows stand for all where that has been seen to hold: the model gives them what it gave them among all, and the losses of two
parts of the rows have the recorded loss as their mean or as their sum. Else all rows are taken.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from secondorder._tape import CriterionArguments, ForwardState, LossCall
from secondorder._tensors import host_numbers
from secondorder.criteria import KnownForm, known_form, row_masses
from secondorder.stepping.gauss_newton_product import GraphQuadratic, OutputCurvature, differentiable_twice
from secondorder.stepping.linear_chain import LinearChain

# Fewer say too little about a batch's loss for a step to be judged by them; where an instance has one output, as in regression, a
# hundred miss the few that are far off.
LEAST_INSTANCES = 100
LEAST_OUTPUTS = 500
# So many rows of a net's output say whether its record is of the parameters at hand.
_COMPARED_ROWS = 16


@dataclass(frozen=True)
class Rows:
    """Some of the rows of a criterion's arguments."""

    keep: Tensor  # their indices
    count: int  # of all
    scale: float  # the loss of these rows times this estimates that of all

    def of(self, leaf: Any) -> Any:
        """The rows of a tensor that has as many; anything else as it is."""
        return leaf[self.keep] if isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == self.count else leaf


def chosen_rows(
    criterion: nn.Module, arguments: CriterionArguments, recorded: Tensor, fraction: float, offset: int
) -> Rows | None:
    """Rows whose loss stands for that of all; None: there are too few to choose from, or they do not make up the loss.

    Waits for the device once; for cross-entropy twice, and three times where targets are ignored.

    Args:
        criterion: evaluated on the chosen rows and on the others.
        arguments: of its recorded call.
        recorded: what it gave.
        fraction: of the rows that count, in (0, 1]; but at least 100, and as many as have 500 outputs, or all.
        offset: which: every (1 / fraction)-th from this one on.
    """
    tensors = arguments.tensors()
    if not tensors or tensors[0].dim() == 0 or any(len(t) != len(tensors[0]) for t in tensors if t.dim() > 0):
        return None
    count, device = len(tensors[0]), tensors[0].device
    args, kwargs = arguments.args, arguments.kwargs
    masses = row_masses(criterion, *args, **kwargs)
    counted = torch.arange(count, device=device) if masses is None else masses.nonzero().flatten()
    least = max(LEAST_INSTANCES, math.ceil(LEAST_OUTPUTS * count / max(1, tensors[0].numel())))
    stride = max(1, min(round(1 / fraction), len(counted) // least))
    if stride == 1:
        return None
    first = offset % stride
    kept = counted[first::stride]
    # The others that count: each block of stride - 1 lies one further on than the block before it.
    places = torch.arange(len(counted) - len(kept), device=device)
    others = counted[places + (places - first).div(stride - 1, rounding_mode="floor") + 1]
    parts = [Rows(keep, count, 1.0) for keep in (kept, others)]
    weights: list[Tensor | float] = [float(len(part.keep)) if masses is None else masses[part.keep].sum() for part in parts]
    try:
        with torch.no_grad(), undisturbed(criterion):
            found = [_called(criterion, tree_map(part.of, (args, kwargs))) for part in parts]
    except Exception:  # a criterion of one's own that takes whole batches alone
        return None
    own, other, loss, w, v = host_numbers([*found, recorded, *weights])
    total = w + v
    if not total > 0:
        return None
    tolerance = tolerance_of(tensors) * (abs(own) + abs(other) + abs(loss))
    if abs((w * own + v * other) / total - loss) <= tolerance:
        return parts[0]
    if abs(own + other - loss) <= tolerance:
        return Rows(parts[0].keep, count, total / w)
    return None


def tolerance_of(tensors: list[Tensor]) -> float:
    """What rounding may change in a loss of these tensors, relative to its terms."""
    return max((10 * torch.finfo(t.dtype).eps ** 0.75 for t in tensors if t.is_floating_point()), default=0.0)


class RecordedLoss:
    """A recorded loss as a function of the parameters, times its factor.

    Args:
        call: the record.
        criterion: of the call.
        rows: those that stand for all; None: all.
    """

    faithful = True  # whether the evaluations give what was recorded; known once `start` is

    def __init__(self, call: LossCall, criterion: nn.Module, rows: Rows | None):
        assert call.arguments is not None
        self.arguments, self.criterion, self.rows = call.arguments, criterion, rows
        self.scale = (1.0 if call.scale is None else float(call.scale)) * (1.0 if rows is None else rows.scale)

    def start(self) -> float:
        """The loss at the parameters' own values."""
        raise NotImplementedError

    def value(self, parameters: list[Tensor]) -> float:
        """The loss at these."""
        raise NotImplementedError

    def products(self, vectors: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
        """x_k^T g [k] and x_k^T G x_l [k, k], for vectors x_k of the parameters' shapes, in float64 on the CPU."""
        raise NotImplementedError

    def _scaled(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return self.scale * first, abs(self.scale) * second  # a loss that is maximised has a negative factor

    def _loss(self, tensors: list[Tensor]) -> Tensor:
        """The criterion at other trained arguments, for the kept rows of everything else."""
        args, kwargs = self.arguments.replaced(tensors, None if self.rows is None else self.rows.of)
        with undisturbed(self.criterion):
            loss: Tensor = self.criterion(*args, **kwargs)
        return loss

    def _known(self, tensors: list[Tensor]) -> KnownForm:
        """What is known of the criterion's Hessian at its one trained argument."""
        if len(tensors) != 1 or self.arguments.trained != [0]:
            return None
        args, kwargs = self.arguments.replaced([tensors[0].detach()], None if self.rows is None else self.rows.of)
        return known_form(self.criterion, *args, **kwargs)


class ChainLoss(RecordedLoss):
    """One whose net is a `LinearChain`: nothing but the criterion is evaluated again."""

    def __init__(self, call: LossCall, criterion: nn.Module, rows: Rows | None, chain: LinearChain, here: list[Tensor]):
        assert call.arguments is not None
        assert call.arguments.from_layer is not None
        way, (argument,) = call.arguments.from_layer, call.arguments.tensors()
        whole_rows = way.by_rows and argument.dim() > 0 and len(argument) > 0 and len(chain.output) % len(argument) == 0
        super().__init__(call, criterion, rows if whole_rows else None)
        self.way = way
        self.chain = chain if self.rows is None else chain.rows(self.rows.keep, len(argument))
        # Under autocast, and with bfloat16 parameters, what was recorded is rounded more than what is evaluated.
        self._rounded = argument.dtype != self.chain.output.dtype
        self._output = self.chain.value(here) if self._rounded else self.chain.output
        some = slice(None, None, math.ceil(len(chain.output) / _COMPARED_ROWS) or 1)
        self._compared = chain.value(here, some), chain.output[some]
        (source,) = call.sources
        made = [] if source.output is None else [source.output]
        self._tolerance = tolerance_of([argument, *here, *made, *(each.input for each in source.upstream())])
        self._recorded = call.loss
        self._curvature: OutputCurvature | None = None
        self._start = math.nan

    def start(self) -> float:
        """The loss at the parameters' own values."""
        self._at_output()
        return self._start

    def value(self, parameters: list[Tensor]) -> float:
        """The loss at these."""
        with torch.no_grad():
            return self.scale * float(self._loss([self._argument(self.chain.value(parameters))]))

    def products(self, vectors: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
        """x_k^T g [k] and x_k^T G x_l [k, k], for vectors x_k of the parameters' shapes, in float64 on the CPU."""
        curvature, tangents = self._at_output(), self.chain.tangents(vectors)
        (gradient,) = curvature.gradients
        first = tangents.flatten(1) @ gradient.flatten()
        return self._scaled(first.double().cpu(), curvature.form([[t.reshape(gradient.shape)] for t in tangents]))

    def _argument(self, z: Tensor) -> Tensor:
        if not self.way.by_rows:  # a piece of a graph knows the shape that the output had
            z = z.reshape(self.way.input_shape)
        return self.way(z)

    def _at_output(self) -> OutputCurvature:
        if self._curvature is None:
            with torch.enable_grad():
                leaf = self._output.detach().requires_grad_()
                output = leaf.view_as(leaf)
                argument = self._argument(output)
                loss = self._loss([argument])
                known = self._known([argument])
                if known != "convex" and not (self.way.by_rows and argument.shape[-1:] == output.shape[-1:]):
                    known = None
                assert output.grad_fn is not None
                assert argument.grad_fn is not None
                inner = [] if self.way.affine else [GradientEdge(argument.grad_fn, argument.output_nr)]
                self._curvature = OutputCurvature(loss, [GradientEdge(output.grad_fn, 0)], known, inner)
            self._compare(loss.detach())
        return self._curvature

    def _compare(self, loss: Tensor) -> None:
        """Sets what the loss is at the parameters' own values, and whether output and loss are those recorded."""
        again, recorded = (loss, self._recorded) if self.rows is None else (0.0, 0.0)
        if self._rounded and self.rows is None:
            with torch.no_grad():
                again = self._loss(self.arguments.tensors())
        output, before = self._compared
        change = [(output - before).abs().max(), before.abs().max()] if output.numel() else [0.0, 0.0]
        start, now, then, difference, size = host_numbers([loss, again, recorded, *change])
        self._start = self.scale * start
        # What is not finite is left to the step's own check.
        other = difference > self._tolerance * size or abs(now - then) > self._tolerance * abs(then)
        self.faithful = not other


class ReplayedLoss(RecordedLoss):
    """One that takes the model and the criterion to evaluate, from the state that the forward pass began with.

    Args:
        model: the recorded model.
        here: the parameters, with their names in the model.
        muted: within it the tape records nothing.

    Raises:
        RuntimeError: the model cannot be evaluated again.
    """

    def __init__(
        self, call: LossCall, criterion: nn.Module, rows: Rows | None, model: nn.Module, here: dict[Tensor, str],
        muted: Callable[[], Any],
    ):  # fmt: skip
        super().__init__(call, criterion, rows)
        self.model, self.names, self.muted = model, list(here.values()), muted
        assert self.arguments.model is not None
        recorded = self.arguments.tensors()
        if rows is not None:
            first = next((t for t in tree_leaves((self.arguments.model.args, self.arguments.model.kwargs)) if _has_rows(t)), None)
            by_rows = all(way.by_rows for _, way in self.arguments.from_model)
            if not by_rows or first is None or len(first) != rows.count or call.instances not in (None, rows.count):
                raise RuntimeError("the rows of the loss are not those of the model's input")
        self._leaves = [p.detach().requires_grad_() for p in here]
        with torch.enable_grad():
            tensors, loss = self._evaluated(self._leaves)
        expected = [t if rows is None else rows.of(t) for t in recorded]
        tolerance = tolerance_of([*recorded, *self._leaves])
        same = all(a.shape == b.shape and _close(a.detach(), b, tolerance) for a, b in zip(tensors, expected, strict=True))
        self.faithful = same and (rows is not None or _close(loss.detach(), call.loss, tolerance))
        self._tensors, self._graph = tensors, loss
        self._quadratic: GraphQuadratic | None = None

    def start(self) -> float:
        """The loss at the parameters' own values."""
        return self.scale * float(self._graph.detach())

    def value(self, parameters: list[Tensor]) -> float:
        """The loss at these."""
        with torch.no_grad():
            return self.scale * float(self._evaluated(parameters)[1])

    def products(self, vectors: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
        """x_k^T g [k] and x_k^T G x_l [k, k], for vectors x_k of the parameters' shapes, in float64 on the CPU."""
        if self._quadratic is None:
            with self.muted():
                self._quadratic = GraphQuadratic(self._graph, self._tensors, self._leaves, self._known(self._tensors))
        with self.muted():
            return self._scaled(*self._quadratic.products(vectors))

    def _evaluated(self, parameters: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The criterion's trained arguments, and the loss."""
        call = self.arguments.model
        assert call is not None
        given = (call.args, call.kwargs) if self.rows is None else tree_map(self.rows.of, (call.args, call.kwargs))
        values = {name: call.state.buffer(buffer) for name, buffer in self.model.named_buffers()}
        values |= dict(zip(self.names, parameters, strict=True))
        with self.muted(), call.state.restored(), differentiable_twice(self.model):
            leaves = tree_leaves(functional_call(self.model, values, *given))
            tensors = [way(leaves[position]) for position, way in self.arguments.from_model]
            return tensors, self._loss(tensors)


def undisturbed(criterion: nn.Module) -> AbstractContextManager[None]:
    """Within it calls of a criterion leave its buffers as they are, where it may write to them; torch's own do not."""
    if type(criterion).__module__.startswith("torch.nn.") or next(criterion.buffers(), None) is None:
        return nullcontext()
    return ForwardState(criterion).restored(buffers=True)


def _called(criterion: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    loss: Tensor = criterion(*arguments[0], **arguments[1])
    if loss.numel() != 1:
        raise ValueError(f"expected a loss of one element, got {list(loss.shape)}")
    return loss


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether they differ by no more than rounding; what is not finite is left to the step's own check."""
    if not bool(b.isfinite().all()):
        return True
    return float((a.double() - b.double()).abs().max()) <= tolerance * float(b.double().abs().max()) if b.numel() else True
