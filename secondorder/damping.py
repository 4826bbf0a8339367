"""Step sizes and dampings from a quadratic model of the loss (Botev et al., Appendix B; Martens & Grosse, 2015, section 6 and 7).

With G the full Gauss-Newton matrix of the mini-batch, g its gradient, eta the weight decay and tau a damping, the model of the
regularised loss f(theta) + eta/2 |theta|^2 near theta is

    q(delta) = delta^T (g + eta theta) + 1/2 delta^T C delta,     C = G + (tau + eta) I.

x^T G y = sum_i (J_i x)^T H_i (J_i y) takes one forward-mode product J x per vector, through the net as it was recorded.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.utils._pytree import tree_leaves, tree_map

from secondorder.activations import Analytic, derivatives, rows, widened
from secondorder.criteria import analytic_hessian, autograd_hessian
from secondorder.distributed import Ranks
from secondorder.tape import LossCall, Tape


@dataclass(frozen=True)
class Adaptation:
    """How the dampings of an optimizer without a learning rate begin and change.

    Args:
        tau: the start of C's damping, relative to the first loss, so that a factor on the loss does not matter; > 0. None: the
            more, the fewer instances m a step has, 250 / m^2, but from 1e-4 to 1.
        gamma: the start of the solver's own damping, likewise; None: it is tau throughout.
        floor: tau stays at least this fraction of its start: a step is judged by the very batch it was fitted to, and that alone
            would have tau fall for ever. Where the loss rises from batch to batch nevertheless (`Watch`), the floor rises. 0: the
            papers' rule, without a floor.
        momentum: whether the previous step is a second direction of the model.
        omega: per step, < 1. tau is multiplied by omega^every where rho > 3/4, and divided by it where rho < 1/4.
        every: tau is adapted every so many steps.
        gamma_every: gamma becomes, every so many steps, the best of {w gamma, gamma, gamma / w} under q, w = omega^gamma_every.
        tries: a step that fails its check is taken back and tried anew with a larger tau, at most so often.
    """

    tau: float | None
    gamma: float | None = None
    floor: float = 0.0
    momentum: bool = False
    omega: float = 0.95
    every: int = 5
    gamma_every: int = 20
    tries: int = 8

    def adapted(self, tau: float, rho: float) -> float:
        """Tau after a step of reduction ratio rho (Botev et al., B.3.1)."""
        factor = self.omega**self.every
        return tau * factor if rho > 0.75 else tau / factor if rho < 0.25 else tau

    def start(self, instances: int) -> float:
        """Tau's start, relative to the first loss, for a step of so many instances."""
        return min(1.0, max(1e-4, 250 / max(1, instances) ** 2)) if self.tau is None else self.tau


@dataclass(frozen=True)
class Watch:
    """Tau's floor, and the losses of new batches before their steps, which no step has been fitted to.

    Where their average over some 3 steps is a fifth above that over some 20, the steps do not generalise: tau and its floor
    become four times what they were, at most 400 times the first floor. Else the floor falls by 1 % a step, to where it began.
    """

    least: float  # the floor of the floor
    floor: float
    short: float  # average of the losses over some 3 steps
    long: float  # and over some 20

    def seen(self, loss: float, tau: float) -> tuple["Watch", bool]:
        """With a new batch's loss, at the damping of the moment; whether the losses rise."""
        short, long = 0.7 * self.short + 0.3 * loss, 0.95 * self.long + 0.05 * loss
        if short > long + 0.2 * abs(long):
            return Watch(self.least, min(4 * max(self.floor, tau), 400 * self.least), short, short), True
        return Watch(self.least, max(self.least, 0.99 * self.floor), short, long), False


# Forward-mode levels and the global random generators are the process's: two threads may train two models.
_ONE_AT_A_TIME = threading.Lock()

# Fewer say too little about a batch's loss for a step to be judged by them.
_LEAST_INSTANCES = 100


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
        offset: int, tape: Tape, ranks: Ranks | None = None,
    ):  # fmt: skip
        self.model, self.criterion, self.names, self.tape = model, criterion, list(parameters.values()), tape
        self.ranks = ranks
        self.here = [p.detach() for p in parameters]
        self.generator_state = torch.Generator().manual_seed(offset).get_state()
        self.seed = offset
        self.pieces: list[_Piece] = []
        self._instances = 0
        for loss in losses:
            if loss.inputs is None:
                raise RuntimeError(
                    "lr=None evaluates the model anew: the criterion must be called on the very tensor that the model returned, "
                    "as in criterion(model(x), y); for any other use, give the optimizer a learning rate (lr=0.02, say)"
                )
            batch = _batch_size((loss.inputs.args, loss.inputs.kwargs))
            self._instances += batch
            stride = max(1, min(round(1 / fraction), batch // _LEAST_INSTANCES))
            keep = slice(offset % stride, None, stride)
            scale = 1.0 if loss.scale is None else float(loss.scale)
            if getattr(criterion, "reduction", "mean") == "sum":
                scale *= batch / len(range(batch)[keep])
            arguments = (loss.inputs.args, loss.inputs.kwargs, loss.args, loss.kwargs)
            args, kwargs, targets, options = _rows(arguments, batch, keep)
            chain = _chain(loss, list(parameters), batch)
            self.pieces.append(_Piece(args, kwargs, targets, options, scale, chain and chain.rows(keep)))

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
        return self._mean(lambda: sum(piece.scale * float(top.loss) for piece, top in zip(self.pieces, self._tops, strict=True)))

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
        for piece, top in zip(self.pieces, self._tops, strict=True):
            tangents = self._tangents(piece, vectors).flatten(1)
            curved = torch.stack([top.product(t.view_as(top.gradient)) for t in tangents]).flatten(1)
            first += piece.scale * (tangents @ top.gradient.reshape(-1)).double().cpu()
            second += abs(piece.scale) * (tangents @ curved.T).double().cpu()  # a loss that is maximised has a negative one
        return first, (second + second.T) / 2

    @functools.cached_property
    def _tops(self) -> list["_Top"]:
        """The criterion at the outputs of each piece."""
        tops = []
        for piece in self.pieces:
            with self._replayed():
                if piece.chain is None:
                    with torch.no_grad():
                        z = widened(self._output(self.here, piece))
                else:
                    z = piece.chain.output
                tops.append(_Top(self.criterion, z, piece.targets, piece.options))
        return tops

    def _tangents(self, piece: "_Piece", vectors: list[list[Tensor]]) -> Tensor:
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
            tangents.append(widened(tangent))
        return torch.stack(tangents)

    def _output(self, parameters: list[Tensor], piece: "_Piece") -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        values = {**buffers, **dict(zip(self.names, parameters, strict=True))}
        return functional_call(self.model, values, piece.args, piece.kwargs)

    @contextmanager
    def _replayed(self) -> Iterator[None]:
        devices = {p.device for p in self.here if p.device.type == "cuda"}
        with _ONE_AT_A_TIME, torch.random.fork_rng(devices=list(devices)), self.tape.muted():
            torch.set_rng_state(self.generator_state)  # manual_seed takes a hundred times as long
            if devices:
                torch.cuda.manual_seed_all(self.seed)
            yield


@dataclass
class _Piece:
    """The kept instances of one recorded loss."""

    args: tuple[Any, ...]  # of the model
    kwargs: dict[str, Any]
    targets: tuple[Any, ...]  # of the criterion, after the output
    options: dict[str, Any]
    scale: float  # the loss enters with this factor
    chain: "_Chain | None"


class _Top:
    """The criterion at an output z: its loss, the gradient there, and products with its positive semi-definite Hessian."""

    def __init__(self, criterion: nn.Module, z: Tensor, targets: tuple[Any, ...], options: dict[str, Any]):
        with torch.enable_grad():
            self.leaf = z.detach().requires_grad_()
            output = self.leaf.view_as(self.leaf)
            loss = criterion(output, *targets, **options)
            (self._gradient,) = torch.autograd.grad(loss, self.leaf, create_graph=True)
            hessian = analytic_hessian(criterion, z, *targets, **options)
            self.matrix: Tensor | None = None
            if hessian is None or not hessian.convex:
                assert output.grad_fn is not None
                mean = autograd_hessian(loss, output.grad_fn) if hessian is None else hessian
                self.matrix = mean.positive(-1.0) * (z.shape[-1] / z.numel())
        self.loss, self.gradient = loss.detach(), self._gradient.detach()

    def product(self, tangent: Tensor) -> Tensor:
        """H_i t_i of every instance, of z's shape."""
        if self.matrix is not None:
            return tangent @ self.matrix
        return torch.autograd.grad(self._gradient, self.leaf, tangent, retain_graph=True)[0]


@dataclass
class _Chain:
    """A net that is linear layers with known activations between them and nothing else, as it was recorded.

    The forward-mode product then needs neither the model nor its activations again, and takes all vectors at once:

        t_1 = h_0 V_1^T + v_1,   t_l = (d1_{l-1} * t_{l-1}) W_l^T + h_{l-1} V_l^T + v_l.
    """

    layers: list[nn.Linear]
    places: list[tuple[int | None, int | None]]  # of each layer's weight and bias among the parameters
    inputs: list[Tensor]  # h [m, ..., n_in]
    transfers: list[Analytic]  # to the next layer, one fewer
    output: Tensor  # [m, ...]

    def rows(self, keep: slice) -> "_Chain":
        """The same for these instances alone."""
        transfers = [Analytic(t.activation, t.parameter, widened(_kept(t.saved, keep))) for t in self.transfers]
        inputs = [widened(_kept(h, keep)) for h in self.inputs]
        return _Chain(self.layers, self.places, inputs, transfers, widened(_kept(self.output, keep)))

    def tangents(self, vectors: list[list[Tensor]]) -> Tensor:
        """J x of every vector, [k, *output.shape]."""
        t: Tensor | None = None
        for depth, (layer, (weight, bias), h) in enumerate(zip(self.layers, self.places, self.inputs, strict=True)):
            flat = rows([h])
            if t is None:
                new = flat.new_zeros(len(vectors), len(flat), layer.out_features)
            else:
                d1, _ = derivatives(self.transfers[depth - 1])
                below = (t * d1.reshape(t.shape[1:])).flatten(0, 1)
                new = (below @ widened(layer.weight.detach()).T).view(len(vectors), len(flat), layer.out_features)
            for k, vector in enumerate(vectors):
                if weight is not None:
                    new[k].addmm_(flat, vector[weight].T)
                if bias is not None:
                    new[k].add_(vector[bias])
            t = new
        assert t is not None
        return t.view(len(vectors), *self.output.shape)


def _chain(loss: LossCall, parameters: list[Tensor], batch: int) -> _Chain | None:
    """The recorded net, if it is a chain that depends on these parameters alone and has one row for each instance."""
    assert loss.inputs is not None
    if loss.output is None or loss.output.dim() == 0 or len(loss.output) != batch:
        return None
    place = {p: i for i, p in enumerate(parameters)}
    calls, transfers = [loss.sources[0]], []
    while calls[-1].inputs_from:
        links = calls[-1].inputs_from
        if len(links) > 1 or not isinstance(links[0].transfer, Analytic):
            return None
        transfers.append(links[0].transfer)
        calls.append(links[0].source)
    layers = [call.layer for call in reversed(calls)]
    own = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
    given = [leaf for leaf in tree_leaves((loss.inputs.args, loss.inputs.kwargs)) if isinstance(leaf, Tensor)]
    first = calls[-1].input
    # Whatever stands before the first layer, a random or a trainable one, say, would have to be evaluated anew.
    if not any(first.data_ptr() == leaf.data_ptr() and first.numel() == leaf.numel() for leaf in given):
        return None
    inputs = [call.input for call in reversed(calls)]
    if not place.keys() <= set(own) or any(len(h) != batch for h in inputs):
        return None
    places = [(place.get(layer.weight), None if layer.bias is None else place.get(layer.bias)) for layer in layers]
    return _Chain(layers, places, inputs, transfers[::-1], loss.output)


@dataclass
class Step:
    """The minimum of q over the span of some vectors."""

    delta: list[Tensor]
    coefficients: Tensor  # of the vectors
    predicted: float  # q there, <= 0
    undamped: float  # the same without tau
    modelled: float  # the loss' change by the Gauss-Newton model of the subsample alone, without eta


def best_step(local: LocalLoss, gradients: list[Tensor], vectors: list[list[Tensor]], tau: float, eta: list[float]) -> Step:
    """Minimises q over the span of `vectors`: step size, and momentum with two (Botev et al., Eq. 39 to 41).

    Args:
        local: gives G, on its subsample.
        gradients: g + eta theta of the whole batch.
        vectors: the new direction, and the previous update if there is one.
        tau: >= 0.
        eta: a weight decay for each parameter.
    """
    first, gram = local.products(vectors)
    slope, inner, decay = _dots(vectors, gradients, eta)
    c = gram + tau * inner + decay
    # Two nearly parallel vectors make C singular; scaled to a unit diagonal, what is below rounding is left out.
    unit = c.diagonal().clamp(min=torch.finfo(torch.float64).tiny).rsqrt()
    coefficients = -unit * (torch.linalg.pinv(unit[:, None] * c * unit, rtol=1e-10, hermitian=True) @ (unit * slope))
    scales = coefficients.tolist()
    delta = torch._foreach_mul(vectors[0], scales[0])
    for scale, vector in zip(scales[1:], vectors[1:], strict=True):
        torch._foreach_add_(delta, vector, alpha=scale)
    half = coefficients / 2
    return Step(
        list(delta),
        coefficients,
        float(coefficients @ slope + half @ c @ coefficients),
        float(coefficients @ slope + half @ (gram + decay) @ coefficients),
        float(coefficients @ first + half @ gram @ coefficients),
    )


def _dots(vectors: list[list[Tensor]], gradients: list[Tensor], eta: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """x_k^T g [k], x_k^T x_l and x_k^T diag(eta) x_l [k, k], in float64 on the CPU, after one wait for the device."""
    flat = [[t.reshape(-1) for t in vector] for vector in [*vectors, gradients]]
    rows, columns = torch.triu_indices(len(vectors), len(flat), offset=0)
    pairs = list(zip(rows.tolist(), columns.tolist(), strict=True))
    products = torch.stack([torch.dot(a, b) for i, j in pairs for a, b in zip(flat[i], flat[j], strict=True)])
    products = products.double().cpu().view(len(pairs), len(eta))

    def matrix(sums: Tensor) -> Tensor:
        upper = sums.new_zeros(len(vectors), len(flat)).index_put((rows, columns), sums)
        upper[:, :-1] += upper[:, :-1].triu(1).T
        return upper

    inner, decay = matrix(products.sum(1)), matrix(products @ torch.tensor(eta, dtype=torch.float64))
    return inner[:, -1], inner[:, :-1], decay[:, :-1]


def _batch_size(arguments: Any) -> int:
    sizes: list[int] = []
    tree_map(lambda leaf: sizes.append(len(leaf)) if isinstance(leaf, Tensor) and leaf.dim() > 0 else None, arguments)
    return sizes[0] if sizes else 1


def _rows(arguments: Any, batch: int, keep: slice) -> Any:
    """The kept instances of every tensor that has one row for each."""
    if keep.step == 1:
        return arguments
    return tree_map(
        lambda leaf: leaf[keep] if isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == batch else leaf, arguments
    )


def _kept(instances: Tensor, keep: slice) -> Tensor:
    return instances if keep.step == 1 else instances[keep]
