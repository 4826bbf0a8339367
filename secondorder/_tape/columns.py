"""Columns of a root of the output's Hessian, taken back to every layer: delta_ic = J_i^T s_ic."""

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from secondorder._tape.outputs import LayerOutputs
from secondorder._tape.records import Counting, LayerCall
from secondorder._tensors import gradients_by_seed, subsample, to_compute_dtype, without_autocast
from secondorder.criteria import OutputRoot

# (criterion, loss, the autograd node of the output of the one linear layer that the loss depends on, or None, the criterion's
# arguments by position and by name) -> the edge of the graph where columns start, and the root whose columns they are.
# None: the Hessian is zero, or is in sum over instances that the criterion compares.
Columns = Callable[[nn.Module, Tensor, Node | None, tuple[Any, ...], dict[str, Any]], tuple[GradientEdge, OutputRoot | None]]

# At most so many numbers of all layers' deltas are held at once.
_BUDGET = 2**25


def column_blocks(
    edge: GradientEdge,
    root: OutputRoot,
    outputs: LayerOutputs,
    samples: int | None,
    counting: Callable[[torch.Size], Counting],
    left_out: Container[nn.Linear] = (),
) -> dict[LayerCall, Tensor]:
    """Returns the sums over columns of delta delta^T [n_out, n_out] for every recorded layer upstream of `edge`, by chunks.

    Args:
        edge: where the columns start.
        root: gives them.
        outputs: of the layers.
        samples: the sums are over at most so many instances that count, and stand for all; None: over all.
        counting: which rows of a tensor [*shape, n] count.
        left_out: layers without a block.
    """
    nodes = [node for node in outputs.upstream(edge.node) if outputs.call_at(node).layer not in left_out]
    if not nodes:
        return {}
    calls = [outputs.call_at(node) for node in nodes]
    instances = max((call.input.shape[:-1].numel() for call in calls), default=1)
    chunk = max(1, _BUDGET // max(1, sum(instances * call.layer.out_features for call in calls)))
    blocks: dict[LayerCall, Tensor] = {}
    for begin in range(0, root.count, chunk):
        columns = root.columns(begin, min(begin + chunk, root.count))
        deltas = gradients_by_seed(edge, [GradientEdge(node, 0) for node in nodes], columns)
        for call, delta in zip(calls, deltas, strict=True):
            assert delta is not None  # the edge depends on them all
            flat = to_compute_dtype(delta).reshape(len(delta), delta.shape[1:-1].numel(), delta.shape[-1])
            share: Tensor | float = 1.0
            if samples is not None and flat.shape[1] > samples:
                rows = counting(call.input.shape[:-1])
                flat = flat if rows.kept is None else flat.index_select(1, rows.kept)
                share = rows.share(flat.shape[1], samples)
                flat = subsample(flat, samples)
            chosen = flat.flatten(0, 1)
            with without_autocast(chosen.device):
                blocks[call] = chosen.T @ chosen * share + blocks.get(call, 0)
    return blocks
