"""What was recorded of one layer over all instances since the last step: its calls joined, and what follows it."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secondorder._layers import parameters_of
from secondorder._tape import elementwise
from secondorder._tape.elementwise import ElementwiseMap
from secondorder._tape.records import Counting, LayerCall, Link, LossCall, as_weighted
from secondorder._tensors import compute_dtype, flatten_batch


@dataclass(eq=False, slots=True)
class LayerRecord:
    """One linear layer over all instances since the last step: the union of its calls' batches."""

    layer: nn.Linear
    weight: nn.Parameter
    dtype: torch.dtype  # of H: the weight's, at least float32
    calls: list[LayerCall] = field(default_factory=list)
    origins: list[LossCall] = field(default_factory=list)  # the loss that each call is part of
    consumers: list["Link | LossCall"] = field(default_factory=list)  # of the calls' outputs
    next: "LayerRecord | None" = None  # the layer that takes this one's output, elementwise transformed
    links: list[Link] = field(default_factory=list)  # to `next`, one per call
    losses: list[LossCall] = field(default_factory=list)  # or the criterion does, in these calls
    obstacle: str = ""  # or neither, for this reason
    block: Tensor | None = None  # sum of the losses' blocks, each with its factor
    samples: int | None = None  # the curvature's expectations take at most so many instances of each call
    _known_countings: list[Counting] | None = None

    @property
    def without_columns(self) -> bool:
        """Tells whether the losses have no columns for it, since their Hessian is zero."""
        return self.block is None and any(loss.flat for loss in self.origins)

    @property
    def instances(self) -> int:
        """Returns how many rows the calls have together."""
        return sum(self._row_counts())

    def input(self, samples: int | None = None) -> Tensor:
        """Returns the inputs h [m, n_in] of the rows that count, or those of at most `samples` of them of each call.

        Where rows have weights, other rows whose plain mean and second moment are the weighted ones of these.
        """
        rows, weights = flatten_batch(self._of_rows([call.input for call in self.calls]), samples), self._weights(samples)
        return rows if weights is None else as_weighted(rows, weights)

    @property
    def counted(self) -> float:
        """Returns how many rows count, or the sum of their weights."""
        pairs = zip(self._row_counts(), self._countings(), strict=True)
        return sum(n if each.total is None else each.total for n, each in pairs)

    @property
    def weighted(self) -> bool:
        """Tells whether the rows that count do not all count alike."""
        return any(each.weights is not None for each in self._countings())

    def grad_outputs(self) -> list[tuple[Tensor, LossCall]]:
        """Returns each call's delta [..., n_out], with its loss; they are kept with an obstacle, or where the tape is told to."""
        pairs = zip(self.calls, self.origins, strict=True)
        return [(call.grad_output, loss) for call, loss in pairs if call.grad_output is not None]

    def map(self) -> ElementwiseMap:
        """Returns what lies between this layer and `next`, over the rows that count [m, n_out].

        Where these have weights, E[d1 d1^T] is the weighted one; d2 stands with gradients, which hold the weights.
        """
        maps = [link.map for link in self.links if link.map is not None]
        pairs = zip(maps, self._countings(), strict=True)
        maps = [each if rows.kept is None else elementwise.of_rows(each, rows.kept) for each, rows in pairs]
        merged, weights = elementwise.merge(maps, self.samples), self._weights(self.samples)
        return merged if weights is None else elementwise.weighted(merged, weights)

    def grad_activation(self) -> Tensor | None:
        """Returns the gradient w.r.t. the input of `next` [m, n_out], whose sum stands for all rows; None where sigma'' = 0."""
        grads = [link.grad for link in self.links if link.grad is not None]
        if len(grads) < len(self.links):
            return None
        pairs = zip(self._of_rows(grads), self._countings(), strict=True)
        return flatten_batch([_for_all(grad, rows, self.samples) for grad, rows in pairs])

    def _row_counts(self) -> list[int]:
        """Returns how many rows every call has."""
        return [call.input.shape[:-1].numel() for call in self.calls]

    def _countings(self) -> list[Counting]:
        """Tells which rows of every call count, those of no ignored target, and how much; all alike where none of any does."""
        if self._known_countings is None:
            pairs = zip(self.calls, self.origins, strict=True)
            found = [loss.counting(call.input.shape[:-1]) for call, loss in pairs]
            self._known_countings = [Counting(total=0.0)] * len(found) if all(each.total == 0 for each in found) else found
        return self._known_countings

    def _of_rows(self, tensors: list[Tensor]) -> list[Tensor]:
        """Returns the rows that count, of a tensor [..., n] of every call."""
        return [rows.of_rows(t) for t, rows in zip(tensors, self._countings(), strict=True)]

    def _weights(self, samples: int | None) -> Tensor | None:
        """Returns the weights [m] of the rows that count, or of at most `samples` of them of each call; None: all count alike."""
        if not self.weighted:
            return None
        own = [
            torch.ones(n if rows.kept is None else len(rows.kept), dtype=torch.float64, device=call.input.device)
            if rows.weights is None else rows.weights
            for n, call, rows in zip(self._row_counts(), self.calls, self._countings(), strict=True)
        ]  # fmt: skip
        return flatten_batch([each.unsqueeze(1) for each in own], samples).squeeze(1)


def joined(
    losses: list[LossCall], names: Mapping[nn.Linear, str], left_out: Container[nn.Linear], samples: int | None
) -> list[LayerRecord]:
    """Returns the records of the layers that losses depend on, in the recursion's order.

    Args:
        losses: those that backward passes have gone through.
        names: of the layers, for the error.
        left_out: layers without a record.
        samples: the curvature's expectations take at most so many instances of each call; None: all.

    Raises:
        RuntimeError: a layer's input has been written to since the forward pass.
    """
    records: dict[nn.Linear, LayerRecord] = {}
    seen: set[LayerCall] = set()
    for loss in losses:
        stack: list[tuple[LayerCall, Link | LossCall]] = [(source, loss) for source in loss.sources]
        while stack:
            call, consumer = stack.pop()
            if call.layer not in records:
                weight, _ = parameters_of(call.layer)
                records[call.layer] = LayerRecord(call.layer, weight, compute_dtype(weight.dtype), samples=samples)
            record = records[call.layer]
            record.consumers.append(consumer)
            if call in seen:
                continue
            seen.add(call)
            if call.overwritten:
                raise RuntimeError(
                    f"expected the input of layer {names[call.layer]!r} as the forward pass has seen it, but it "
                    "has been written to since: give each micro-batch a tensor of its own, and write to none before step()"
                )
            record.calls.append(call)
            record.origins.append(loss)
            stack += [(link.source, link) for link in call.inputs_from]
    records = {layer: record for layer, record in records.items() if layer not in left_out}
    for loss in losses:
        for call, block in loss.blocks.items():
            if call.layer in records:
                record = records[call.layer]
                block = block if loss.scale is None else block * loss.scale.abs()  # a metric, also of a loss that is maximised
                record.block = block if record.block is None else record.block + block
    repeated = set().union(*(loss.repeated for loss in losses))
    for record in records.values():
        _connect(record, records, record.layer in repeated)
    return _recursion_order(records)


def _connect(record: LayerRecord, records: dict[nn.Linear, LayerRecord], repeated: bool) -> None:
    """Sets what follows a record, from the consumers of its calls; nothing where the layer is `repeated` for a loss."""
    if repeated:
        record.obstacle = "is computed several times for a loss"
        return
    consumers = record.consumers
    links = [c for c in consumers if isinstance(c, Link)]
    if not links:
        record.losses = [c for c in consumers if isinstance(c, LossCall)]
        # Several losses of one output add up, and so do their Hessians; one that is zero adds nothing.
        curved = [loss for loss in record.losses if not loss.flat]
        if record.losses and not curved:
            record.losses = []
            record.obstacle = "enters a criterion whose Hessian is zero, or is in sum over instances that it compares"
        elif any(loss.hessian is None for loss in curved):
            record.losses, record.obstacle = [], "enters the criterion together with other linear layers' outputs"
        else:
            record.losses = curved
    elif len(consumers) > len(record.calls) or len(links) < len(consumers) or len({link.target for link in links}) > 1:
        record.obstacle = "is used in several places"
    elif any(link.map is None for link in links):
        record.obstacle = next(link.obstacle for link in links if link.map is None)
    else:
        record.next, record.links = records[links[0].target], links


def _recursion_order(records: dict[nn.Linear, LayerRecord]) -> list[LayerRecord]:
    """Returns each record after that of the layer which takes its output."""
    ordered: dict[LayerRecord, None] = {}
    for record in records.values():
        chain = []
        current: LayerRecord | None = record
        while current is not None and current not in ordered:
            chain.append(current)
            current = current.next
        for each in reversed(chain):
            ordered[each] = None
    return list(ordered)


def _for_all(gradient: Tensor, counting: Counting, samples: int | None) -> Tensor:
    """Returns the `subsample` of a gradient [..., n] of rows that count, scaled so that its sum stands for that over all."""
    if samples is None:
        return gradient
    factor = counting.share(gradient.shape[:-1].numel(), samples)
    chosen = flatten_batch([gradient], samples)
    return chosen if isinstance(factor, float) and factor == 1 else chosen * factor
