"""Step sizes and dampings from a quadratic model of the loss (Botev et al., Appendix B; Martens & Grosse, 2015, section 6 and 7).

With G the full Gauss-Newton matrix of the mini-batch, g its gradient, eta the weight decay and tau a damping, the model of the
regularised loss f(theta) + eta/2 |theta|^2 near theta is

    q(delta) = delta^T (g + eta theta) + 1/2 delta^T C delta,     C = G + (tau + eta) I.

x^T G y = sum_i (J_i x)^T H_i (J_i y) takes one forward-mode product J x per vector, through the net as it was recorded.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.utils._pytree import tree_map

from secondorder.criteria import analytic_hessian, autograd_hessian
from secondorder.distributed import Ranks
from secondorder.tape import LossCall, Tape


@dataclass(frozen=True)
class Adaptation:
    """How the dampings of an optimizer without a learning rate begin and change.

    Args:
        tau: the start of C's damping, relative to the first loss, so that a factor on the loss does not matter; > 0.
        gamma: the start of the solver's own damping, likewise; None: it is tau throughout.
        momentum: whether the previous step is a second direction of the model.
        omega: per step, < 1. tau is multiplied by omega^every where rho > 3/4, and divided by it where rho < 1/4.
        every: tau is adapted every so many steps.
        gamma_every: gamma becomes, every so many steps, the best of {w gamma, gamma, gamma / w} under q, w = omega^gamma_every.
        tries: a step that fails its check is taken back and tried anew with a larger tau, at most so often.
    """

    tau: float
    gamma: float | None = None
    momentum: bool = False
    omega: float = 0.95
    every: int = 5
    gamma_every: int = 20
    tries: int = 8

    def adapted(self, tau: float, rho: float) -> float:
        """Tau after a step of reduction ratio rho (Botev et al., B.3.1)."""
        factor = self.omega**self.every
        return tau * factor if rho > 0.75 else tau / factor if rho < 0.25 else tau


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
        names: the names of the parameters it is a function of.
        fraction: of each batch, in (0, 1]; but at least 100 instances, or all.
        offset: which instances: every (1 / fraction)-th from this one on.
        tape: muted during the evaluations.
        ranks: whose losses' mean it is; None: this process's alone.

    Raises:
        RuntimeError: the criterion was not called on the model's own output.
    """

    def __init__(
        self, model: nn.Module, criterion: nn.Module, losses: list[LossCall], names: list[str], fraction: float, offset: int,
        tape: Tape, ranks: Ranks | None = None,
    ):  # fmt: skip
        self.model, self.criterion, self.names, self.tape, self.ranks = model, criterion, names, tape, ranks
        self.seed = offset
        self.pieces = []
        for loss in losses:
            if loss.inputs is None:
                raise RuntimeError(
                    "lr=None evaluates the model anew: the criterion must be called on the very tensor that the model returned, "
                    "as in criterion(model(x), y)"
                )
            batch = _batch_size((loss.inputs.args, loss.inputs.kwargs))
            stride = max(1, min(round(1 / fraction), batch // _LEAST_INSTANCES))
            keep = slice(offset % stride, None, stride)
            scale = 1.0 if loss.scale is None else float(loss.scale)
            if getattr(criterion, "reduction", "mean") == "sum":
                scale *= batch / len(range(batch)[keep])
            arguments = (loss.inputs.args, loss.inputs.kwargs, loss.args, loss.kwargs)
            self.pieces.append((*_rows(arguments, batch, keep), scale))

    def value(self, parameters: list[Tensor]) -> float:
        """The loss at these values."""
        if self.ranks is None:
            return self._value(parameters)
        return float(self.ranks.mean(lambda: torch.tensor(self._value(parameters), dtype=torch.float64)))

    def _value(self, parameters: list[Tensor]) -> float:
        total = 0.0
        with torch.no_grad(), self._replayed():
            for args, kwargs, targets, options, scale in self.pieces:
                total += scale * float(self.criterion(self._output(parameters, args, kwargs), *targets, **options))
        return total

    def products(self, parameters: list[Tensor], vectors: list[list[Tensor]]) -> tuple[float, Tensor, Tensor]:
        """The loss, x_k^T g [k], and x_k^T G x_l [k, k], for vectors x_k of the parameters' shapes, in float64 on the CPU.

        H_i is the criterion's Hessian for each instance where it is known to be convex, else Pos-Eig_{-1} of its mean.
        """
        if self.ranks is None:
            return self._products(parameters, vectors)

        def packed() -> Tensor:
            value, first, second = self._products(parameters, vectors)
            return torch.cat([first.new_tensor([value]), first, second.flatten()])

        value, first, second = self.ranks.mean(packed).split([1, len(vectors), len(vectors) ** 2])
        return float(value), first, second.view(len(vectors), -1)

    def _products(self, parameters: list[Tensor], vectors: list[list[Tensor]]) -> tuple[float, Tensor, Tensor]:
        value, first = 0.0, torch.zeros(len(vectors), dtype=torch.float64)
        second = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
        for args, kwargs, targets, options, scale in self.pieces:
            tangents = []
            for vector in vectors:
                with torch.no_grad(), self._replayed():
                    z, tangent = jvp(  # type: ignore[misc]
                        lambda *p, a=args, k=kwargs: self._output(list(p), a, k),
                        tuple(parameters),
                        tuple(v.to(p.dtype) for v, p in zip(vector, parameters, strict=True)),
                    )
                tangents.append(tangent)
            with torch.enable_grad(), self._replayed():
                leaf = z.detach().requires_grad_()
                output = leaf.view_as(leaf)
                loss = self.criterion(output, *targets, **options)
                (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
                hessian = analytic_hessian(self.criterion, z, *targets, **options)
                if hessian is not None and hessian.convex:
                    curved = [torch.autograd.grad(gradient, leaf, t, retain_graph=True)[0] for t in tangents]
                else:
                    assert output.grad_fn is not None
                    mean = autograd_hessian(loss, output.grad_fn) if hessian is None else hessian
                    matrix = mean.positive(-1.0) * (z.shape[-1] / z.numel())
                    curved = [t @ matrix for t in tangents]
            value += scale * float(loss.detach())
            # A negative scale, of a loss that is maximised, would make G negative.
            first += scale * torch.stack([(gradient.detach() * t).sum() for t in tangents]).double().cpu()
            second += abs(scale) * torch.stack([torch.stack([(x * y).sum() for y in curved]) for x in tangents]).double().cpu()
        return value, first, (second + second.T) / 2

    def _output(self, parameters: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        return functional_call(self.model, {**buffers, **dict(zip(self.names, parameters, strict=True))}, args, kwargs)

    @contextmanager
    def _replayed(self) -> Iterator[None]:
        devices = {p.device for p in self.model.parameters() if p.device.type == "cuda"}
        with _ONE_AT_A_TIME, torch.random.fork_rng(devices=list(devices)), self.tape.muted():
            torch.manual_seed(self.seed)
            yield


@dataclass
class Step:
    """The minimum of q over the span of some vectors."""

    delta: list[Tensor]
    coefficients: Tensor  # of the vectors
    predicted: float  # q there, <= 0
    undamped: float  # the same without tau
    modelled: float  # the loss' change by the Gauss-Newton model of the subsample alone, without eta


def best_step(
    local: LocalLoss, parameters: list[Tensor], gradients: list[Tensor], vectors: list[list[Tensor]], tau: float, eta: list[float]
) -> Step:
    """Minimises q over the span of `vectors`: step size, and momentum with two (Botev et al., Eq. 39 to 41).

    Args:
        local: gives G, on its subsample.
        parameters: theta, a list of tensors.
        gradients: g + eta theta of the whole batch.
        vectors: the new direction, and the previous update if there is one.
        tau: >= 0.
        eta: a weight decay for each parameter.
    """
    _, first, gram = local.products(parameters, vectors)
    slope = torch.stack([_dot(x, gradients) for x in vectors])
    inner = torch.stack([torch.stack([_dot(x, y) for y in vectors]) for x in vectors])
    decay = torch.stack([torch.stack([_dot(x, y, eta) for y in vectors]) for x in vectors])
    c = gram + tau * inner + decay
    # Two nearly parallel vectors make C singular; scaled to a unit diagonal, what is below rounding is left out.
    unit = c.diagonal().clamp(min=torch.finfo(torch.float64).tiny).rsqrt()
    coefficients = -unit * (torch.linalg.pinv(unit[:, None] * c * unit, rtol=1e-10, hermitian=True) @ (unit * slope))
    delta = [sum(float(k) * v for k, v in zip(coefficients, each, strict=True)) for each in zip(*vectors, strict=True)]
    half = coefficients / 2
    return Step(
        delta,  # type: ignore[arg-type]
        coefficients,
        float(coefficients @ slope + half @ c @ coefficients),
        float(coefficients @ slope + half @ (gram + decay) @ coefficients),
        float(coefficients @ first + half @ gram @ coefficients),
    )


def _dot(x: list[Tensor], y: list[Tensor], weights: list[float] | None = None) -> Tensor:
    products = torch.stack([(a * b).sum() for a, b in zip(x, y, strict=True)]).double().cpu()
    return products.sum() if weights is None else products @ torch.tensor(weights, dtype=torch.float64)


def _batch_size(arguments: Any) -> int:
    sizes: list[int] = []
    tree_map(lambda leaf: sizes.append(len(leaf)) if isinstance(leaf, Tensor) and leaf.dim() > 0 else None, arguments)
    return sizes[0] if sizes else 1


def _rows(arguments: Any, batch: int, keep: slice) -> Any:
    """The kept instances of every tensor that has one row for each."""
    return tree_map(
        lambda leaf: leaf[keep] if isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == batch else leaf, arguments
    )
