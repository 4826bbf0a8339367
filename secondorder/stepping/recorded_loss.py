"""One recorded loss, evaluated anew at other parameters: from the record of its layers alone, or by the model and the criterion.

Some rows stand for all where that has been seen to hold: the model gives them what it gave them among all, and the losses of two
parts of the rows have the recorded loss as their mean or as their sum. Else all rows are taken.
"""

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from secondorder._tape import CriterionArguments, ForwardState, LossCall
from secondorder._tensors import Later, Transfer
from secondorder.criteria.hessians import KnownForm, known_form
from secondorder.criteria.known import row_masses
from secondorder.stepping.gauss_newton_product import GraphQuadratic, OutputCurvature, differentiable_twice
from secondorder.stepping.linear_chain import LinearChain

# A subsample has at least so many instances, and instances with so many outputs: fewer say too little about a batch's loss for a
# step to be judged by them. Of regression's instances, with one output each, a hundred would miss the few that are far off.
LEAST_INSTANCES = 100
LEAST_OUTPUTS = 500
# So many rows of a net's output are evaluated again to see whether its record is of the present parameters.
_COMPARED_ROWS = 16


@dataclass(frozen=True)
class Rows:
    """Divides the rows of a criterion's arguments into those that are kept and the others."""

    keep: Tensor  # their indices
    others: Tensor  # those of the others that count
    count: int  # of all
    weights: list[Tensor | float]  # of these and of the others in a mean

    def of(self, leaf: Any) -> Any:
        """Returns the kept rows of a tensor that has as many rows as there are; anything else as it is."""
        return self._taken(leaf, self.keep)

    def not_of(self, leaf: Any) -> Any:
        """Returns the other rows of such a tensor; anything else as it is."""
        return self._taken(leaf, self.others)

    def _taken(self, leaf: Any, places: Tensor) -> Any:
        return leaf[places] if isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == self.count else leaf


def chosen_rows(criterion: nn.Module, arguments: CriterionArguments, fraction: float, offset: int) -> Rows | None:
    """Chooses rows whose loss may stand for that of all, or returns None if there are too few to choose from.

    Waits for the device for cross-entropy alone: once, and once more where targets are ignored.

    Args:
        criterion: called on them.
        arguments: of its recorded call.
        fraction: of the rows that count, in (0, 1]; but at least 100, and as many as have 500 outputs, or all.
        offset: which: every (1 / fraction)-th from this one on.
    """
    tensors = arguments.tensors()
    if not tensors or tensors[0].dim() == 0 or any(len(t) != len(tensors[0]) for t in tensors if t.dim() > 0):
        return None
    count, device = len(tensors[0]), tensors[0].device
    masses = row_masses(criterion, *arguments.args, **arguments.kwargs)
    counted = torch.arange(count, device=device) if masses is None else masses.nonzero().flatten()
    least = max(LEAST_INSTANCES, math.ceil(LEAST_OUTPUTS * count / max(1, tensors[0].numel())))
    stride = max(1, min(round(1 / fraction), len(counted) // least))
    if stride == 1:
        return None
    first = offset % stride
    kept = counted[first::stride]
    # The others that count, place by place: after every stride - 1 of them, one that is kept is skipped.
    places = torch.arange(len(counted) - len(kept), device=device)
    others = counted[places + (places - first).div(stride - 1, rounding_mode="floor") + 1]
    weights: list[Tensor | float] = [float(len(part)) if masses is None else masses[part].sum() for part in (kept, others)]
    return Rows(kept, others, count, weights)


def tolerance_of(tensors: list[Tensor]) -> float:
    """Returns by how much rounding may change a loss of these tensors, relative to its terms."""
    return max((10 * torch.finfo(t.dtype).eps ** 0.75 for t in tensors if t.is_floating_point()), default=0.0)


class AtStart(NamedTuple):
    """Holds what a recorded loss is at the parameters' own values."""

    value: float  # of the rows, or of all
    factor: float  # by which values are multiplied
    stands: bool  # whether the rows, if it is of some, stand for all
    same: bool  # whether the evaluations give what was recorded


class RecordedLoss:
    """A recorded loss as a function of the parameters, times its factor.

    Args:
        call: the record.
        criterion: of the call.
        rows: those that are to stand for all; None: all.
    """

    _numbers: Later[list[float]]
    _tolerance: float

    def __init__(self, call: LossCall, criterion: nn.Module, rows: Rows | None):
        assert call.arguments is not None
        self.call, self.arguments, self.criterion, self.rows = call, call.arguments, criterion, rows

    @functools.cached_property
    def at_start(self) -> AtStart:
        """Returns what it is at the parameters' own values."""
        value, factor, *numbers = self._numbers()
        share: float | None = 1.0
        if self.rows is not None:
            rest, recorded, own_weight, other_weight, *numbers = numbers
            share = _share((value, rest), (own_weight, other_weight), recorded, tolerance_of(self.arguments.tensors()))
        # What is not finite is left to the step's own check.
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        same = all(difference <= self._tolerance * size for difference, size in pairs if math.isfinite(size))
        return AtStart(value, factor * (1.0 if share is None else share), share is not None, same)

    @property
    def start(self) -> float:
        """Returns the loss at the parameters' own values."""
        return self.at_start.factor * self.at_start.value

    @property
    def faithful(self) -> bool:
        """Tells whether the evaluations give what was recorded."""
        return self.at_start.same

    @property
    def stands(self) -> bool:
        """Tells whether its rows stand for all."""
        return self.at_start.stands

    def value(self, parameters: list[Tensor]) -> Tensor:
        """Returns the loss at these parameters, [] in float64."""
        raise NotImplementedError

    def products(self, vectors: list[list[Tensor]], transfer: Transfer) -> Later[tuple[Tensor, Tensor]]:
        """Returns what gives x_k^T g [k] and x_k^T G x_l [k, k], in float64 on the CPU; x_k have the parameters' shapes."""
        raise NotImplementedError

    def _scaled(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        factor = self.at_start.factor
        return factor * first, abs(factor) * second  # a loss that is maximised has a negative factor

    def _compare(self, loss: Tensor, pairs: list[tuple[Tensor, Tensor]], tolerance: float, transfer: Transfer) -> None:
        """Starts to bring the numbers that `at_start` uses.

        Args:
            loss: at the parameters' own values.
            pairs: what has been evaluated again, with its record.
            tolerance: what rounding may change in it.
            transfer: what they are brought with.
        """
        numbers: list[Tensor | float] = [loss, 1.0 if self.call.scale is None else self.call.scale]
        if self.rows is not None:
            with torch.no_grad(), undisturbed(self.criterion):
                args, kwargs = tree_map(self.rows.not_of, (self.arguments.args, self.arguments.kwargs))
                rest = self.criterion(*args, **kwargs)
            numbers += [rest, self.call.loss, *self.rows.weights]
        for again, before in pairs:
            if before.numel():
                numbers += [(again.detach() - before).abs().max(), before.abs().max()]
        self._numbers, self._tolerance = transfer.numbers(numbers), tolerance

    def _loss(self, tensors: list[Tensor]) -> Tensor:
        """Evaluates the criterion at other trained arguments, with the kept rows of all others."""
        args, kwargs = self.arguments.replaced(tensors, None if self.rows is None else self.rows.of)
        with undisturbed(self.criterion):
            loss: Tensor = self.criterion(*args, **kwargs)
        return loss

    def _known(self, tensors: list[Tensor]) -> KnownForm:
        """Returns what is known of the criterion's Hessian at its one trained argument."""
        if len(tensors) != 1 or self.arguments.trained != [0]:
            return None
        args, kwargs = self.arguments.replaced([tensors[0].detach()], None if self.rows is None else self.rows.of)
        return known_form(self.criterion, *args, **kwargs)


class ChainLoss(RecordedLoss):
    """A recorded loss whose net is a `LinearChain`: only the criterion is evaluated again."""

    def __init__(
        self, call: LossCall, criterion: nn.Module, rows: Rows | None, chain: LinearChain, here: list[Tensor],
        transfer: Transfer,
    ):  # fmt: skip
        assert call.arguments is not None
        assert call.arguments.from_layer is not None
        way, (argument,) = call.arguments.from_layer, call.arguments.tensors()
        whole_rows = way.by_rows and argument.dim() > 0 and len(argument) > 0 and len(chain.output) % len(argument) == 0
        super().__init__(call, criterion, rows if whole_rows else None)
        self.way = way
        self.chain = chain if self.rows is None else chain.rows(self.rows.keep, len(argument))
        # Under autocast, and with bfloat16 parameters, what was recorded is rounded more than what is evaluated.
        rounded = argument.dtype != self.chain.output.dtype
        output = self.chain.value(here) if rounded else self.chain.output
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            self._output = leaf.view_as(leaf)
            self._argument = self._to_argument(self._output)
            self._graph = self._loss([self._argument])
        some = slice(None, None, math.ceil(len(chain.output) / _COMPARED_ROWS) or 1)
        pairs = [(chain.value(here, some), chain.output[some])]
        if self.rows is None:
            with torch.no_grad():
                pairs.append((self._loss(self.arguments.tensors()) if rounded else self._graph, call.loss))
        (source,) = call.sources
        made = [] if source.output is None else [source.output]
        tolerance = tolerance_of([argument, *here, *made, *(each.input for each in source.upstream())])
        self._compare(self._graph, pairs, tolerance, transfer)

    def value(self, parameters: list[Tensor]) -> Tensor:
        """Returns the loss at these parameters, [] in float64."""
        with torch.no_grad():
            return self.at_start.factor * self._loss([self._to_argument(self.chain.value(parameters))]).reshape(()).double()

    def products(self, vectors: list[list[Tensor]], transfer: Transfer) -> Later[tuple[Tensor, Tensor]]:
        """Returns what gives x_k^T g [k] and x_k^T G x_l [k, k], in float64 on the CPU; x_k have the parameters' shapes."""
        curvature, tangents = self._curvature, self.chain.tangents(vectors)
        (gradient,) = curvature.gradients
        first = transfer.later(tangents.flatten(1) @ gradient.flatten())
        form = curvature.form([[t.reshape(gradient.shape)] for t in tangents], transfer)
        return lambda: self._scaled(first(), form())

    def _to_argument(self, z: Tensor) -> Tensor:
        """Returns the criterion's argument, from the output of the last layer."""
        if not self.way.by_rows:  # a piece of a graph knows the shape that the output had
            z = z.reshape(self.way.input_shape)
        return self.way(z)

    @functools.cached_property
    def _curvature(self) -> OutputCurvature:
        """Returns the curvature of the criterion at the last layer's output."""
        output, argument = self._output, self._argument
        known = self._known([argument])
        if known != "convex" and not (self.way.by_rows and argument.shape[-1:] == output.shape[-1:]):
            known = None
        assert output.grad_fn is not None
        assert argument.grad_fn is not None
        inner = [] if self.way.affine else [GradientEdge(argument.grad_fn, argument.output_nr)]
        return OutputCurvature(self._graph, [GradientEdge(output.grad_fn, 0)], known, inner)


class ReplayedLoss(RecordedLoss):
    """A recorded loss for which the model and the criterion are called again, from the state that the forward pass began with.

    Args:
        model: the recorded model.
        here: the parameters.
        muted: within it the tape records nothing.
        transfer: what its numbers come to the host with.

    Raises:
        RuntimeError: the model cannot be evaluated again.
    """

    def __init__(
        self, call: LossCall, criterion: nn.Module, rows: Rows | None, model: nn.Module, here: list[Tensor],
        muted: Callable[[], Any], transfer: Transfer,
    ):  # fmt: skip
        super().__init__(call, criterion, rows)
        self.model, self.muted = model, muted
        self._here, self._places = here, _places(model)
        assert self.arguments.model is not None
        recorded = self.arguments.tensors()
        if rows is not None:
            first = next((t for t in tree_leaves((self.arguments.model.args, self.arguments.model.kwargs)) if _has_rows(t)), None)
            by_rows = all(way.by_rows for _, way in self.arguments.from_model)
            if not by_rows or first is None or len(first) != rows.count or call.instances not in (None, rows.count):
                raise RuntimeError("the rows of the loss are not those of the model's input")
        self._leaves = [p.detach().requires_grad_() for p in here]
        tensors, loss = self._evaluated(self._leaves)
        pairs = list(zip(tensors, recorded if rows is None else map(rows.of, recorded), strict=True))
        self._same_shapes = all(again.shape == before.shape for again, before in pairs)
        if rows is None:
            pairs.append((loss, call.loss))
        self._compare(loss, pairs if self._same_shapes else [], tolerance_of([*recorded, *self._leaves]), transfer)
        self._tensors, self._graph = tensors, loss
        self._quadratic: GraphQuadratic | None = None

    @property
    def faithful(self) -> bool:
        """Tells whether the evaluations give what was recorded."""
        return self._same_shapes and super().faithful

    @property
    def stands(self) -> bool:
        """Tells whether its rows stand for all, and those of the model's input, too."""
        return self.faithful and super().stands

    def value(self, parameters: list[Tensor]) -> Tensor:
        """Returns the loss at these parameters, [] in float64."""
        return self.at_start.factor * self._evaluated(parameters)[1].detach().reshape(()).double()

    def products(self, vectors: list[list[Tensor]], transfer: Transfer) -> Later[tuple[Tensor, Tensor]]:
        """Returns what gives x_k^T g [k] and x_k^T G x_l [k, k], in float64 on the CPU; x_k have the parameters' shapes."""
        if self._quadratic is None:
            with self.muted():
                self._quadratic = GraphQuadratic(self._graph, self._tensors, self._leaves, self._known(self._tensors))
        with self.muted():
            found = self._quadratic.products(vectors, transfer)
        return lambda: self._scaled(*found())

    def _evaluated(self, parameters: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Returns the criterion's trained arguments and the loss."""
        call = self.arguments.model
        assert call is not None
        given = (call.args, call.kwargs) if self.rows is None else tree_map(self.rows.of, (call.args, call.kwargs))
        values = {buffer: call.state.buffer(buffer) for buffer in self.model.buffers()}
        values |= dict(zip(self._here, parameters, strict=True))
        by_name = {name: values[t] for name, t in self._places.items() if t in values}
        # A model may differentiate by its input, so that gradients are enabled also where none is wanted of the parameters.
        with self.muted(), call.state.restored(), differentiable_twice(self.model), torch.enable_grad():
            leaves = tree_leaves(functional_call(self.model, by_name, *given, tie_weights=False))
            tensors = [way(leaves[position]) for position, way in self.arguments.from_model]
            return tensors, self._loss(tensors)


def undisturbed(criterion: nn.Module) -> AbstractContextManager[None]:
    """Has calls of a criterion within it leave its buffers as they are; torch's own criteria never write to theirs."""
    if type(criterion).__module__.startswith("torch.nn.") or next(criterion.buffers(), None) is None:
        return nullcontext()
    return ForwardState(criterion).restored(buffers=True)


def _share(values: tuple[float, float], weights: tuple[float, float], whole: float, relative_tolerance: float) -> float | None:
    """Returns by what the loss of some rows is multiplied to stand for that of all; None: it cannot stand for it.

    Args:
        values: the loss of these rows, and that of the others.
        weights: how much both count in a mean.
        whole: the loss of all.
        relative_tolerance: what rounding may change in a term.
    """
    (own, other), (own_weight, other_weight) = values, weights
    total = own_weight + other_weight
    if not total > 0:
        return None
    tolerance = relative_tolerance * (abs(own) + abs(other) + abs(whole))
    if abs((own_weight * own + other_weight * other) / total - whole) <= tolerance:
        return 1.0
    if abs(own + other - whole) <= tolerance:
        return total / own_weight
    return None


def _places(model: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters and buffers by their names, one for each module that has them.

    A module that a model has under two names, as nn.Sequential(layer, nn.Tanh(), layer) does, is there once: functional_call
    would give it values twice, and leave the first ones there in the end.
    """
    return {
        f"{prefix}.{name}".removeprefix("."): t
        for prefix, module in model.named_modules()
        for name, t in (*module._parameters.items(), *module._buffers.items())
        if t is not None
    }


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0
