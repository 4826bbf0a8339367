"""Walks through the autograd graph: which recorded layers a tensor depends on, and through which nodes."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from secondorder._tape.nodes import COMPILED, is_leaf, kind

# Nodes that keep the numbers and change the shape. The last is DistributedDataParallel's, around the output.
RESHAPING = {
    "ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward", "SqueezeBackward", "UnsqueezeBackward", "_DDPSinkBackward",
}  # fmt: skip
# Nodes that keep the numbers and change their order or dtype.
TURNING = {"TBackward", "TransposeBackward", "PermuteBackward", "ExpandBackward", "CloneBackward", "ToCopyBackward"}
# Products of matrices and vectors.
MATRIX_PRODUCTS = {
    "MmBackward",
    "AddmmBackward",
    "BmmBackward",
    "BaddbmmBackward",
    "MvBackward",
    "AddmvBackward",
    "LinearBackward",
}


def metadata(node: Node) -> dict[str, Any]:
    """Returns the dictionary of an autograd node, which lives as long as the graph."""
    return node.metadata  # type: ignore[return-value]  # torch's stub takes the attribute for a method


def _source_nodes(start: Node, key: str, nearest: bool = True) -> tuple[list[Node], list[str], list[Node]]:
    """Returns the nodes upstream of (or at) `start` with metadata under `key`; of those passed the kinds, and the products.

    Args:
        start: where the walk begins.
        key: what marks the outputs of recorded linear layers.
        nearest: whether the walk ends at the first such node on every path, rather than finding all.
    """
    found, kinds, products, seen, stack = [], [], [], {start}, [start]
    while stack:
        node = stack.pop()
        if key in metadata(node):
            found.append(node)
            if nearest:
                continue
        kinds.append(kind(node))
        if kinds[-1] in MATRIX_PRODUCTS:
            products.append(node)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return found, kinds, products


class Marks:
    """Marks the autograd nodes of layers' outputs with what is recorded of their calls, as long as the graph lives.

    Args:
        key: of what is recorded in the nodes' metadata.
    """

    def __init__(self, key: str):
        self.key = key
        self._claimed = key + ".weight"  # likewise of what the layers multiply their inputs with

    def add(self, output: Node, record: Any) -> None:
        """Marks the node of a layer's output."""
        metadata(output)[self.key] = record

    def claim_weight(self, output: Node) -> None:
        """Marks what a layer's call multiplies its input with, its weight's transpose, given the output's node."""
        while is_reshaping(output) and output.next_functions[0][0] is not None:
            output = output.next_functions[0][0]
        for operand, _ in output.next_functions:
            if operand is not None and not is_leaf(operand) and is_turning(operand):
                metadata(operand)[self._claimed] = True

    def at(self, output: Node) -> Any:
        """Returns what is recorded at a marked node."""
        return metadata(output)[self.key]

    def before(self, start: Node) -> tuple[list[Node], list[str], set[Tensor]]:
        """Returns the marked nodes that are met first upstream of (or at) `start`, and of those passed the kinds and parameters.

        The parameters are those that matrix products take, at most turned or cast, outside of the layers' calls. Derivatives of
        a layer's call (`create_graph=True`) multiply with the operand of that call.
        """
        found, passed, products = _source_nodes(start, self.key)
        multiplied: set[Tensor] = set()
        for product in products:
            for operand, _ in product.next_functions:
                node: Node | None = operand
                while node is not None and self._claimed not in metadata(node):
                    if is_leaf(node):
                        multiplied.add(node.variable)  # type: ignore[attr-defined]
                    node = node.next_functions[0][0] if is_turning(node) else None
        return found, passed, multiplied

    def upstream(self, start: Node) -> list[Node]:
        """Returns all marked nodes upstream of (or at) `start`."""
        return _source_nodes(start, self.key, nearest=False)[0]


def is_turning(node: Node) -> bool:
    """Tells whether a node keeps the numbers, in another shape, order or dtype."""
    return is_reshaping(node) or kind(node) in TURNING


def compiled_parameters(start: Node, key: str) -> set[Tensor]:
    """Returns the parameters of compiled graphs between `start` and the nearest nodes upstream that hold metadata under `key`."""
    found, seen, stack = set(), {start}, [start]
    while stack:
        node = stack.pop()
        if key in metadata(node):
            continue
        following = [each for each, _ in node.next_functions if each is not None]
        if kind(node) == COMPILED:
            found |= {each.variable for each in following if hasattr(each, "variable")}
        new = [each for each in following if each not in seen]
        seen.update(new)
        stack += new
    return found


def is_view_of(node: Node | None, source: Node) -> bool:
    """Tells whether the tensor of `node` is that of `source`, at most reshaped."""
    while node is not None and node is not source and is_reshaping(node):
        node = node.next_functions[0][0]
    return node is source


def divisor_of_sum(loss: Node) -> Tensor | float:
    """Returns the number that a loss divides a sum by, from the scalar factors and quotients on the way to it and below it."""
    node: Any = loss
    divisor: Tensor | float = 1.0
    while True:
        inputs = [each for each, _ in node.next_functions if each is not None]
        name = kind(node)
        if name in ("MulBackward", "DivBackward") and len(inputs) == 1 and inputs[0] is node.next_functions[0][0]:
            factor = node._saved_other
        elif name == "MulBackward" and len(inputs) == 1:
            factor = node._saved_self
        elif name in ("SumBackward", "NegBackward") or is_turning(node):
            factor = None
        else:
            return divisor
        if factor is not None:
            factor = torch.as_tensor(factor)  # torch's own functions divide by plain numbers
            if factor.numel() != 1:
                return divisor
            factor = factor.detach().double().abs().reshape(())
            divisor = divisor * factor if name == "DivBackward" else divisor / factor
        if not inputs:
            return divisor
        node = inputs[0]


def is_reshaping(node: Node) -> bool:
    """Tells whether a node keeps the numbers in their order, and at most changes the shape."""
    return kind(node) in RESHAPING


def compiled_error(what: str) -> RuntimeError:
    """Makes the error for what runs in a compiled graph: such graphs do not support double backward, and fail silently."""
    return RuntimeError(
        f"{what} inside a compiled graph, which does not say what it computes; call the model that the optimizer was made for, "
        "rather than a compiled part of it"
    )


def in_recomputation(what: str) -> bool:
    """Tells whether a checkpoint makes a call once more, within a backward pass, on a graph that is none of the loss's.

    Args:
        what: is called, for the message.

    Raises:
        RuntimeError: the checkpoint is of the reentrant kind.
    """
    if torch._C._current_graph_task_id() == -1:
        return False
    node: Node | None = torch._C._current_autograd_node()
    if node is not None and kind(node) == "CheckpointFunctionBackward()":
        raise RuntimeError(
            f"{what} is inside a checkpoint of the reentrant kind, whose backward pass is none of the loss's graph: "
            "call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )
    return True
