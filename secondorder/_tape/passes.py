"""Backward passes from residuals: those that other modules ask for, and those of parameters that enter in an unknown way."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from secondorder._tensors import gradients_by_seed

# vmap takes the backward passes of BATCH residuals together where no matrix product has an operand of more than BATCH_OPERAND
# numbers: there nodes cost more than numbers. In small nets this is up to 14 times as fast as one pass after another, in large
# ones it is slower.
BATCH, BATCH_OPERAND = 32, 2**14


class Output(NamedTuple):
    """A tensor that backward passes begin at, or the node that has made it."""

    edge: Tensor | GradientEdge
    like: Tensor  # of its shape and dtype


def output_of(node: Any, r: Tensor) -> Output:
    """Returns the one output of a node that is upstream of `r`."""
    made = node._input_metadata[0]
    return Output(GradientEdge(node, 0), torch.empty(made.shape, dtype=made.dtype, device=r.device))


def seed(r: Tensor, elements: Tensor | None, values: Tensor) -> Tensor:
    """Returns weights of the shape of `r`: `values` at these positions in the flattened `r`, zero elsewhere; None: everywhere."""
    if elements is None:
        return values.to(r.dtype).view(r.shape)
    weights = r.new_zeros(r.numel())
    weights[elements] = values.to(r.dtype)
    return weights.view(r.shape)


def gradients_at(nodes: list[Node], outputs: Sequence[Tensor | GradientEdge], seeds: list[Tensor]) -> dict[Node, Tensor | None]:
    """Returns the gradients that arrive at nodes in one backward pass from all outputs."""
    if not nodes:
        return {}
    edges = [GradientEdge(node, 0) for node in nodes]
    found = torch.autograd.grad(outputs, edges, seeds, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
    return dict(zip(nodes, found, strict=True))


def by_columns(numel: int, rows: int) -> bool:
    """Tells whether a parameter's columns of J come from two passes each: a pass for each row would be more."""
    return 2 * numel <= rows


def columns_by_passes(
    r: Tensor, weights: Tensor, elements: Tensor, parameters: list[tuple[int, Tensor]], largest: int
) -> dict[int, Tensor]:
    """Returns the Jacobian's columns [m, numel] of each parameter: by two passes for a column, or one for a row if that is less.

    Args:
        r: a tensor of residuals with its graph.
        weights: what each of its elements is multiplied with, of its shape.
        elements: the positions of the m rows in the flattened `r`.
        parameters: with their positions among all parameters.
        largest: how many numbers the largest operand of a matrix product has.
    """
    found: dict[int, Tensor] = {}
    batch = BATCH if largest <= BATCH_OPERAND else 1
    few = [(p, t) for p, t in parameters if by_columns(t.numel(), len(elements))]
    with suppress(RuntimeError):  # a compiled graph has no second derivatives
        found.update(_by_columns(r, weights, elements, few, batch))
    rest = [(p, t) for p, t in parameters if p not in found]
    if rest:
        rows = _by_rows(r, weights.flatten(), elements, [t for _, t in rest], batch)
        found.update({p: each for (p, _), each in zip(rest, rows, strict=True)})
    return found


def _by_rows(r: Tensor, weights: Tensor, elements: Tensor, parameters: list[Tensor], batch: int) -> list[Tensor]:
    """Returns the columns [m, numel] of parameters, by a backward pass for each element, `batch` of them together."""
    found = [r.new_zeros(len(elements), t.numel(), dtype=t.dtype) for t in parameters]
    for start in range(0, len(elements), batch):
        chosen = elements[start : start + batch]
        seeds = weights.new_zeros(len(chosen), len(weights)).scatter_(1, chosen.unsqueeze(1), weights[chosen].unsqueeze(1))
        gradients = gradients_by_seed(r, parameters, seeds.view(-1, *r.shape))
        for each, gradient in zip(found, gradients, strict=True):
            if gradient is not None:
                each[start : start + len(chosen)] = gradient.to_dense().reshape(len(chosen), -1)
    return found


def _by_columns(
    r: Tensor, weights: Tensor, elements: Tensor, parameters: list[tuple[int, Tensor]], batch: int
) -> dict[int, Tensor]:
    """Returns the columns [m, numel] of parameters, by a backward pass through a backward pass for each, `batch` at a time.

    Left out are parameters whose gradient is not the sum of what these passes find, as it is not where a function of the user's
    own computes a part of it that autograd does not see.
    """
    found: dict[int, Tensor] = {}
    if not parameters:
        return found
    dual, scale = weights.detach().requires_grad_(), weights.flatten()[elements].unsqueeze(1)
    with torch.enable_grad():
        gradients = [
            None if g is None else g.flatten()
            for g in torch.autograd.grad(r, [t for _, t in parameters], dual, create_graph=True, allow_unused=True)
        ]
    for (p, t), gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            found[p] = r.new_zeros(len(elements), t.numel())
        elif gradient.requires_grad:
            ones = torch.eye(len(gradient), dtype=gradient.dtype, device=r.device)
            columns = [c for some in ones.split(batch) for c in gradients_by_seed(gradient, [dual], some) if c is not None]
            if not columns:
                continue
            each = torch.cat(columns).flatten(1)[:, elements].T * scale
            tolerance = 1e-10 if r.dtype == torch.float64 else 1e-3
            if torch.allclose(each.sum(0), gradient.detach(), rtol=tolerance, atol=tolerance * float(each.norm())):
                found[p] = each
    return found
