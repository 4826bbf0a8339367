"""The Jacobian of residuals w.r.t. parameters, all rows from one backward pass through the uses that the graph shows."""

import math
import warnings
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from secondorder import ops
from secondorder._tape.uses import Use, Uses
from secondorder.linalg import gram

# Residuals with a backward pass each are taken so many at a time by vmap, where no product's operand is larger: then it is nodes
# that cost. In small nets up to 14 times as fast as one after another, in large ones slower.
BATCH, BATCH_OPERAND = 32, 2**14
COLUMNS = 64  # the longest last dimension of a residual whose columns are taken one after another where rows share a product


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
    """

    term: int
    elements: Tensor | None
    size: int
    uses: list[int]
    rows: list[Tensor | None]
    others: dict[int, str]

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


def make_plan(residuals: Sequence[Tensor], uses: Sequence[Uses], parameters: Sequence[Tensor]) -> Plan:
    """Finds which rows of each product are of which residual, by two backward passes with different numbers for the residuals.

    Args:
        residuals: tensors with their graphs.
        uses: of each.
        parameters: by their positions.
    """
    blocks: list[Block] = []
    for term, (r, u) in enumerate(zip(residuals, uses, strict=True)):
        whole, mixed = _block(term, None, r, u, parameters)
        width = r.shape[-1] if r.ndim > 1 else 1
        if not mixed or not 1 < width <= COLUMNS:
            blocks.append(whole)
            continue
        positions = torch.arange(r.numel(), device=r.device)
        columns = [_block(term, positions[j::width], r, u, parameters) for j in range(width)]
        still = any(m for _, m in columns)
        blocks.extend([whole] if still else [block for block, _ in columns])
    passes: list[tuple[set[Node], list[int]]] = []
    for i, block in enumerate(blocks):
        nodes = {uses[block.term].uses[k].node for k in block.uses}
        for taken, members in passes:
            if not taken & nodes and all(blocks[j].term != block.term for j in members):
                taken |= nodes
                members.append(i)
                break
        else:
            passes.append((nodes, [i]))
    return Plan(signature(uses), blocks, [members for _, members in passes])


def _block(term: int, elements: Tensor | None, r: Tensor, found: Uses, parameters: Sequence[Tensor]) -> tuple[Block, bool]:
    """A block, and whether some use's rows belong to several of its residuals."""
    n = r.numel() if elements is None else len(elements)
    others = dict(found.others)
    edges = list(dict.fromkeys(use.node for use in found.uses))
    numbers = 1 + torch.randperm(n, generator=torch.Generator().manual_seed(n)).to(r) / n
    arriving = [_arriving([r], [_seed(r, elements, v)], edges) for v in (torch.ones_like(numbers), numbers)]
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


def _arriving(outputs: list[Tensor], seeds: list[Tensor], nodes: list[Node]) -> dict[Node, Tensor | None]:
    """The gradients that arrive at nodes."""
    if not nodes:
        return {}
    edges = [GradientEdge(node, 0) for node in nodes]
    found = torch.autograd.grad(outputs, edges, seeds, retain_graph=True, allow_unused=True)
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

    def matrix(self, name: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """An uninitialized matrix, the same memory for the same name."""
        memory = self._memory.get(name)
        if memory is None or len(memory) < rows * columns or (memory.dtype, memory.device) != (like.dtype, like.device):
            memory = self._memory[name] = like.new_empty(rows * columns)
        return memory[: rows * columns].view(rows, columns)


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
    parts: dict[int, list[Part]] = {}
    counts = [b.size if d is None else len(d) for b, d in zip(plan.blocks, drawn, strict=True)]
    ends = list(accumulate(counts))
    spans = [(end - count, end) for end, count in zip(ends, counts, strict=True)]
    for members in plan.passes:
        outputs, seeds, nodes = list[Tensor](), list[Tensor](), dict[Node, None]()
        for i in members:
            block, d = plan.blocks[i], drawn[i]
            r = residuals[block.term]
            elements = d if block.elements is None else block.elements if d is None else block.elements[d]
            outputs.append(r)
            seeds.append(_seed(r, elements, scales[i]))
            nodes.update(dict.fromkeys(uses[block.term].uses[k].node for k in block.uses))
        arriving = _arriving(outputs, seeds, list(nodes))
        for i, r, seed in zip(members, outputs, seeds, strict=True):
            block, d, span = plan.blocks[i], drawn[i], spans[i]
            for p, part in _parts(block, d, uses[block.term].uses, arriving, span, parameters[0].dtype).items():
                parts.setdefault(p, []).extend(part)
            if block.others:
                operands = [use.operand.numel() for use in uses[block.term].uses if use.operand is not None]
                batch = BATCH if max(operands, default=r.numel()) <= BATCH_OPERAND else 1
                others = [(p, parameters[p]) for p in block.others]
                for p, dense in _others(r, seed, block.chosen(d, r.device), others, batch).items():
                    parts.setdefault(p, []).append(Part(*span, [], dense))
    return Jacobian(spans, parameters, parts, buffer)


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
