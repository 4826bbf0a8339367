"""The Jacobian of residuals w.r.t. parameters by a plan: all rows from few backward passes through the uses of parameters."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from secondorder._tape.factored import Buffer, Jacobian, Part, Piece
from secondorder._tape.passes import Output, columns_by_passes, gradients_at, output_of, seed
from secondorder._tape.plans import Block, Plan
from secondorder._tape.row_uses import Use
from secondorder._tape.uses import Uses, find_uses, frontier
from secondorder._tensors import gradients_by_seed

SEEDS = 2**22  # numbers in the seeds, or in the gradients of one product, of several residuals' passes that run together, at most

Span = tuple[int, int]  # the first row of a block in J, and the one after its last


def jacobian(
    plan: Plan, residuals: Sequence[Tensor], uses: Sequence[Uses], parameters: Sequence[Tensor], scales: Sequence[Tensor],
    drawn: Sequence[Tensor | None], buffer: Buffer,
) -> Jacobian:  # fmt: skip
    """Returns the rows of some residuals, each times a scale.

    Args:
        plan: a plan for graphs of this structure.
        residuals: tensors with their graphs.
        uses: the uses of parameters in each of these graphs.
        parameters: all parameters, which uses name by their positions.
        scales: the scales of each block's residuals [n], or of those drawn.
        drawn: of each block, the positions among its residuals that are wanted; None: all.
        buffer: memory for J.
    """
    spans, parts = _rows_by_uses(plan, [Output(r, r) for r in residuals], uses, parameters, scales, drawn)
    chosen = [block.chosen(d, scale.device) for block, d, scale in zip(plan.blocks, drawn, scales, strict=True)]
    for block, elements, scale, span in zip(plan.blocks, chosen, scales, spans, strict=True):
        if block.inner is not None:
            found = _by_inner(block.inner, residuals[block.term], elements, scale, uses[block.term], parameters, buffer)
            for p, dense in found.items():
                if p not in block.others:
                    parts.setdefault(p, []).append(Part(*span, [], dense))
    for members in plan.with_others():
        term, others = plan.blocks[members[0]].term, plan.blocks[members[0]].others
        r, span = residuals[term], (spans[members[0]][0], spans[members[-1]][1])
        elements, scale = torch.cat([chosen[i] for i in members]), torch.cat([scales[i] for i in members])
        largest = max((use.operand.numel() for use in uses[term].uses if use.operand is not None), default=r.numel())
        found = columns_by_passes(r, seed(r, elements, scale), elements, [(p, parameters[p]) for p in others], largest)
        for p, dense in found.items():
            parts.setdefault(p, []).append(Part(*span, [], dense))
    return Jacobian(spans, parameters, parts, buffer)


def _rows_by_uses(
    plan: Plan, outputs: Sequence[Output], uses: Sequence[Uses], parameters: Sequence[Tensor], scales: Sequence[Tensor],
    drawn: Sequence[Tensor | None],
) -> tuple[list[Span], dict[int, list[Part]]]:  # fmt: skip
    """Returns which rows of J each block has, and what the uses add to each parameter's columns."""
    parts: dict[int, list[Part]] = {}
    counts = [b.size if d is None else len(d) for b, d in zip(plan.blocks, drawn, strict=True)]
    ends = list(accumulate(counts))
    spans = [(end - count, end) for end, count in zip(ends, counts, strict=True)]
    for members in plan.passes:
        edges, seeds, nodes = list[Tensor | GradientEdge](), list[Tensor](), dict[Node, None]()
        for i in members:
            block, d = plan.blocks[i], drawn[i]
            elements = d if block.elements is None else block.elements if d is None else block.elements[d]
            edges.append(outputs[block.term].edge)
            seeds.append(seed(outputs[block.term].like, elements, scales[i]))
            nodes.update(dict.fromkeys(uses[block.term].uses[k].node for k in block.uses))
        arriving = gradients_at(list(nodes), edges, seeds)
        for i in members:
            block = plan.blocks[i]
            for p, part in _parts(block, drawn[i], uses[block.term].uses, arriving, spans[i], parameters[0].dtype).items():
                parts.setdefault(p, []).extend(part)
    return spans, parts


def _parts(
    block: Block, drawn: Tensor | None, uses: list[Use], arriving: dict[Node, Tensor | None], span: Span, dtype: torch.dtype
) -> dict[int, list[Part]]:
    """Returns what a block's uses add to each parameter's columns, in the parameters' dtype, also if data are in float64."""
    pieces: dict[tuple[int, int, int], list[Piece]] = {}
    found: dict[int, list[Part]] = {}
    for k, rows in zip(block.uses, block.rows, strict=True):
        use = uses[k]
        gradient = arriving[use.node]
        if gradient is None or use.parameter in block.others:
            continue
        wanted = rows if drawn is None else drawn.unsqueeze(1) if rows is None else rows[drawn]
        g = use.rows(gradient).to(dtype)
        operand = None if use.operand is None else use.operand.to(dtype)
        piece = Piece(operand, g, wanted) if use.swapped and operand is not None else Piece(g, operand, wanted)
        if use.back is None:
            pieces.setdefault((use.parameter, *piece.sizes), []).append(piece)
        else:
            dense = use.back(Part(*span, [piece]).matrices()).reshape(span[1] - span[0], -1)
            found.setdefault(use.parameter, []).append(Part(*span, [], dense))
    for (p, *_), each in pieces.items():
        part = Part(*span, each)
        if any(before.pieces for before in found.get(p, [])):  # a vector that is a row here and a column there
            part = Part(*span, [], part.matrices().flatten(1))
        found.setdefault(p, []).append(part)
    return found


def _by_inner(
    plan: Plan, r: Tensor, elements: Tensor, scale: Tensor, u: Uses, parameters: Sequence[Tensor], buffer: Buffer
) -> dict[int, Tensor]:
    """Returns the columns [m, numel] of residuals that mix rows of products, by the chain rule.

    They are the residuals' derivatives by the products, times the products' own Jacobian.

    Args:
        plan: the products' plan.
        r: a tensor of residuals with its graph.
        elements: the positions of m residuals in it, flattened.
        scale: what each of their rows is multiplied with [m].
        u: the uses of parameters in its graph.
        parameters: all parameters.
        buffer: memory for the products' Jacobian.
    """
    nodes = frontier(r, u)
    assert nodes is not None
    outputs, index = [output_of(node, r) for node in nodes], {id(p): i for i, p in enumerate(parameters)}
    uses = [find_uses(node, index) for node in nodes]
    found = _derivatives(r, elements, scale, outputs)
    taken, drawn, factors = dict[int, int](), list[Tensor | None](), list[Tensor]()  # blocks that any residual depends on
    for i, block in enumerate(plan.blocks):
        by_block = found[block.term] if block.elements is None else found[block.term][:, block.elements]
        wanted = by_block.any(0).nonzero().squeeze(1)
        if len(wanted):
            taken[i] = len(drawn)
            drawn.append(wanted)
            factors.append(by_block[:, wanted])
    if not taken:
        return {}
    passes = [[taken[i] for i in members if i in taken] for members in plan.passes]
    plan = Plan(plan.signature, [plan.blocks[i] for i in taken], [members for members in passes if members])
    ones = [scale.new_ones(factor.shape[1]) for factor in factors]
    spans, parts = _rows_by_uses(plan, outputs, uses, parameters, ones, drawn)
    inner = Jacobian(spans, parameters, parts, buffer.within())
    product = torch.cat(factors, 1) @ inner.dense()
    return {p: product[:, inner.offsets[p] : inner.offsets[p + 1]] for p in range(len(parameters)) if p in parts}


def _derivatives(r: Tensor, elements: Tensor, scale: Tensor, outputs: list[Output]) -> list[Tensor]:
    """Returns the derivatives [m, numel] of m residuals, each times its scale, by every product's output."""
    found = [scale.new_zeros(len(elements), output.like.numel()) for output in outputs]
    step = max(1, SEEDS // max(r.numel(), *(output.like.numel() for output in outputs)))
    for chosen, weights, start in zip(elements.split(step), scale.split(step), range(0, len(elements), step), strict=False):
        seeds = r.new_zeros(len(chosen), r.numel()).scatter_(1, chosen.unsqueeze(1), weights.to(r.dtype).unsqueeze(1))
        gradients = gradients_by_seed(r, [output.edge for output in outputs], seeds.view(-1, *r.shape))
        for each, gradient in zip(found, gradients, strict=True):
            if gradient is not None:
                each[start : start + len(chosen)] = gradient.reshape(len(chosen), -1)
    return found
