"""The Jacobian of residuals w.r.t. parameters, all rows from one backward pass through the uses that the graph shows."""

import math
import warnings
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from secondorder import ops
from secondorder._tape.graph import RESHAPING
from secondorder._tape.residuals import kind, signed_dim
from secondorder._tape.uses import Use, Uses, find_uses, frontier
from secondorder.linalg import gram

# Residuals with a backward pass each are taken so many at a time by vmap, where no product's operand is larger: then it is nodes
# that cost. In small nets up to 14 times as fast as one after another, in large ones slower.
BATCH, BATCH_OPERAND = 32, 2**14
PIECES = 64  # of a tensor of residuals that are taken one after another where those of one piece share no row of a product
INNER = 2**24  # numbers of the Jacobian of the products that residuals mix, at most
SLOWNESS = 8  # what a product costs in a backward pass, rather than in one large product of matrices,
NODE = 10_000  # and a node in one of several backward passes that run together
SEEDS = 2**22  # numbers in what is sent back for several residuals at a time


class Block(NamedTuple):
    """Residuals whose rows come from one backward pass.

    Args:
        term: which tensor of residuals they are of.
        elements: their positions in it, flattened [n]; None: all.
        size: n.
        uses: those that are taken, by their position in the tensor's list.
        rows: for each, which rows of the product are of each residual [n, T], the number of rows standing for none; None: row i
            is of residual i.
        others: parameters whose columns or rows need backward passes of their own, and the nodes by which they enter.
        inner: of the products that the residuals are functions of, where each residual depends on rows of several instances and
            each product on its own ones alone: then J is the products' Jacobian times the residuals' derivatives by the products.
    """

    term: int
    elements: Tensor | None
    size: int
    uses: list[int]
    rows: list[Tensor | None]
    others: dict[int, str]
    inner: "Plan | None" = None

    def chosen(self, drawn: Tensor | None, device: torch.device) -> Tensor:
        """The positions in the tensor of those of the block's residuals that are drawn."""
        elements = torch.arange(self.size, device=device) if self.elements is None else self.elements
        return elements if drawn is None else elements[drawn]


class Plan(NamedTuple):
    """How the Jacobian of graphs of one structure is had."""

    signature: tuple[object, ...]
    blocks: list[Block]
    passes: list[list[int]]  # blocks that share no node, and so one backward pass


class _MixedError(Exception):
    """A row of a product belongs to several residuals."""


def signature(uses: Sequence[Uses]) -> tuple[object, ...]:
    """Equal for residuals' graphs of one structure."""
    return tuple(u.signature for u in uses)


class Output(NamedTuple):
    """What backward passes begin with."""

    edge: Tensor | GradientEdge
    like: Tensor  # of its shape and dtype


def make_plan(residuals: Sequence[Tensor], uses: Sequence[Uses], parameters: Sequence[Tensor]) -> Plan:
    """Finds which rows of each product are of which residual, by two backward passes with different numbers for the residuals.

    Args:
        residuals: tensors with their graphs.
        uses: of each.
        parameters: by their positions.
    """
    blocks: list[Block] = []
    for term, (r, u) in enumerate(zip(residuals, uses, strict=True)):
        found, mixed = _blocks(term, Output(r, r), u, parameters)
        inner = _inner(r, u, parameters) if mixed else None
        if inner is not None:
            found = [Block(term, None, r.numel(), [], [], dict(u.others), inner)]
        blocks += found
    return _in_passes(signature(uses), blocks, uses)


def _blocks(term: int, r: Output, u: Uses, parameters: Sequence[Tensor]) -> tuple[list[Block], bool]:
    """A tensor's residuals, whole or in pieces none of which mixes instances, and whether there are none such."""
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
    """Ways to part a tensor's elements: by the indices of one dimension, of all but the longest one, or by what was joined."""
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
    """The plan of the products that residuals mix; None: they do not keep instances apart either, or are too many."""
    nodes = frontier(r, u) if r.numel() > 2 * BATCH else None
    if not nodes:
        return None
    # Products for a residual: of its row of derivatives with the Jacobian, or of a backward pass of its own, in their measure.
    columns = sum(_output(node, r).like.numel() for node in nodes) * sum(p.numel() for p in parameters)
    own = sum(len(use.operand) * parameters[use.parameter].numel() for use in u.uses if use.operand is not None)
    if columns > min(INNER, SLOWNESS * own + NODE * len(u.signature)):
        return None
    index = {id(p): i for i, p in enumerate(parameters)}
    uses, blocks = [find_uses(node, index) for node in nodes], list[Block]()
    for term, (node, each) in enumerate(zip(nodes, uses, strict=True)):
        each = each._replace(others={p: name for p, name in each.others.items() if p not in u.others})
        found, mixed = _blocks(term, _output(node, r), each, parameters)
        if mixed or any(block.others for block in found):
            return None
        blocks += found
    plan = _in_passes(signature(uses), blocks, uses)
    return plan if len(plan.passes) <= PIECES else None


def _output(node: Any, r: Tensor) -> Output:
    made = node._input_metadata[0]
    return Output(GradientEdge(node, 0), torch.empty(made.shape, dtype=made.dtype, device=r.device))


def _in_passes(signature: tuple[object, ...], blocks: list[Block], uses: Sequence[Uses]) -> Plan:
    """Blocks whose tensors share no node are taken together."""
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


def _block(term: int, elements: Tensor | None, r: Output, found: Uses, parameters: Sequence[Tensor]) -> tuple[Block, bool]:
    """A block, and whether some use's rows belong to several of its residuals."""
    n = r.like.numel() if elements is None else len(elements)
    others = dict(found.others)
    edges = list(dict.fromkeys(use.node for use in found.uses))
    numbers = 1 + torch.randperm(n, generator=torch.Generator().manual_seed(n)).to(r.like) / n
    arriving = [_arriving([r.edge], [_seed(r.like, elements, v)], edges) for v in (torch.ones_like(numbers), numbers)]
    taken: list[int] = []
    maps: list[Tensor | None] = []
    mixed = False
    for k, use in enumerate(found.uses):
        if use.parameter in others:
            continue
        first, second = (a[use.node] for a in arriving)
        try:
            if first is None or second is None:
                continue
            one, two = use.rows(first), use.rows(second)
            _check_width(use, one, parameters[use.parameter])
            maps.append(_match(one, two, numbers))
            taken.append(k)
        except _MixedError:
            mixed = True
            others[use.parameter] = use.node.name()
        except RuntimeError:  # of a shape that the use does not expect
            others[use.parameter] = use.node.name()
    keep = [i for i, k in enumerate(taken) if found.uses[k].parameter not in others]
    return Block(term, elements, n, [taken[i] for i in keep], [maps[i] for i in keep], others), mixed


def _check_width(use: Use, rows: Tensor, parameter: Tensor) -> None:
    """Raises RuntimeError where an outer product is not of the parameter's size."""
    if use.operand is None:
        numel = rows.shape[1]
    elif len(use.operand) != len(rows):
        raise RuntimeError
    else:
        pair = (use.operand[:1], rows[:1]) if use.swapped else (rows[:1], use.operand[:1])
        outer = pair[0].unsqueeze(2) * pair[1].unsqueeze(1)
        numel = (outer if use.back is None else use.back(outer)).numel()
    if numel != parameter.numel():
        raise RuntimeError


def _match(one: Tensor, two: Tensor, numbers: Tensor) -> Tensor | None:
    """Which rows are of which residual: two = numbers * one there.

    Args:
        one: [rows, a], the gradients where every residual counts 1.
        two: the same where residual k counts numbers[k].
        numbers: [n], all different, in [1, 2).

    Returns:
        [n, T], or None: row k is of residual k.

    Raises:
        _MixedError: a row is of several.
    """
    n, rows = len(numbers), len(one)
    tolerance = (1e-6 if one.dtype == torch.float64 else 1e-3) * float(two.norm())

    def fits(owner: Tensor) -> bool:
        return float((two - numbers[owner].unsqueeze(1) * one).norm()) <= tolerance

    positions = torch.arange(rows, device=one.device)
    if rows == n and fits(positions):
        return None
    if rows % n == 0:
        if fits(positions // (rows // n)):
            return positions.view(n, -1)
        if fits(positions % n):
            return positions.view(-1, n).T
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
        owner, used = positions[:n], (positions >= shift) & (positions < shift + n)  # a slice, with rows whose gradient is zero
    everyone = torch.zeros_like(positions)
    everyone[used] = owner
    if not fits(everyone):
        raise _MixedError
    counts = torch.bincount(owner, minlength=n)
    width = max(int(counts.max()), 1)
    by_owner = owner.argsort(stable=True)
    place = torch.arange(len(owner), device=one.device) - (counts.cumsum(0) - counts)[owner[by_owner]]
    table = torch.full((n, width), rows, device=one.device)
    table[owner[by_owner], place] = positions[used][by_owner]
    return table


def _seed(r: Tensor, elements: Tensor | None, values: Tensor) -> Tensor:
    """Weights of a tensor's elements, zero but for those of a block."""
    if elements is None:
        return values.to(r.dtype).view(r.shape)
    seed = r.new_zeros(r.numel())
    seed[elements] = values.to(r.dtype)
    return seed.view(r.shape)


def _arriving(outputs: Sequence[Tensor | GradientEdge], seeds: list[Tensor], nodes: list[Node]) -> dict[Node, Tensor | None]:
    """The gradients that arrive at nodes."""
    if not nodes:
        return {}
    edges = [GradientEdge(node, 0) for node in nodes]
    found = torch.autograd.grad(outputs, edges, seeds, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
    return dict(zip(nodes, found, strict=True))


class Piece(NamedTuple):
    """What a product adds to a parameter's columns: for residual k the outer products of its rows `rows[k]`."""

    left: Tensor  # [R, a]
    right: Tensor | None  # [R, b]; None: the parameter is a vector
    rows: Tensor | None  # [m, T], R standing for none; None: row k is of residual k


class Part:
    """A parameter's columns for the rows from `start` to `stop`: a sum of pieces, or `dense` [m, numel]."""

    def __init__(self, start: int, stop: int, pieces: list[Piece], dense: Tensor | None = None):
        self.start, self.stop, self.pieces, self.dense = start, stop, pieces, dense
        self._factors: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """U, a and b."""
        uses = sum(1 if piece.rows is None else piece.rows.shape[1] for piece in self.pieces)
        left, right, _ = self.pieces[0]
        return uses, left.shape[1], 1 if right is None else right.shape[1]

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """L [m, U, a] and R [m, U, b] with columns sum over u of outer(L_u, R_u)."""
        if self._factors is None:
            left = [_taken(piece.left, piece.rows) for piece in self.pieces]
            right = [
                torch.ones_like(each[:, :, :1]) if piece.right is None else _taken(piece.right, piece.rows)
                for each, piece in zip(left, self.pieces, strict=True)
            ]
            self._factors = (left[0], right[0]) if len(left) == 1 else (torch.cat(left, 1), torch.cat(right, 1))
        return self._factors


class Buffer:
    """Memory that serves one step after another, since fresh memory costs as much as what is written there."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}
        self._within: Buffer | None = None

    def matrix(self, name: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """An uninitialized matrix, the same memory for the same name."""
        memory = self._memory.get(name)
        if memory is None or len(memory) < rows * columns or (memory.dtype, memory.device) != (like.dtype, like.device):
            memory = self._memory[name] = like.new_empty(rows * columns)
        return memory[: rows * columns].view(rows, columns)

    def within(self) -> "Buffer":
        """Memory for a product's own Jacobian."""
        self._within = self._within or Buffer()
        return self._within


class Jacobian:
    """J [m, P] of weighted residuals, as the factors of its rows until `dense` is asked for.

    Args:
        spans: the first row of each block, and the one after its last.
        parameters: whose columns follow one another.
        parts: of each parameter, by its position.
        buffer: memory for J and J J^T.
    """

    def __init__(self, spans: list[tuple[int, int]], parameters: Sequence[Tensor], parts: dict[int, list[Part]], buffer: Buffer):
        self._spans, self.parts, self._buffer = spans, parts, buffer
        self.rows = spans[-1][1]
        self.offsets = [0]
        for p in parameters:
            self.offsets.append(self.offsets[-1] + p.numel())
        self.columns = self.offsets[-1]
        self.like = parameters[0]
        self.itemsize = self.like.element_size()
        self._dense: Tensor | None = None

    def dense(self) -> Tensor:
        """J [m, P], kept from now on."""
        if self._dense is None:
            self._dense = self._buffer.matrix("jacobian", self.rows, self.columns, self.like)
            self._write(self._dense, range(len(self.offsets) - 1))
        return self._dense

    def _write(self, target: Tensor, parameters: Sequence[int]) -> None:
        """Writes the columns of consecutive parameters."""
        first = self.offsets[parameters[0]]
        pieces, start, offset = list[Piece](), list[int](), list[int]()
        for p in parameters:
            written = set()
            for part in self.parts.get(p, []):
                pieces += part.pieces
                start += [part.start] * len(part.pieces)
                offset += [self.offsets[p] - first] * len(part.pieces)
                written |= {part.start} if part.pieces else set()
            for begin, end in self._spans:
                if begin not in written:
                    target[begin:end, self.offsets[p] - first : self.offsets[p + 1] - first] = 0
        none = torch.empty(0, dtype=torch.int64, device=target.device)
        ops.jacobian_rows_(
            target,
            [piece.left for piece in pieces],
            [target.new_empty(0) if piece.right is None else piece.right for piece in pieces],
            [none if piece.rows is None else piece.rows for piece in pieces],
            start,
            offset,
        )
        for p in parameters:
            for part in self.parts.get(p, []):
                if part.dense is not None:
                    target[part.start : part.stop, self.offsets[p] - first : self.offsets[p + 1] - first] += part.dense

    def mv(self, v: Tensor) -> Tensor:
        """J v [m]."""
        return self.mm(v.unsqueeze(1)).squeeze(1)

    def rmv(self, u: Tensor) -> Tensor:
        """J^T u [P]."""
        return self.rmm(u.unsqueeze(1)).squeeze(1)

    def mm(self, v: Tensor) -> Tensor:
        """J V [m, k] for V [P, k]."""
        if self._dense is not None:
            return self._dense @ v
        result = v.new_zeros(self.rows, v.shape[1])
        for p, parts in self.parts.items():
            columns = v[self.offsets[p] : self.offsets[p + 1]]
            for part in parts:
                rows = result[part.start : part.stop]
                if part.dense is not None:
                    rows += part.dense @ columns
                else:
                    left, right = part.factors
                    matrices = columns.view(left.shape[2], right.shape[2], -1)
                    for j in range(v.shape[1]):
                        rows[:, j] += (left @ matrices[:, :, j] * right).sum((1, 2))
        return result

    def rmm(self, u: Tensor) -> Tensor:
        """J^T U [P, k] for U [m, k]."""
        if self._dense is not None:
            return self._dense.T @ u
        result = u.new_zeros(self.columns, u.shape[1])
        for p, parts in self.parts.items():
            columns = result[self.offsets[p] : self.offsets[p + 1]]
            for part in parts:
                weights = u[part.start : part.stop]
                if part.dense is not None:
                    columns += part.dense.T @ weights
                else:
                    left, right = part.factors
                    for j in range(u.shape[1]):
                        weighted = (left * weights[:, j].view(-1, 1, 1)).flatten(0, 1)
                        columns[:, j] += (weighted.T @ right.flatten(0, 1)).flatten()
        return result

    def squared_norm(self) -> Tensor:
        """tr(J J^T)."""
        if self._dense is not None:
            return self._dense.flatten() @ self._dense.flatten()
        total = self.like.new_zeros(())
        for p in self.parts:
            total = total + self._columns(p).square().sum()
        return total

    def _columns(self, parameter: int) -> Tensor:
        columns = self.like.new_empty(self.rows, self.offsets[parameter + 1] - self.offsets[parameter])
        self._write(columns, [parameter])
        return columns

    def prefers_dense(self) -> bool:
        """Whether J is worth its memory: whether J J^T by it does not cost four times what it costs from the factors."""
        numel = [self.offsets[p + 1] - self.offsets[p] for p in self.parts]
        least = [min(n, self._factor_cost(p)) for n, p in zip(numel, self.parts, strict=True)]
        return 4 * sum(least) > sum(numel)

    def _factor_cost(self, parameter: int) -> float:
        """Products for an entry of a parameter's J J^T from its factors: U^2 (a + b), where by its columns they are a b."""
        parts = self.parts[parameter]
        if any(part.dense is not None for part in parts) or len({(part.start, part.stop) for part in parts}) < len(parts):
            return math.inf
        shapes = [part.shape for part in parts]
        return max(uses for uses, _, _ in shapes) ** 2 * (shapes[0][1] + shapes[0][2])

    def gram(self) -> Tensor:
        """J J^T [m, m], at least its lower triangle."""
        result = self._buffer.matrix("gram", self.rows, self.rows, self.like)
        if self._dense is not None:
            return gram(self._dense, result)
        result.zero_()
        for p, parts in self.parts.items():
            if self._factor_cost(p) > self.offsets[p + 1] - self.offsets[p]:
                result += gram(self._columns(p), torch.empty_like(result)).tril_()
                continue
            for first in parts:
                for second in parts:
                    if second.start <= first.start:
                        block = result[first.start : first.stop, second.start : second.stop]
                        block += _gram_from_factors(first, second)
        return result


def _gram_from_factors(first: Part, second: Part) -> Tensor:
    """Sums over uses u, v of (L_u L_v^T) * (R_u R_v^T) [m, m']."""
    (left, right), (left2, right2) = first.factors, second.factors
    total = left.new_zeros(len(left), len(left2))
    for u in range(left.shape[1]):
        for v in range(left2.shape[1]):
            total.addcmul_(left[:, u] @ left2[:, v].T, right[:, u] @ right2[:, v].T)
    return total


def jacobian(
    plan: Plan, residuals: Sequence[Tensor], uses: Sequence[Uses], parameters: Sequence[Tensor], scales: Sequence[Tensor],
    drawn: Sequence[Tensor | None], buffer: Buffer,
) -> Jacobian:  # fmt: skip
    """The rows of some residuals, each times a scale.

    Args:
        plan: for graphs of this structure.
        residuals: tensors with their graphs.
        uses: of each.
        parameters: by their positions.
        scales: of each block's residuals [n], or of those drawn.
        drawn: of each block, the positions among its residuals that are wanted; None: all.
        buffer: memory for J.
    """
    spans, parts = _rows_by_uses(plan, [Output(r, r) for r in residuals], uses, parameters, scales, drawn)
    for block, d, scale, span in zip(plan.blocks, drawn, scales, spans, strict=True):
        r, elements = residuals[block.term], block.chosen(d, scale.device)
        if block.inner is not None:
            for p, dense in _by_inner(block.inner, r, elements, scale, uses[block.term], parameters, buffer).items():
                if p not in block.others:
                    parts.setdefault(p, []).append(Part(*span, [], dense))
        if block.others:
            operands = [use.operand.numel() for use in uses[block.term].uses if use.operand is not None]
            batch = BATCH if max(operands, default=r.numel()) <= BATCH_OPERAND else 1
            others = [(p, parameters[p]) for p in block.others]
            for p, dense in _others(r, _seed(r, elements, scale), elements, others, batch).items():
                parts.setdefault(p, []).append(Part(*span, [], dense))
    return Jacobian(spans, parameters, parts, buffer)


def _rows_by_uses(
    plan: Plan, outputs: Sequence[Output], uses: Sequence[Uses], parameters: Sequence[Tensor], scales: Sequence[Tensor],
    drawn: Sequence[Tensor | None],
) -> tuple[list[tuple[int, int]], dict[int, list[Part]]]:  # fmt: skip
    """The rows of each block, and what the uses make of them."""
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
            seeds.append(_seed(outputs[block.term].like, elements, scales[i]))
            nodes.update(dict.fromkeys(uses[block.term].uses[k].node for k in block.uses))
        arriving = _arriving(edges, seeds, list(nodes))
        for i in members:
            block = plan.blocks[i]
            for p, part in _parts(block, drawn[i], uses[block.term].uses, arriving, spans[i], parameters[0].dtype).items():
                parts.setdefault(p, []).extend(part)
    return spans, parts


def _by_inner(
    plan: Plan, r: Tensor, elements: Tensor, scale: Tensor, u: Uses, parameters: Sequence[Tensor], buffer: Buffer
) -> dict[int, Tensor]:
    """Columns [m, numel] of residuals that mix rows of products: their derivatives by the products, times the products' own."""
    nodes = frontier(r, u)
    assert nodes is not None
    outputs, index = [_output(node, r) for node in nodes], {id(p): i for i, p in enumerate(parameters)}
    uses = [find_uses(node, index) for node in nodes]
    found = [scale.new_zeros(len(elements), output.like.numel()) for output in outputs]
    step = max(1, SEEDS // max(r.numel(), *(output.like.numel() for output in outputs)))
    for chosen, weights, start in zip(elements.split(step), scale.split(step), range(0, len(elements), step), strict=False):
        seeds = r.new_zeros(len(chosen), r.numel()).scatter_(1, chosen.unsqueeze(1), weights.to(r.dtype).unsqueeze(1))
        gradients = _batched(r, [output.edge for output in outputs], seeds.view(-1, *r.shape))
        for each, gradient in zip(found, gradients, strict=True):
            if gradient is not None:
                each[start : start + len(chosen)] = gradient.reshape(len(chosen), -1)
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
    inner = Jacobian(spans, parameters, parts, buffer.within()).dense()
    product = torch.cat(factors, 1) @ inner
    return {p: product[:, start:end] for p, (start, end) in enumerate(_spans(parameters)) if p in parts}


def _spans(parameters: Sequence[Tensor]) -> list[tuple[int, int]]:
    ends = list(accumulate(p.numel() for p in parameters))
    return [(end - p.numel(), end) for end, p in zip(ends, parameters, strict=True)]


def _batched(r: Tensor, inputs: Sequence[Any], seeds: Tensor) -> Sequence[Tensor | None]:
    """Gradients [k, ...] for as many seeds; by vmap, or one after another where it does not know a node."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # vmap tells of nodes that it takes one after another
            return torch.autograd.grad(r, inputs, seeds, retain_graph=True, allow_unused=True, is_grads_batched=True)
    except RuntimeError:
        each = [torch.autograd.grad(r, inputs, seed, retain_graph=True, allow_unused=True) for seed in seeds]
        return [None if gs[0] is None else torch.stack(gs) for gs in zip(*each, strict=True)]


def _parts(
    block: Block,
    drawn: Tensor | None,
    uses: list[Use],
    arriving: dict[Node, Tensor | None],
    span: tuple[int, int],
    dtype: torch.dtype,
) -> dict[int, list[Part]]:
    """What a block's uses add to each parameter's columns, in the parameters' dtype, also where data in float64 promote."""
    pieces: dict[int, list[Piece]] = {}
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
            pieces.setdefault(use.parameter, []).append(piece)
        else:
            left, right = Part(*span, [piece]).factors
            dense = use.back(torch.bmm(left.mT, right)).flatten(1)
            found.setdefault(use.parameter, []).append(Part(*span, [], dense))
    for p, each in pieces.items():
        found.setdefault(p, []).append(Part(*span, each))
    return found


def _taken(rows: Tensor, wanted: Tensor | None) -> Tensor:
    """Rows [m, T, a] by their positions [m, T], where the number of rows stands for a row of zeros."""
    if wanted is None:
        return rows.unsqueeze(1)
    inside = wanted < len(rows)
    taken = rows[wanted.clamp(max=len(rows) - 1)]
    return taken if bool(inside.all()) else taken * inside.unsqueeze(2)


def _others(
    r: Tensor, seed: Tensor, elements: Tensor, parameters: list[tuple[int, Tensor]], batch: int
) -> dict[int, Tensor]:  # fmt: skip
    """Columns [m, numel] of parameters that enter otherwise: two backward passes a column, or one a row where that is less."""
    found: dict[int, Tensor] = {}
    few = [(p, t) for p, t in parameters if 2 * t.numel() <= len(elements)]
    with suppress(RuntimeError):  # a compiled graph has no second derivatives
        found.update(_columns(r, seed, elements, few))
    rest = [(p, t) for p, t in parameters if p not in found]
    if rest:
        rows = _rows(r, seed.flatten(), elements, [t for _, t in rest], batch)
        found.update({p: each for (p, _), each in zip(rest, rows, strict=True)})
    return found


def _rows(r: Tensor, seed: Tensor, elements: Tensor, parameters: list[Tensor], batch: int) -> list[Tensor]:
    """Columns [m, numel] of parameters, by a backward pass for each element, or for so many together."""
    found = [r.new_zeros(len(elements), t.numel(), dtype=t.dtype) for t in parameters]
    for start in range(0, len(elements), batch):
        chosen = elements[start : start + batch]
        ones = seed.new_zeros(len(chosen), len(seed))
        ones.scatter_(1, chosen.unsqueeze(1), seed[chosen].unsqueeze(1))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # vmap tells of nodes that it takes one after another
                gradients = torch.autograd.grad(
                    r, parameters, (ones if batch > 1 else ones[0]).view(*ones.shape[: batch > 1], *r.shape),
                    retain_graph=True, allow_unused=True, is_grads_batched=batch > 1,
                )  # fmt: skip
        except RuntimeError:
            if batch == 1:
                raise
            return _rows(r, seed, elements, parameters, 1)  # vmap does not know all nodes, as those of compiled graphs
        for each, gradient in zip(found, gradients, strict=True):
            if gradient is not None:
                each[start : start + len(chosen)] = gradient.reshape(len(chosen), -1)
    return found


def _columns(r: Tensor, seed: Tensor, elements: Tensor, parameters: list[tuple[int, Tensor]]) -> dict[int, Tensor]:
    """Columns [m, numel] of parameters, by backward passes through a backward pass."""
    found: dict[int, Tensor] = {}
    if not parameters:
        return found
    dual, weights = seed.detach().requires_grad_(), seed.flatten()[elements].unsqueeze(1)
    with torch.enable_grad():
        gradients = [
            None if g is None else g.flatten()
            for g in torch.autograd.grad(r, [t for _, t in parameters], dual, create_graph=True, allow_unused=True)
        ]
    for (p, t), gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            found[p] = r.new_zeros(len(elements), t.numel())
        elif gradient.requires_grad:
            ones = torch.eye(len(gradient), dtype=r.dtype, device=r.device)
            columns = [torch.autograd.grad(gradient, dual, one, retain_graph=True)[0].flatten()[elements] for one in ones]
            found[p] = torch.stack(columns, 1) * weights
    return found
