"""Which rows of each matrix product are of which residual, found by backward passes: the plan of a Jacobian."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from secondorder._tape.graph import RESHAPING
from secondorder._tape.nodes import kind, signed_dim
from secondorder._tape.passes import BATCH, Output, gradients_at, output_of, seed
from secondorder._tape.row_uses import Use
from secondorder._tape.uses import Uses, find_uses, frontier

PIECES = 64  # of a tensor of residuals, at most, where the residuals of one piece share no row of a product
# The Jacobian of products that residuals mix has at most INNER numbers, and must not cost more than the residuals' own backward
# passes. In these a multiplication counts as SLOWNESS of those in one large product of matrices, and a node as NODE of them.
INNER = 2**24
SLOWNESS = 8
NODE = 10_000


class Block(NamedTuple):
    """Residuals whose rows of the Jacobian come from one backward pass.

    Args:
        term: which tensor of residuals they are of.
        elements: their positions in that tensor, flattened [n]; None: all.
        size: n.
        uses: the positions of the tensor's uses that give the rows.
        rows: for each of these uses, which rows of its product are of each residual [n, T], where the number of rows stands for
            none; None: row i is of residual i.
        others: the positions of parameters whose columns need backward passes of their own, and the nodes by which they enter.
        inner: where residuals mix several instances' rows of products, and each product only depends on its own instance: the
            plan of these products. Then J is the residuals' derivatives by the products times the products' own Jacobian.
        incomplete: whether some residual has no row of a product that has rows of no residual. Their gradients may have been
            zero by chance, as behind a ReLU, so that this may not be known yet.
    """

    term: int
    elements: Tensor | None
    size: int
    uses: list[int]
    rows: list[Tensor | None]
    others: dict[int, str]
    inner: "Plan | None" = None
    incomplete: bool = False

    def chosen(self, drawn: Tensor | None, device: torch.device) -> Tensor:
        """Returns the positions in the tensor of those of the block's residuals that are drawn; None: of all."""
        elements = torch.arange(self.size, device=device) if self.elements is None else self.elements
        return elements if drawn is None else elements[drawn]


class Plan(NamedTuple):
    """How the Jacobian of all graphs of one structure is computed."""

    signature: tuple[object, ...]
    blocks: list[Block]
    passes: list[list[int]]  # positions of blocks that share no node, and so one backward pass

    def with_others(self) -> list[list[int]]:
        """Returns the positions of the blocks with parameters that need passes of their own, and which blocks share these passes.

        Those do that follow each other, and are of one tensor of residuals and of the same parameters.
        """
        groups = groupby(enumerate(self.blocks), lambda pair: (pair[1].term, sorted(pair[1].others)))
        return [[i for i, _ in group] for (_, others), group in groups if others]


class _MixedError(Exception):
    """A row of a product belongs to several residuals."""


def signature(uses: Sequence[Uses]) -> tuple[object, ...]:
    """Returns what is equal for residuals' graphs of one structure."""
    return tuple(u.signature for u in uses)


def make_plan(residuals: Sequence[Tensor], uses: Sequence[Uses], parameters: Sequence[Tensor]) -> Plan:
    """Finds which rows of each product are of which residual, by two backward passes with different numbers for the residuals.

    Args:
        residuals: tensors with their graphs.
        uses: the uses of parameters in each of these graphs.
        parameters: all parameters, which uses name by their positions.
    """
    blocks: list[Block] = []
    for term, (r, u) in enumerate(zip(residuals, uses, strict=True)):
        found, mixed = _blocks(term, Output(r, r), u, parameters)
        inner = _inner(r, u, parameters) if mixed else None
        if inner is not None:
            found = [Block(term, None, r.numel(), [], [], dict(u.others), inner, any(b.incomplete for b in inner.blocks))]
        blocks += found
    return _in_passes(signature(uses), blocks, uses)


def _in_passes(signature: tuple[object, ...], blocks: list[Block], uses: Sequence[Uses]) -> Plan:
    """Returns the plan in which blocks share a backward pass if they share no node, nor a tensor of residuals."""
    passes: list[tuple[set[Node], list[int]]] = []
    for i, block in enumerate(blocks):
        if not block.uses:
            continue
        nodes = {use.node for use in uses[block.term].uses}
        for taken, members in passes:
            if not taken & nodes and all(blocks[j].term != block.term for j in members):
                taken |= nodes
                members.append(i)
                break
        else:
            passes.append((nodes, [i]))
    return Plan(signature, blocks, [members for _, members in passes])


# --- the blocks of one tensor of residuals ---


def _blocks(term: int, r: Output, u: Uses, parameters: Sequence[Tensor]) -> tuple[list[Block], bool]:
    """Returns a tensor's residuals as one block or as several, and whether some row of a product still belongs to several."""
    whole, mixed = _block(term, None, r, u, parameters)
    if mixed:
        for pieces in _partitions(r):
            split: list[Block] = []
            for elements in pieces:
                block, still = _block(term, elements, r, u, parameters)
                if still:
                    break
                split.append(block)
            else:
                return split, False
    return [whole], mixed


def _partitions(r: Output) -> list[list[Tensor]]:
    """Returns ways to part a tensor's elements: by indices of one dimension, of all but the longest one, or as it was joined."""
    shape = r.like.shape
    positions = torch.arange(r.like.numel(), device=r.like.device).view(shape)
    last = len(shape) - 1
    ways: list[list[Tensor]] = []
    for dim in range(last, -1, -1):
        if 1 < shape[dim] <= PIECES and shape[dim] < r.like.numel():  # single residuals are one batch of passes
            ways.append([piece.flatten() for piece in positions.unbind(dim)])
    if len(shape) > 2:
        longest = max(range(len(shape)), key=lambda dim: shape[dim])
        lines = positions.movedim(longest, -1).flatten(0, -2)
        if 1 < len(lines) <= PIECES:
            ways.append(list(lines.unbind(0)))
    node: Any = r.edge.grad_fn if isinstance(r.edge, Tensor) else r.edge.node
    while node is not None and kind(node) in RESHAPING and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    if node is not None and kind(node) == "CatBackward" and 1 < len(node.next_functions) <= PIECES:
        made: list[Any] = [None if f is None else f._input_metadata[k].shape for f, k in node.next_functions]
        joined = node._input_metadata[0].shape
        dim = signed_dim(node._saved_dim) % len(joined)
        if all(one is not None and len(one) == len(joined) for one in made):
            pieces = positions.view(joined).split([one[dim] for one in made], dim)
            ways.append([piece.flatten() for piece in pieces if piece.numel()])
    return ways


def _inner(r: Tensor, u: Uses, parameters: Sequence[Tensor]) -> Plan | None:
    """Returns the plan of the products that residuals mix; None: products mix instances, too, or there are too many of them."""
    nodes = frontier(r, u) if r.numel() > 2 * BATCH else None
    if not nodes:
        return None
    # Multiplications for a residual: of its row of derivatives with the products' Jacobian, or of a backward pass of its own.
    columns = sum(output_of(node, r).like.numel() for node in nodes) * sum(p.numel() for p in parameters)
    own = sum(len(use.operand) * parameters[use.parameter].numel() for use in u.uses if use.operand is not None)
    if columns > min(INNER, SLOWNESS * own + NODE * len(u.signature)):
        return None
    index = {id(p): i for i, p in enumerate(parameters)}
    uses, blocks = [find_uses(node, index) for node in nodes], list[Block]()
    for term, (node, each) in enumerate(zip(nodes, uses, strict=True)):
        each = each._replace(others={p: name for p, name in each.others.items() if p not in u.others})
        found, mixed = _blocks(term, output_of(node, r), each, parameters)
        if mixed or any(block.others for block in found):
            return None
        blocks += found
    plan = _in_passes(signature(uses), blocks, uses)
    return plan if len(plan.passes) <= PIECES else None


def _block(term: int, elements: Tensor | None, r: Output, found: Uses, parameters: Sequence[Tensor]) -> tuple[Block, bool]:
    """Returns a block of these elements, and whether some use's rows belong to several of its residuals."""
    n = r.like.numel() if elements is None else len(elements)
    others = dict(found.others)
    nodes = list(dict.fromkeys(use.node for use in found.uses))
    numbers = 1 + torch.randperm(n, generator=torch.Generator().manual_seed(n), device="cpu").to(r.like) / n
    arriving = [gradients_at(nodes, [r.edge], [seed(r.like, elements, v)]) for v in (torch.ones_like(numbers), numbers)]
    taken: list[int] = []
    maps: list[Tensor | None] = []
    mixed = incomplete = False
    for k, use in enumerate(found.uses):
        if use.parameter in others:
            continue
        first, second = (a[use.node] for a in arriving)
        try:
            if first is None or second is None:
                continue
            one, two = use.rows(first), use.rows(second)
            _check_width(use, one, parameters[use.parameter])
            rows = _match(one, two, numbers)
            incomplete |= rows is not None and bool((rows == len(one)).all(1).any() and (rows < len(one)).sum() < len(one))
            maps.append(rows)
            taken.append(k)
        except _MixedError:
            mixed = True
            others[use.parameter] = use.node.name()
        except RuntimeError:  # of a shape that the use does not expect
            others[use.parameter] = use.node.name()
    keep = [i for i, k in enumerate(taken) if found.uses[k].parameter not in others]
    block = Block(term, elements, n, [taken[i] for i in keep], [maps[i] for i in keep], others, incomplete=incomplete)
    return block, mixed


# --- the rows of one use ---


def _check_width(use: Use, rows: Tensor, parameter: Tensor) -> None:
    """Raises RuntimeError where an outer product is not of the parameter's size, or of complex numbers."""
    if rows.is_complex():
        raise RuntimeError
    if use.operand is None:
        outer = rows[:1].unsqueeze(2)
    elif len(use.operand) != len(rows):
        raise RuntimeError
    else:
        pair = (use.operand[:1], rows[:1]) if use.swapped else (rows[:1], use.operand[:1])
        outer = pair[0].unsqueeze(2) * pair[1].unsqueeze(1)
    if (outer if use.back is None else use.back(outer)).numel() != parameter.numel():
        raise RuntimeError


def _match(one: Tensor, two: Tensor, numbers: Tensor) -> Tensor | None:
    """Finds which rows are of which residual: two = numbers * one there.

    Args:
        one: [rows, a], the gradients where every residual counts 1.
        two: [rows, a], the gradients where residual k counts numbers[k].
        numbers: [n], all different, in [1, 2).

    Returns:
        The rows of each residual [n, T], where the number of rows stands for none; None: row k is of residual k.

    Raises:
        _MixedError: a row is of several residuals.
    """
    n, rows = len(numbers), len(one)
    of_row, of_all = (1e-6, 1e-12) if one.dtype == torch.float64 else (1e-3, 1e-5)
    tolerance = of_row * one.norm(dim=1) + of_all * one.norm()  # residuals of one tensor may have units of their own

    def fits(owner: Tensor) -> bool:
        return bool(((two - numbers[owner].unsqueeze(1) * one).norm(dim=1) <= tolerance).all())

    positions = torch.arange(rows, device=one.device)
    if rows == n and fits(positions):
        return None
    if rows % n == 0:
        if fits(positions // (rows // n)):
            return positions.view(n, -1)
        if fits(positions % n):
            return positions.view(-1, n).T
    owner, used = _owners(one, two, numbers)
    owner_of_all = torch.zeros_like(positions)
    owner_of_all[used] = owner
    if not fits(owner_of_all):
        raise _MixedError
    return _rows_of_each(owner, positions[used], n, rows)


def _owners(one: Tensor, two: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the residual that each row with a gradient seems to belong to, and which rows these are; see `_match`.

    It is the one whose number comes closest to the ratio of the row's largest elements.
    """
    n, rows = len(numbers), len(one)
    positions = torch.arange(rows, device=one.device)
    size = one.abs()
    best = size.argmax(1, keepdim=True)
    used = size.amax(1) > 0
    ratio = (two.gather(1, best) / one.gather(1, best)).squeeze(1)[used]
    ordered, order = numbers.sort()
    right = torch.searchsorted(ordered, ratio.contiguous()).clamp(1, max(n - 1, 1))
    left = right - 1
    right = right.clamp(max=n - 1)
    owner = order[torch.where((ratio - ordered[left]).abs() <= (ordered[right] - ratio).abs(), left, right)]
    shift = int(positions[used][0] - owner[0]) if len(owner) else 0
    if rows > n and 0 <= shift <= rows - n and bool((positions[used] - owner == shift).all()):
        return positions[:n], (positions >= shift) & (positions < shift + n)  # a slice, with rows whose gradient is zero
    return owner, used


def _rows_of_each(owner: Tensor, positions: Tensor, n: int, rows: int) -> Tensor:
    """Returns the positions of each residual's rows [n, T], filled up with `rows`, from every position's owner."""
    counts = torch.bincount(owner, minlength=n)
    width = max(int(counts.max()), 1)
    by_owner = owner.argsort(stable=True)
    place = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner[by_owner]]
    rows_of_each = torch.full((n, width), rows, device=owner.device)
    rows_of_each[owner[by_owner], place] = positions[by_owner]
    return rows_of_each
