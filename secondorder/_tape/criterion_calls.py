"""What is kept of a call of the criterion: its arguments, how many rows it sees, and what it divides their sum by."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves, tree_map

from secondorder._tape.forward_state import ForwardState
from secondorder._tape.graph import divisor_of_sum, metadata
from secondorder._tape.outputs import LayerOutputs
from secondorder._tape.records import CriterionArguments, LayerCall, ModelCall
from secondorder._tape.ways import find_way
from secondorder._tensors import refuse_capture
from secondorder.criteria.reduction import reduction_of, sums_rows


class Divisors:
    """Tells what a criterion divides its sum over instances by.

    Where nothing says so, the criterion is called twice, at the first loss of which that is asked.

    Args:
        criterion: whose calls they are of.

    `most_rows`, of the batches so far, decides what a constant counts as: it is part of an optimizer's state.
    """

    def __init__(self, criterion: nn.Module):
        self._criterion = criterion
        self._sums: bool | None = None  # whether a criterion that does not say so sums over its rows; None: that is not known
        self.most_rows = 3  # or more; a half of a sum over two is rather part of every row's loss
        self._unsaid: tuple[Any, list[int]] | None = None  # the last arguments of such a criterion, to call it with

    def release(self) -> None:
        """Forgets the arguments of calls."""
        self._unsaid = None

    def of(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Node, muted: Callable[[], AbstractContextManager[None]]
    ) -> Callable[[], float | Tensor | None]:
        """Returns what tells, once that is asked for, what the sum over instances is divided by; None: their number.

        Args:
            args: of a call.
            kwargs: of the call.
            loss: the node of what it returned.
            muted: within it no call is recorded.
        """
        reduction = reduction_of(self._criterion, kwargs)
        if reduction is not None or self._sums is False:
            return lambda: 1.0 if reduction == "sum" else None
        leaves, trained = _leaves(args, kwargs)
        divisor = divisor_of_sum(loss)
        if isinstance(divisor, Tensor) and trained:
            # Less than the rows of the largest batch is part of every row's loss, as of (z - y)^2 / 2.
            self.most_rows = max(self.most_rows, leaves[trained[0]].shape[:1].numel())
            divisor = divisor.where(divisor > 0.99 * self.most_rows, 1.0)
        if self._sums:
            return lambda: divisor
        self._unsaid = detached((args, kwargs)), trained

        def found() -> float | Tensor | None:
            if self._sums is None and self._unsaid is not None:
                refuse_capture("criterion that does not say whether it is a mean or a sum")
                with muted(), ForwardState(self._criterion).restored(buffers=True):
                    self._sums = sums_rows(self._criterion, *self._unsaid)
            return divisor if self._sums else None

        return found


def criterion_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any], sources: list[Node], outputs: LayerOutputs
) -> CriterionArguments:
    """Returns what is needed to evaluate the criterion again.

    Args:
        args: of its call.
        kwargs: of its call.
        sources: the nodes of the outputs of the layers that it sees.
        outputs: of all layers.
    """
    leaves, trained = _leaves(args, kwargs)
    arguments = CriterionArguments(detached(args), detached(kwargs), trained, None, None, [])
    if len(sources) == 1 and len(trained) == 1:
        (node,) = sources
        source = outputs.call_at(node)
        found = find_way(leaves[trained[0]], lambda n, _: (None, source.preactivation()) if n is node else None)
        arguments.from_layer = None if found is None else found[1]

    ways = [find_way(leaves[k], lambda node, number: _output_of_model(node, number, outputs.key)) for k in trained]
    calls = {way[0][0] for way in ways if way is not None}
    if len(calls) == 1 and all(way is not None for way in ways):
        (arguments.model,) = calls
        arguments.from_model = [(way[0][1], way[1]) for way in ways if way is not None]
    return arguments


def mark_outputs(call: ModelCall, outputs: list[Any], key: str) -> None:
    """Notes a call of the model at the nodes of its outputs, for `criterion_arguments` to find; `key`: that of `LayerOutputs`."""
    for position, output in enumerate(outputs):
        if isinstance(output, Tensor) and output.grad_fn is not None:
            metadata(output.grad_fn).setdefault(key + ".model", {})[output.output_nr] = call, position


def _output_of_model(node: Node, number: int, key: str) -> tuple[tuple[ModelCall, int], Tensor] | None:
    """Returns the call of the model that an output of a node is one of, its position there, and its values; None: of none."""
    call, position = metadata(node).get(key + ".model", {}).get(number, (None, 0))
    return None if call is None or not call.outputs else ((call, position), call.outputs[position])


def rows_seen(sources: list[LayerCall], args: tuple[Any, ...]) -> int | None:
    """Returns how many rows the criterion sees: its sources', or their sum if its first argument joins them; None: unclear."""
    rows = [source.input.shape[:-1].numel() for source in sources]
    width, output = sources[0].layer.out_features, args[0] if args else None
    if len(rows) > 1 and isinstance(output, Tensor) and output.numel() == width * sum(rows):  # noqa: SIM102
        if (output.dim() > 1 and output.shape[-1] == width) or (output.dim() == 1 and width == 1):
            return sum(rows)
    return rows[0] if len(set(rows)) == 1 else None


def detached(tree: Any) -> Any:
    """Returns a tree of values with its tensors detached."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def _leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], list[int]]:
    """Returns the values of a call, and which of them are tensors that depend on parameters."""
    leaves = tree_leaves((args, kwargs))
    return leaves, [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
