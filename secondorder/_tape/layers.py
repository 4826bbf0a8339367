"""What was recorded of one layer over all instances since the last step: its calls joined, and what follows it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secondorder._tape import elementwise
from secondorder._tape.elementwise import ElementwiseMap
from secondorder._tape.records import LayerCall, Link, LossCall
from secondorder._tensors import flatten_batch


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

    @property
    def instances(self) -> int:
        """How many rows the calls have together."""
        return sum(call.input.shape[:-1].numel() for call in self.calls)

    def input(self, samples: int | None = None) -> Tensor:
        """The inputs h [m, n_in], or those of at most `samples` instances of each call."""
        return flatten_batch([call.input for call in self.calls], samples)

    def grad_outputs(self) -> list[tuple[Tensor, LossCall]]:
        """Each call's delta [..., n_out], with its loss; recorded only with an obstacle, or where the tape was told to."""
        pairs = zip(self.calls, self.origins, strict=True)
        return [(call.grad_output, loss) for call, loss in pairs if call.grad_output is not None]

    def map(self) -> ElementwiseMap:
        """What lies between this layer and `next`, over the instances [m, n_out]."""
        return elementwise.merge([link.map for link in self.links if link.map is not None], self.samples)

    def grad_activation(self) -> Tensor | None:
        """Gradient w.r.t. the input of `next` [m, n_out], its sum over the instances standing for all; None where sigma'' = 0."""
        grads = [link.grad for link in self.links if link.grad is not None]
        return flatten_batch([_for_all(grad, self.samples) for grad in grads]) if len(grads) == len(self.links) else None


def connect(record: LayerRecord, records: dict[nn.Linear, LayerRecord], repeated: bool) -> None:
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
            record.losses, record.obstacle = [], "enters a criterion whose Hessian is zero"
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


def recursion_order(records: dict[nn.Linear, LayerRecord]) -> list[LayerRecord]:
    """Each record after that of the layer which takes its output."""
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


def _for_all(gradient: Tensor, samples: int | None) -> Tensor:
    """The `subsample` of a gradient [..., n], so scaled that its sum stands for the sum over all instances."""
    if samples is None:
        return gradient
    chosen = flatten_batch([gradient], samples)
    factor = gradient.numel() / chosen.numel() if chosen.numel() else 1.0
    return chosen if factor == 1 else chosen * factor
