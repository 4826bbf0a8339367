"""A Jacobian as the factors of its rows: for one parameter a row is a sum of outer products."""

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from secondorder import ops
from secondorder.linalg import gram


class Piece(NamedTuple):
    """What one matrix product adds to a parameter's columns: to row k the outer products of its factors' rows `rows[k]`."""

    left: Tensor  # [R, a]
    right: Tensor | None  # [R, b]; None: the parameter is a vector
    rows: Tensor | None  # [m, T], where R stands for none; None: to row k that of the factors' row k

    @property
    def sizes(self) -> tuple[int, int]:
        """Returns the sizes a and b of the factors."""
        return self.left.shape[1], 1 if self.right is None else self.right.shape[1]


class Part:
    """A parameter's columns in the rows from `start` to `stop`: the sum of pieces of equal sizes, or `dense` [m, numel]."""

    def __init__(self, start: int, stop: int, pieces: list[Piece], dense: Tensor | None = None):
        self.start, self.stop, self.pieces, self.dense = start, stop, pieces, dense
        self._factors: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Returns the sizes U, a and b of the factors."""
        uses = sum(1 if piece.rows is None else piece.rows.shape[1] for piece in self.pieces)
        return uses, *self.pieces[0].sizes

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Returns L [m, U, a] and R [m, U, b]: the columns are the sum over u of outer(L_u, R_u)."""
        if self._factors is None:
            left = [_taken(piece.left, piece.rows) for piece in self.pieces]
            right = [
                torch.ones_like(each[:, :, :1]) if piece.right is None else _taken(piece.right, piece.rows)
                for each, piece in zip(left, self.pieces, strict=True)
            ]
            self._factors = (left[0], right[0]) if len(left) == 1 else (torch.cat(left, 1), torch.cat(right, 1))
        return self._factors

    @classmethod
    def joined(cls, parts: "list[Part]") -> "Part":
        """Returns parts of consecutive rows, whose factors are of equal sizes, as one."""
        if len(parts) == 1:
            return parts[0]
        found = cls(parts[0].start, parts[-1].stop, [])
        left, right = zip(*(part.factors for part in parts), strict=True)
        found._factors = torch.cat(left), torch.cat(right)
        return found

    def matrices(self) -> Tensor:
        """Returns the columns of pieces [m, a, b]."""
        left, right = self.factors
        return torch.bmm(left.mT, right)


def _taken(rows: Tensor, wanted: Tensor | None) -> Tensor:
    """Returns rows [m, T, a] by their positions [m, T], where the number of rows stands for a row of zeros."""
    if wanted is None:
        return rows.unsqueeze(1)
    inside = wanted < len(rows)
    taken = rows[wanted.clamp(max=len(rows) - 1)]
    return taken if bool(inside.all()) else taken * inside.unsqueeze(2)


class Buffer:
    """Memory that serves one step after another, since fresh memory costs as much as what is written there."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}
        self._within: Buffer | None = None

    def matrix(self, name: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """Returns an uninitialized matrix, of the same memory for the same name."""
        memory = self._memory.get(name)
        if memory is None or len(memory) < rows * columns or (memory.dtype, memory.device) != (like.dtype, like.device):
            memory = self._memory[name] = like.new_empty(rows * columns)
        return memory[: rows * columns].view(rows, columns)

    def within(self) -> "Buffer":
        """Returns other memory, for a Jacobian that is a factor of this one's."""
        self._within = self._within or Buffer()
        return self._within


class Jacobian:
    """J [m, P] of weighted residuals, kept as the factors of its rows until `dense` is called.

    Args:
        spans: the first row of each block of rows, and the one after its last.
        parameters: the parameters, whose columns follow one another.
        parts: the parts of each parameter's columns, by the parameter's position.
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
        self._dense: Tensor | None = None
        self._joined: dict[int, list[Part]] = {}

    def dense(self) -> Tensor:
        """Returns J [m, P], and keeps it from now on."""
        if self._dense is None:
            self._dense = self._buffer.matrix("jacobian", self.rows, self.columns, self.like)
            self._write(self._dense, range(len(self.offsets) - 1))
        return self._dense

    def _write(self, target: Tensor, parameters: Sequence[int]) -> None:
        """Writes the columns of consecutive parameters to `target`."""
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

    def column_norms(self, penalties: Tensor | None) -> Tensor:
        """Returns the norms [P] of J's columns, and of the roots of penalties below them."""
        norms = torch.linalg.vector_norm(self.dense(), dim=0, dtype=torch.float64).to(self.like.dtype)
        return norms if penalties is None else torch.hypot(norms, penalties.sqrt())

    def times(self, scales: Tensor | float) -> "Jacobian":
        """Returns J diag(scales), formed."""
        found = copy.copy(self)
        found._dense = self.dense() * scales
        return found

    def mv(self, v: Tensor) -> Tensor:
        """Returns J v [m]."""
        return self.mm(v.unsqueeze(1)).squeeze(1)

    def rmv(self, u: Tensor) -> Tensor:
        """Returns J^T u [P]."""
        return self.rmm(u.unsqueeze(1)).squeeze(1)

    def mm(self, v: Tensor) -> Tensor:
        """Returns J V [m, k] for V [P, k]."""
        if self._dense is not None:
            return self._dense @ v
        result = v.new_zeros(self.rows, v.shape[1])
        for p in self.parts:
            columns = v[self.offsets[p] : self.offsets[p + 1]]
            for part in self._of(p):
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
        """Returns J^T U [P, k] for U [m, k]."""
        if self._dense is not None:
            return self._dense.T @ u
        result = u.new_zeros(self.columns, u.shape[1])
        for p in self.parts:
            columns = result[self.offsets[p] : self.offsets[p + 1]]
            for part in self._of(p):
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
        """Returns tr(J J^T)."""
        if self._dense is not None:
            return self._dense.flatten() @ self._dense.flatten()
        total = self.like.new_zeros(())
        for p in self.parts:
            total = total + self._columns(p).square().sum()
        return total

    def _of(self, parameter: int) -> list[Part]:
        """Returns a parameter's parts, as few as there can be: what many small tensors of residuals are made of is joined."""
        if parameter not in self._joined:
            groups: list[list[Part]] = []
            for part in sorted(self.parts[parameter], key=lambda part: part.start):
                last = groups[-1][-1] if groups else None
                follows = last is not None and last.stop == part.start and last.dense is None is part.dense
                if last is not None and follows and last.shape == part.shape:
                    groups[-1].append(part)
                else:
                    groups.append([part])
            self._joined[parameter] = [Part.joined(group) for group in groups]
        return self._joined[parameter]

    def _columns(self, parameter: int) -> Tensor:
        """Returns the columns [m, numel] of one parameter."""
        columns = self.like.new_empty(self.rows, self.offsets[parameter + 1] - self.offsets[parameter])
        self._write(columns, [parameter])
        return columns

    def prefers_dense(self) -> bool:
        """Returns whether J is worth its memory: J J^T from J costs less than four times what it costs from the factors."""
        numel = [self.offsets[p + 1] - self.offsets[p] for p in self.parts]
        least = [min(n, self._factor_cost(p)) for n, p in zip(numel, self.parts, strict=True)]
        return 4 * sum(least) > sum(numel)

    def _factor_cost(self, parameter: int) -> float:
        """Returns how many multiplications an entry of a parameter's J J^T takes from factors: U^2 (a + b); from columns a b."""
        parts = self.parts[parameter]
        if any(part.dense is not None for part in parts) or len({(part.start, part.stop) for part in parts}) < len(parts):
            return math.inf
        shapes = [part.shape for part in parts]
        return max(uses for uses, _, _ in shapes) ** 2 * (shapes[0][1] + shapes[0][2])

    def gram(self) -> Tensor:
        """Returns J J^T [m, m], at least its lower triangle."""
        result = self._buffer.matrix("gram", self.rows, self.rows, self.like)
        if self._dense is not None:
            return gram(self._dense, result)
        result.zero_()
        for p in self.parts:
            if self._factor_cost(p) > self.offsets[p + 1] - self.offsets[p]:
                result += gram(self._columns(p), torch.empty_like(result)).tril_()
                continue
            for first in self._of(p):
                for second in self._of(p):
                    if second.start <= first.start:
                        block = result[first.start : first.stop, second.start : second.stop]
                        block += _gram_from_factors(first, second)
        return result


def _gram_from_factors(first: Part, second: Part) -> Tensor:
    """Returns the sum over u and v of (L_u L_v^T) * (R_u R_v^T) [m, m'], the product of two parts of the same columns."""
    (left, right), (left2, right2) = first.factors, second.factors
    total = left.new_zeros(len(left), len(left2))
    for u in range(left.shape[1]):
        for v in range(left2.shape[1]):
            total.addcmul_(left[:, u] @ left2[:, v].T, right[:, u] @ right2[:, v].T)
    return total
