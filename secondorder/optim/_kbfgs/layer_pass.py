"""What one call of a closure leaves behind at one linear layer: E[h], E[h h^T], E[z] and dL/dz, over the rows of its calls."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from secondorder._distributed import RankTerm
from secondorder._tape import Counting, aligned, as_weighted
from secondorder._tensors import compute_dtype, flatten_batch
from secondorder.solvers import second_moment


@dataclass(eq=False, slots=True)
class Call:
    """One call of a layer."""

    order: int  # among all calls of layers
    shape: torch.Size  # of its rows, before they were flattened
    layer: nn.Linear
    input: Tensor  # [m, n_in]
    mean_preactivation: Tensor  # [n_out]
    multiplied: set[Tensor]  # parameters in products between the layers before and the input
    weights: Tensor | None = None  # of the rows, [m]; None: 1 each
    total: float | None = None  # of these; None: m

    @property
    def weight(self) -> float:
        """Returns how much its rows count together."""
        return float(len(self.input)) if self.total is None else self.total

    @property
    def weights_of_rows(self) -> Tensor:
        """Returns the weights of the rows, [m] in float64."""
        if self.weights is not None:
            return self.weights
        return torch.ones(len(self.input), dtype=torch.float64, device=self.input.device)

    def count_rows(self, counting: Counting, masses: Tensor) -> None:
        """Has its rows count as their targets do, before the weights move: E[z] is W E[h] + b of these rows."""
        self.total = counting.total
        if self.total == 0:
            self.weights = masses
        elif counting.kept is not None or counting.weights is not None:
            self.input, self.weights = counting.of_rows(self.input), counting.weights
            h, weights = self.input, self.weights_of_rows
            weight, bias = (None if p is None else p.detach().to(h.dtype) for p in (self.layer.weight, self.layer.bias))
            self.mean_preactivation = nn.functional.linear((weights / weights.sum()).to(h.dtype) @ h, weight, bias)


class LayerPass:
    """The calls of a layer that backward passes have reached in one call of a closure: the union of their batches.

    The means are over the instances, once all calls have been added; after `take`, over those of all ranks.

    Attributes:
        calls: of the layer.
        gradient: dL/dz summed over the instances [n_out], L being sign times the loss; a mean where the loss is one.
        unlike: whether the closure has called it on other numbers of rows before, on any rank.

    Args:
        layer: whose calls they are.
        sign: 1, or -1 if the loss is maximised.
    """

    def __init__(self, layer: nn.Linear, sign: float):
        self._layer, self._sign = layer, sign
        self.calls: list[Call] = []
        self.gradient: Tensor
        self.unlike = False
        self._inputs_of_all_ranks = False  # whether the means of inputs are over these

    def add(self, call: Call, gradient: Tensor) -> None:
        """Adds a call, or a further backward pass that has reached it, with the dL/dz [..., n_out] of its rows."""
        total = self._sign * flatten_batch([gradient]).sum(0, dtype=compute_dtype(self._layer.weight.dtype))
        self.gradient = self.gradient + total if self.calls else total
        if call not in self.calls:
            self.calls.append(call)

    @property
    def rows_of_calls(self) -> list[int]:
        """Returns the numbers of rows of the calls, in their order."""
        return [len(call.input) for call in sorted(self.calls, key=lambda call: call.order)]

    @property
    def weight(self) -> float:
        """Returns how much the rows of the calls count together, in this process."""
        return sum(call.weight for call in self.calls)

    @cached_property
    def instances(self) -> int:
        """Returns how many rows the calls have together."""
        return sum(len(call.input) for call in self.calls)

    @cached_property
    def input(self) -> Tensor:
        """Returns this process's h [m, n_in]; if they have weights, rows whose plain mean and second moment are the weighted."""
        rows = flatten_batch([call.input for call in self.calls])
        if not self.weight or all(
            call.weights is None for call in self.calls
        ):  # if none counts, the loss has an error of its own
            return rows
        return as_weighted(rows, torch.cat([call.weights_of_rows for call in self.calls]))

    @cached_property
    def mean_input(self) -> Tensor:
        """Returns E[h] [n_in]."""
        return self.input.mean(0)

    @cached_property
    def second_moment(self) -> Tensor:
        """Returns E[h h^T] [n, n]; with a trained bias h ends in a 1."""
        return layer_second_moment(self._layer, self.input, self.mean_input)

    def average_second_moment_(self, average: Tensor, decay: float) -> None:
        """Sets A <- decay A + (1 - decay) E[h h^T] in place."""
        if self._inputs_of_all_ranks:
            average.lerp_(self.second_moment[: len(average), : len(average)], 1 - decay)
        else:
            layer_second_moment(self._layer, self.input, self.mean_input, average, decay)

    @property
    def mean_square(self) -> Tensor:
        """Returns E[|h|^2] []."""
        if self._inputs_of_all_ranks:
            return self.second_moment.diagonal().sum()
        return self.input.square().sum() / max(len(self.input), 1)

    def rows(self, bias: bool) -> Tensor | None:
        """Returns X [m, n] with the second moment X^T X / m, of this process's instances; None: it is over all ranks."""
        if self._inputs_of_all_ranks:
            return None
        return torch.cat([self.input, self.input.new_ones(len(self.input), 1)], 1) if bias else self.input

    @cached_property
    def mean_preactivation(self) -> Tensor:
        """Returns E[z] [n_out]."""
        if not self.instances:
            return torch.zeros_like(self.calls[0].mean_preactivation)
        if len(self.calls) == 1:
            return self.calls[0].mean_preactivation
        shares = [call.weight for call in self.calls] if self.weight else [float(len(call.input)) for call in self.calls]
        pairs = [(call, share / sum(shares)) for call, share in zip(self.calls, shares, strict=True) if len(call.input)]
        return torch.stack([call.mean_preactivation * share for call, share in pairs]).sum(0)

    def terms(self, name: str, inputs: bool) -> list[RankTerm]:
        """Returns what is to be averaged over ranks, by the layer's name; `inputs`: whether means of inputs are wanted, too."""
        count, unlike = torch.tensor([self.instances, self.unlike], dtype=torch.float64, device="cpu")
        means = [self.mean_preactivation, *((self.mean_input, self.second_moment) if inputs else ())]
        found = [RankTerm(name, value) for value in (self.gradient, count, unlike)]
        return found + [RankTerm(name, mean, self.weight) for mean in means]

    def take(self, averages: Iterator[Tensor], ranks: int, inputs: bool) -> None:
        """Takes the averages of its `terms` over so many ranks, in the place of what this process has found."""
        self.gradient, count, unlike = (next(averages) for _ in range(3))
        self.instances, self.unlike = round(float(count) * ranks), bool(unlike)
        self.mean_preactivation, self._inputs_of_all_ranks = next(averages), inputs
        if inputs:
            self.mean_input, self.second_moment = next(averages), next(averages)


def weigh(calls: Iterable[Call], masses: Tensor) -> None:
    """Has the rows of calls count by the weights of the targets that they belong to, if they belong to any."""
    known: dict[int, Counting] = {}
    for call in calls:
        own = aligned(masses, call.shape)
        if own is not None:
            if len(own) not in known:
                known[len(own)] = Counting.of(own)
            call.count_rows(known[len(own)], own)


def layer_input(layer: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Returns the h [m, n_in] of a call, in the state's dtype."""
    h: Tensor = args[0] if args else kwargs["input"]
    return flatten_batch([h.detach()]).to(compute_dtype(layer.weight.dtype))


def layer_second_moment(layer: nn.Linear, h: Tensor, mean: Tensor, average: Tensor | None = None, decay: float = 0.0) -> Tensor:
    """Sets A <- decay A + (1 - decay) E[h h^T], in place where A is given (`average`); with a bias h ends in a 1."""
    n = layer.in_features
    moment = second_moment(h) if len(h) else h.new_zeros(n, n)
    if average is None:
        size = n + (layer.bias is not None and layer.bias.requires_grad)
        average = h.new_zeros(size, size)
    average[:n, :n].lerp_(moment, 1 - decay)
    if len(average) > n:
        for border, value in ((average[n, :n], mean), (average[:n, n], mean), (average[n, n], mean.new_ones(()))):
            border.lerp_(value, 1 - decay)
    return average
