"""What is recorded of one call: of a linear layer, of the model, of the criterion.

Masses are what the elements of a criterion's target weigh, 0 if they are ignored (see `criteria.element_masses`). Where they
belong to the rows of a layer, these count by them: `Counting` has the rows whose mass is not 0, and their weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from secondorder._tape.elementwise import ElementwiseMap
from secondorder._tape.forward_state import ForwardState
from secondorder._tape.graph import metadata
from secondorder._tape.ways import Way
from secondorder._tensors import flatten_batch, refuse_capture, subsample
from secondorder.criteria import OutputHessian

_RELEASED = torch.empty(0)


def version(t: Tensor) -> int:
    """Returns how often a tensor has been written to; 0 for inference tensors, which do not count it."""
    return 0 if t.is_inference() else t._version


@dataclass(eq=False, slots=True)
class LayerCall:
    """One call of a linear layer."""

    layer: nn.Linear
    input: Tensor  # [..., n_in]
    input_version: int = 0
    given: bool = False  # whether the input depends on nothing that is trained
    inputs_from: list["Link"] = field(default_factory=list)  # empty: the network's own input, or one no linear layer made
    output: Tensor | None = None  # [..., n_out], kept only until what follows is known
    output_version: int = 0
    used: bool = False  # by another layer or by the criterion
    grad_output: Tensor | None = None  # [..., n_out], kept only where `keeps_gradient`
    keeps_gradient: bool = False
    multiplied: set[Tensor] = field(default_factory=set)  # parameters in products between the layers before and the input

    def upstream(self) -> list["LayerCall"]:
        """Returns this call and all that it depends on."""
        found = dict.fromkeys([self])
        stack = [self]
        while stack:
            new = [link.source for link in stack.pop().inputs_from if link.source not in found]
            found.update(dict.fromkeys(new))
            stack += new
        return list(found)

    @property
    def overwritten(self) -> bool:
        """Tells whether the input has been written to since; a frozen layer's may be."""
        return self.layer.weight.requires_grad and version(self.input) != self.input_version

    def preactivation(self) -> Tensor:
        """Returns the preactivation z = W h + b, computed anew where an in-place activation has overwritten it."""
        if self.output is not None and self.output._version == self.output_version:
            return self.output
        with torch.no_grad():
            return nn.functional.linear(self.input, self.layer.weight, self.layer.bias)

    def clear(self, release: bool) -> None:
        """Forgets the backward passes; with `release` the forward pass, too."""
        self.grad_output = None
        for link in self.inputs_from:
            link.grad = None
            link.map = None if release else link.map
        if release:
            self.input, self.output, self.inputs_from, self.multiplied = _RELEASED, None, [], set()


def is_recorded(node: Node) -> bool:
    """Tells whether a node made the output of a recorded call of a layer."""
    return any(isinstance(value, LayerCall) for value in metadata(node).values())


def has_rows_apart(node: Node) -> bool:
    """Tells whether a node made the output of a layer of which every row is known to depend on one row of every layer before."""
    calls = [value for value in metadata(node).values() if isinstance(value, LayerCall)]
    links = [link for call in calls for each in call.upstream() for link in each.inputs_from]
    return bool(calls) and all(link.map is not None for link in links)


@dataclass(eq=False, slots=True)
class Link:
    """The way from a layer's output to the input of the next layer."""

    source: LayerCall
    target: nn.Linear  # the next layer
    map: ElementwiseMap | None  # None: not an elementwise function of this source alone; `obstacle` says why
    obstacle: str = ""
    grad: Tensor | None = None  # gradient w.r.t. the next layer's input, kept only for a curved map


@dataclass(eq=False, slots=True)
class ModelCall:
    """The arguments and the outputs of one call of the model, detached, and what else it began from."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: ForwardState
    outputs: list[Any]  # the leaves

    def release(self) -> None:
        """Forgets them: a graph that is held keeps the call itself."""
        self.args, self.kwargs, self.outputs = (), {}, []


@dataclass(eq=False, slots=True)
class CriterionArguments:
    """What the criterion was called with, and where that came from.

    The trained arguments are the tensors among them that depend on parameters, in the order of `tree_leaves`.
    """

    args: tuple[Any, ...]  # detached
    kwargs: dict[str, Any]
    trained: list[int]  # positions among the leaves of (args, kwargs)
    from_layer: Way | None  # from the output of the one source to the one trained argument
    model: ModelCall | None  # whose outputs all trained arguments come from
    from_model: list[tuple[int, Way]]  # for each the position among the leaves of that output, and the way

    def tensors(self) -> list[Tensor]:
        """Returns the trained arguments."""
        leaves = tree_leaves((self.args, self.kwargs))
        return [leaves[position] for position in self.trained]

    def replaced(self, tensors: list[Tensor], rows: Callable[[Tensor], Tensor] | None = None) -> tuple[Any, Any]:
        """Returns args and kwargs with other trained arguments, the others changed by `rows`."""
        leaves, structure = tree_flatten((self.args, self.kwargs))
        if rows is not None:
            leaves = [rows(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for position, tensor in zip(self.trained, tensors, strict=True):
            leaves[position] = tensor
        return tree_unflatten(leaves, structure)


def aligned(masses: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Returns the weights of a target's elements as weights [m] of the rows of a tensor [*shape, n].

    A row with several elements has the mean of their weights. Either of the two may be flattened, in order. None: the rows of the
    tensor are not those of the target, or there are no weights.
    """
    if masses is not None and masses.dim() > 1 and masses.numel() != shape.numel() == masses.shape[:-1].numel():
        masses = masses.mean(-1)
    if masses is None or masses.numel() != shape.numel() or not (masses.shape == shape or 1 in (masses.dim(), len(shape))):
        return None
    return masses.reshape(-1)


@dataclass(frozen=True, eq=False, slots=True)
class Counting:
    """Tells which rows of a tensor [..., n] count, and how much.

    Args:
        kept: the indices of the rows that count; None: all.
        weights: their weights in float64; None: 1 each.
        total: the sum of their weights; None: their number.
    """

    kept: Tensor | None = None
    weights: Tensor | None = None
    total: float | None = None

    @classmethod
    def of(cls, masses: Tensor | None) -> "Counting":
        """Makes it from the weights [m] of all rows; waits for the device once, and once more if some are 0."""
        if masses is None:
            return cls()
        refuse_capture("rows with weights, or ignored ones,")
        ones = masses == 1
        sums = torch.stack([masses, masses == 0, ones, masses < 0]).sum(1, dtype=torch.float64)
        total, zero, one, negative = sums.tolist()
        kept = masses.nonzero().flatten() if zero else None
        if negative or zero + one == len(masses):  # negative ones are of no expectation
            return cls(kept, None, len(masses) - zero)
        return cls(kept, masses if kept is None else masses.index_select(0, kept), total)

    def of_rows(self, t: Tensor) -> Tensor:
        """Returns the rows of a tensor [..., n] that count."""
        return t if self.kept is None else flatten_batch([t]).index_select(0, self.kept)

    def share(self, rows: int, samples: int | None) -> Tensor | float:
        """Returns the sum of all weights over that of `samples` evenly spaced rows, where `rows` rows count."""
        if samples is None or rows <= samples:
            return 1.0
        if self.weights is None:
            return rows / samples
        return self.weights.sum() / subsample(self.weights.unsqueeze(1), samples).sum()


def as_weighted(rows: Tensor, weights: Tensor) -> Tensor:
    """Returns rows [m, n] whose plain mean and second moment are the weighted ones of the rows h_i, with weights w_i / W.

    With v_i = sqrt(m w_i / W) the rows v_i h_i have that second moment, and so has every orthogonal transformation of them. The
    transformation that takes v to (1, ..., 1), a reflection and a change of sign, also gives them that mean.
    """
    v = (weights * (len(weights) / weights.sum())).sqrt()
    u = v + 1
    scaled = rows * v.to(rows.dtype).unsqueeze(1)
    along = (2 / u.dot(u) * u).to(rows.dtype) @ scaled
    return torch.addr(scaled.neg(), u.to(rows.dtype), along)


def _alike() -> None:
    """Stands for a criterion whose rows all count alike, and by whose number it divides."""


@dataclass(eq=False, slots=True)
class LossCall:
    """One call of the criterion."""

    sources: list[LayerCall]  # the layers whose outputs it sees
    hessian: OutputHessian | None  # w.r.t. the source's output; None if there are several
    loss: Tensor  # the scalar it returned, detached
    divisor: Callable[[], float | Tensor | None]  # what the sum over instances is divided by; None: their number
    flat: bool = False  # whether that Hessian is zero, as an absolute value's: then it is None
    instances: int | None = None  # rows of its sources, where they agree: a layer before a pooling has more rows than the loss
    arguments: CriterionArguments | None = None  # of the criterion, where evaluating it anew is provided for
    outside: str | None = None  # what depends on a parameter in it, but not through these arguments; None: nothing
    blocks: dict[LayerCall, Tensor] = field(default_factory=dict)  # sum of delta delta^T [n_out, n_out] over its columns
    repeated: set[nn.Linear] = field(default_factory=set)  # the layers that it uses several times
    multiplied: set[Tensor] = field(default_factory=set)  # parameters in products between these layers and it
    # Of the target's elements; called where they are needed, since that may wait for the device.
    masses: Callable[[], Tensor | None] = _alike
    normalized: bool = True  # whether a mean is divided by the sum of these, rather than by their number
    ordered: bool = True  # whether the rows of its sources come to the criterion in their order
    scale: Tensor | None = None  # d(what backward() was called on) / d(loss), summed over backward passes
    captured: bool = False  # whether a CUDA graph captured the call
    assumed: Tensor | None = None  # where it did: whether no target is ignored, by which nothing else has been decided; None: so
    released: bool = False
    _counting: Counting | None = None

    def row_masses(self, shape: torch.Size) -> Tensor | None:
        """Returns the weights [m] of the rows of a tensor [*shape, n], if these are the rows of the target.

        None: all rows count alike, or they are not the target's, as before a pooling or a transposition.
        """
        if not self.ordered or any(source.input.shape[:-1] != shape for source in self.sources):
            return None
        return aligned(self.masses(), shape)

    def counting(self, shape: torch.Size) -> Counting:
        """Tells which rows of a tensor [*shape, n] count, by `row_masses`."""
        masses = self.row_masses(shape)
        if masses is None:
            return Counting()
        if self._counting is None:  # the same for all shapes
            self._counting = Counting.of(masses)
        return self._counting

    def calls(self) -> list[LayerCall]:
        """Returns all calls of layers that it depends on."""
        if len(self.sources) == 1:
            return self.sources[0].upstream()
        return list(dict.fromkeys(call for source in self.sources for call in source.upstream()))

    def clear(self, release: bool) -> None:
        """Forgets the backward passes; with `release` the forward pass, too."""
        self.scale, self.released = None, release
        if release:
            self.masses, self.divisor, self._counting, self.assumed, self.multiplied = _alike, _alike, None, None, set()
        if release and self.arguments is not None:
            if self.arguments.model is not None:
                self.arguments.model.release()
            self.arguments = None
