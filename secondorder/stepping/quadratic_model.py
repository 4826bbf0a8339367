"""The step that minimises a quadratic model of the loss over the span of some vectors.

With G the full Gauss-Newton matrix of the mini-batch, g its gradient, eta the weight decay and tau a damping, the model of the
regularised loss f(theta) + eta/2 |theta|^2 near theta is

    q(delta) = delta^T (g + eta theta) + 1/2 delta^T C delta,     C = G + (tau + eta) I

(Botev et al., Appendix B; Martens & Grosse, 2015, section 6).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class QuadraticTerms(Protocol):
    """What the model needs of a loss."""

    def products(self, vectors: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
        """x_k^T g [k] and x_k^T G x_l [k, k], for vectors x_k of the parameters' shapes, in float64."""


@dataclass
class Step:
    """The minimum of q over the span of some vectors, or a multiple of it."""

    delta: list[Tensor]
    coefficients: Tensor  # of the vectors
    predicted: float  # q there, <= 0
    undamped: float  # the same without tau
    modelled: float  # the loss' change by the Gauss-Newton model of the subsample alone, without eta


def best_step(
    loss: QuadraticTerms, gradients: list[Tensor], vectors: list[list[Tensor]], tau: float, eta: list[float], lr: float = 1.0
) -> Step:
    """Minimises q over the span of `vectors`: step size, and momentum with two (Botev et al., Eq. 39 to 41).

    Args:
        loss: gives G, on its subsample.
        gradients: g + eta theta of the whole batch.
        vectors: the new direction, and the previous update if there is one.
        tau: >= 0.
        eta: a weight decay for each parameter.
        lr: the step is this multiple of the minimiser, in [0, 2); what it predicts is then q there.
    """
    count = len(vectors)
    first, gram = loss.products(vectors)
    dots = _dots(vectors, gradients)
    packed = torch.cat(
        [first.to(dots.device), gram.to(dots.device).flatten(), dots.flatten()]
    ).cpu()  # the only wait for the device
    first, gram, dots = packed[:count], packed[count : count * (count + 1)].view(count, count), packed[count * (count + 1) :]
    slope, inner, decay = _by_vectors(count, dots.view(-1, len(eta)), eta)
    c = gram + tau * inner + decay
    # Two nearly parallel vectors make C singular; scaled to a unit diagonal, what is below rounding is left out.
    unit = c.diagonal().clamp(min=torch.finfo(torch.float64).tiny).rsqrt()
    coefficients = -lr * unit * (torch.linalg.pinv(unit[:, None] * c * unit, rtol=1e-10, hermitian=True) @ (unit * slope))
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


def _pairs(count: int) -> Tensor:
    """Which of `count` vectors and the gradient after them are multiplied: rows and columns [2, pairs]."""
    return torch.triu_indices(count, count + 1)


def _dots(vectors: list[list[Tensor]], gradients: list[Tensor]) -> Tensor:
    """The products of all pairs, parameter by parameter, [pairs, parameters] in float64."""
    flat = [[t.reshape(-1) for t in vector] for vector in [*vectors, gradients]]
    pairs = zip(*_pairs(len(vectors)).tolist(), strict=True)
    products = [torch.dot(a, b) for i, j in pairs for a, b in zip(flat[i], flat[j], strict=True)]
    return torch.stack(products).double().view(-1, len(gradients))


def _by_vectors(count: int, products: Tensor, eta: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """x_k^T g [k], x_k^T x_l and x_k^T diag(eta) x_l [k, k] from the products of `_dots`."""

    def matrix(sums: Tensor) -> Tensor:
        upper = sums.new_zeros(count, count + 1).index_put(tuple(_pairs(count)), sums)
        upper[:, :-1] += upper[:, :-1].triu(1).T
        return upper

    inner, decay = matrix(products.sum(1)), matrix(products @ torch.tensor(eta, dtype=torch.float64))
    return inner[:, -1], inner[:, :-1], decay[:, :-1]
