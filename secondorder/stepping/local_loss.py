"""The recorded loss as a function of the parameters, on a subsample of the batch: trial losses, and its quadratic terms."""

import functools
import math
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
from secondorder._tensors import host_numbers, to_compute_dtype
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
    scale: Tensor | float  # the loss enters with this factor
    factor: float  # and with this one
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
            scale: Tensor | float = 1.0 if loss.scale is None else loss.scale
            factor = batch / len(range(batch)[keep]) if getattr(criterion, "reduction", "mean") == "sum" else 1.0
            arguments = (loss.inputs.args, loss.inputs.kwargs, loss.args, loss.kwargs)
            args, kwargs, targets, options = _kept_rows(arguments, batch, keep)
            chain = linear_chain(loss, list(parameters), batch)
            self.pieces.append(Subsample(args, kwargs, targets, options, scale, factor, chain and chain.rows(keep)))

    def value(self, parameters: list[Tensor]) -> float:
        """The loss at these values; NaN where one of them is not finite."""
        return self._mean(lambda: self._value(parameters))

    def _value(self, parameters: list[Tensor]) -> float:
        with torch.no_grad(), self._replayed():
            losses = [self.criterion(self._output(parameters, piece), *piece.targets, **piece.options) for piece in self.pieces]
        *values, finite = host_numbers([*losses, torch.stack([p.sum() for p in parameters]).isfinite().all()])
        return sum(scale * value for scale, value in zip(self._scales[0], values, strict=True)) if finite else math.nan

    @functools.cached_property
    def start(self) -> float:
        """The loss at the parameters' own values."""
        return self._mean(lambda: sum(scale * value for scale, value in zip(*self._scales, strict=True)))

    @functools.cached_property
    def _scales(self) -> tuple[list[float], list[float]]:
        """With which factor the loss of each piece enters, and that loss at the parameters' own values."""
        numbers = host_numbers([*(piece.scale for piece in self.pieces), *(at.loss for at in self._at_outputs)])
        scales, losses = numbers[: len(self.pieces)], numbers[len(self.pieces) :]
        return [scale * piece.factor for scale, piece in zip(scales, self.pieces, strict=True)], losses

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
        """x_k^T g [k] and x_k^T G x_l [k, k], for vectors x_k of the parameters' shapes, in float64.

        H_i is the criterion's Hessian for each instance where it is known to be convex, else Pos-Eig_{-1} of its mean.
        """
        if self.ranks is None:
            return self._products(vectors)
        packed = self.ranks.mean(lambda: torch.cat([t.flatten() for t in self._products(vectors)]))
        return packed[: len(vectors)], packed[len(vectors) :].view(len(vectors), -1)

    def _products(self, vectors: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
        like = self.here[0]
        first = torch.zeros(len(vectors), dtype=torch.float64, device=like.device)
        second = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=like.device)
        for piece, at, scale in zip(self.pieces, self._at_outputs, self._scales[0], strict=True):
            tangents = self._tangents(piece, vectors).flatten(1)
            curved = torch.stack([at.product(t.view_as(at.gradient)) for t in tangents]).flatten(1)
            first += scale * (tangents @ at.gradient.reshape(-1)).to(first)
            second += abs(scale) * (tangents @ curved.T).to(second)  # a loss that is maximised has a negative one
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
