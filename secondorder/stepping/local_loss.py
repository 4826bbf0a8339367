"""The recorded loss as a function of the parameters, on a subsample of the batch: trial losses, and its quadratic terms."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.utils._pytree import tree_map

from secondorder._distributed import RankReducer
from secondorder._random import SeededReplay
from secondorder._tape import LossCall, Tape
from secondorder._tensors import to_compute_dtype
from secondorder.stepping.gauss_newton_product import CriterionAtOutput, LinearChain, linear_chain

# Fewer say too little about a batch's loss for a step to be judged by them.
_LEAST_INSTANCES = 100


@dataclass
class Subsample:
    """The kept instances of one recorded loss."""

    args: tuple[Any, ...]  # of the model
    kwargs: dict[str, Any]
    targets: tuple[Any, ...]  # of the criterion, after the output
    options: dict[str, Any]
    scale: float  # the loss enters with this factor
    chain: LinearChain | None


class LocalLoss:
    """The recorded loss as a function of the parameters, on a subsample of every recorded batch.

    Random layers draw the same numbers at each evaluation; buffers are left alone.

    Args:
        model: the recorded model.
        criterion: the recorded criterion; a mean over the instances, or a sum where its `reduction` says so.
        losses: what the tape recorded.
        parameters: what it is a function of, with their names in the model.
        fraction: of each batch, in (0, 1]; but at least 100 instances, or all.
        offset: which instances: every (1 / fraction)-th from this one on.
        tape: muted during the evaluations.
        ranks: whose losses' mean it is; None: this process's alone.

    Raises:
        RuntimeError: the criterion was not called on the model's own output.
    """

    def __init__(
        self, model: nn.Module, criterion: nn.Module, losses: list[LossCall], parameters: dict[Tensor, str], fraction: float,
        offset: int, tape: Tape, ranks: RankReducer | None = None,
    ):  # fmt: skip
        self.model, self.criterion, self.names, self.tape = model, criterion, list(parameters.values()), tape
        self.ranks = ranks
        self.here = [p.detach() for p in parameters]
        self._replay = SeededReplay(offset, self.here)
        self.pieces: list[Subsample] = []
        self._instances = 0
        for loss in losses:
            if loss.inputs is None:
                raise RuntimeError(
                    "the quadratic model evaluates the net anew: the criterion must be called on the very tensor that the model "
                    "returned, as in criterion(model(x), y); for any other use take EACG, which has a learning rate instead"
                )
            batch = _batch_size((loss.inputs.args, loss.inputs.kwargs))
            self._instances += batch
            stride = max(1, min(round(1 / fraction), batch // _LEAST_INSTANCES))
            keep = slice(offset % stride, None, stride)
            scale = 1.0 if loss.scale is None else float(loss.scale)
            if getattr(criterion, "reduction", "mean") == "sum":
                scale *= batch / len(range(batch)[keep])
            arguments = (loss.inputs.args, loss.inputs.kwargs, loss.args, loss.kwargs)
            args, kwargs, targets, options = _kept_rows(arguments, batch, keep)
            chain = linear_chain(loss, list(parameters), batch)
            self.pieces.append(Subsample(args, kwargs, targets, options, scale, chain and chain.rows(keep)))

    def value(self, parameters: list[Tensor]) -> float:
        """The loss at these values."""
        return self._mean(lambda: self._value(parameters))

    def _value(self, parameters: list[Tensor]) -> float:
        total = 0.0
        with torch.no_grad(), self._replayed():
            for piece in self.pieces:
                output = self._output(parameters, piece)
                total += piece.scale * float(self.criterion(output, *piece.targets, **piece.options))
        return total

    @functools.cached_property
    def start(self) -> float:
        """The loss at the parameters' own values."""
        pairs = zip(self.pieces, self._at_outputs, strict=True)
        return self._mean(lambda: sum(piece.scale * float(at.loss) for piece, at in pairs))

    @property
    def instances(self) -> int:
        """How many instances the batches have, of all ranks."""
        return round(self._mean(lambda: self._instances) * (1 if self.ranks is None else self.ranks.size))

    def _mean(self, compute: Callable[[], float]) -> float:
        """The mean over ranks."""
        if self.ranks is None:
            return compute()
        return float(self.ranks.mean(lambda: torch.tensor(compute(), dtype=torch.float64)))

    def products(self, vectors: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
        """x_k^T g [k] and x_k^T G x_l [k, k], for vectors x_k of the parameters' shapes, in float64 on the CPU.

        H_i is the criterion's Hessian for each instance where it is known to be convex, else Pos-Eig_{-1} of its mean.
        """
        if self.ranks is None:
            return self._products(vectors)
        packed = self.ranks.mean(lambda: torch.cat([t.flatten() for t in self._products(vectors)]))
        return packed[: len(vectors)], packed[len(vectors) :].view(len(vectors), -1)

    def _products(self, vectors: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
        first = torch.zeros(len(vectors), dtype=torch.float64)
        second = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
        for piece, at in zip(self.pieces, self._at_outputs, strict=True):
            tangents = self._tangents(piece, vectors).flatten(1)
            curved = torch.stack([at.product(t.view_as(at.gradient)) for t in tangents]).flatten(1)
            first += piece.scale * (tangents @ at.gradient.reshape(-1)).double().cpu()
            second += abs(piece.scale) * (tangents @ curved.T).double().cpu()  # a loss that is maximised has a negative one
        return first, (second + second.T) / 2

    @functools.cached_property
    def _at_outputs(self) -> list[CriterionAtOutput]:
        """The criterion at the outputs of each piece."""
        found = []
        for piece in self.pieces:
            with self._replayed():
                if piece.chain is None:
                    with torch.no_grad():
                        z = to_compute_dtype(self._output(self.here, piece))
                else:
                    z = piece.chain.output
                found.append(CriterionAtOutput(self.criterion, z, piece.targets, piece.options))
        return found

    def _tangents(self, piece: Subsample, vectors: list[list[Tensor]]) -> Tensor:
        """J x of every vector, [k, *output.shape]."""
        if piece.chain is not None:
            return piece.chain.tangents(vectors)
        tangents = []
        for vector in vectors:
            with torch.no_grad(), self._replayed():
                _, tangent = jvp(  # type: ignore[misc]
                    lambda *p: self._output(list(p), piece),
                    tuple(self.here),
                    tuple(v.to(p.dtype) for v, p in zip(vector, self.here, strict=True)),
                )
            tangents.append(to_compute_dtype(tangent))
        return torch.stack(tangents)

    def _output(self, parameters: list[Tensor], piece: Subsample) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        values = {**buffers, **dict(zip(self.names, parameters, strict=True))}
        return functional_call(self.model, values, piece.args, piece.kwargs)

    @contextmanager
    def _replayed(self) -> Iterator[None]:
        with self._replay.replayed(), self.tape.muted():
            yield


def _batch_size(arguments: Any) -> int:
    """The length of the first tensor that has one."""
    sizes: list[int] = []
    tree_map(lambda leaf: sizes.append(len(leaf)) if isinstance(leaf, Tensor) and leaf.dim() > 0 else None, arguments)
    return sizes[0] if sizes else 1


def _kept_rows(arguments: Any, batch: int, keep: slice) -> Any:
    """The kept instances of every tensor that has one row for each."""
    if keep.step == 1:
        return arguments
    return tree_map(
        lambda leaf: leaf[keep] if isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == batch else leaf, arguments
    )
