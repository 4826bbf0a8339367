"""The step that minimises a quadratic model of the loss over the span of some vectors.

With G the full Gauss-Newton matrix of the mini-batch, g its gradient, eta the weight decay, tau a damping and D a diagonal
matrix, in the papers the identity, the model of the regularised loss f(theta) + eta/2 |theta|^2 near theta is

    q(delta) = delta^T (g + eta theta) + 1/2 delta^T C delta,     C = G + tau D + eta I

(Botev et al., Appendix B; Martens & Grosse, 2015, section 6).
"""

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from secondorder._tensors import Later, Transfer


class QuadraticTerms(Protocol):
    """Gives what the quadratic model needs of a loss."""

    def products(self, vectors: list[list[Tensor]], transfer: Transfer) -> Later[tuple[Tensor, Tensor]]:
        """Returns what gives x_k^T g [k] and x_k^T G x_l [k, k], in float64 on the CPU; x_k have the parameters' shapes."""


@dataclass
class Step:
    """Holds the minimum of q over the span of some vectors, or a multiple of it."""

    delta: list[Tensor]
    coefficients: Tensor  # of the vectors
    predicted: float  # q there, <= 0
    undamped: float  # the same without tau
    modelled: float  # the loss' change by the Gauss-Newton model of the subsample alone, without eta
    curvature: float  # x^T G x / x^T D x of the first vector


Loss = TypeVar("Loss", bound=QuadraticTerms, covariant=True)


@dataclass(frozen=True)
class QuadraticModel(Generic[Loss]):
    """The model q of a batch, at any tau.

    Args:
        loss: gives G, on its subsample.
        gradients: g + eta theta of the whole batch.
        eta: a weight decay for each parameter.
        metric: D, a number for each parameter; None: ones.
    """

    loss: Loss
    gradients: list[Tensor]
    eta: list[float]
    metric: list[float] | None = None

    def best_step(
        self, vectors: list[list[Tensor]], tau: float, lr: float = 1.0, transfer: Transfer | None = None
    ) -> Later[Step]:
        """Minimises q over the span of `vectors`: step size, and momentum with two (Botev et al., Eq. 39 to 41).

        Args:
            vectors: the new direction, and the previous update if there is one.
            tau: >= 0.
            lr: the step is this multiple of the minimiser, in [0, 2); what it predicts is then q there.
            transfer: what the numbers come to the host with; None: they come alone.

        Returns:
            What gives the step, once it is asked for.
        """
        transfer = Transfer() if transfer is None else transfer
        terms, dots = self.loss.products(vectors, transfer), self._dots(vectors, transfer)
        return lambda: _minimum(vectors, terms(), dots(), tau, lr)

    def _dots(self, vectors: list[list[Tensor]], transfer: Transfer) -> Later[tuple[Tensor, Tensor, Tensor]]:
        """Returns what gives x_k^T g [k], x_k^T D x_l and x_k^T diag(eta) x_l [k, k], in float64 on the CPU."""
        flat = [[t.reshape(-1) for t in vector] for vector in [*vectors, self.gradients]]
        rows, columns = torch.triu_indices(len(vectors), len(flat), offset=0, device="cpu")
        pairs = list(zip(rows.tolist(), columns.tolist(), strict=True))
        dots = [torch.dot(a, b) for i, j in pairs for a, b in zip(flat[i], flat[j], strict=True)]
        found = transfer.later(torch.stack(dots).view(len(pairs), len(self.eta)))

        def matrix(sums: Tensor) -> Tensor:
            upper = sums.new_zeros(len(vectors), len(flat)).index_put((rows, columns), sums)
            upper[:, :-1] += upper[:, :-1].triu(1).T
            return upper

        def sums() -> tuple[Tensor, Tensor, Tensor]:
            products = found()
            plain, decay = matrix(products.sum(1)), matrix(products @ products.new_tensor(self.eta))
            inner = plain if self.metric is None else matrix(products @ products.new_tensor(self.metric))
            return plain[:, -1], inner[:, :-1], decay[:, :-1]

        return sums


def _minimum(
    vectors: list[list[Tensor]], terms: tuple[Tensor, Tensor], dots: tuple[Tensor, Tensor, Tensor], tau: float, lr: float
) -> Step:
    """Computes the step from the numbers of `QuadraticTerms.products` and `QuadraticModel._dots`."""
    (first, gram), (slope, inner, decay) = terms, dots
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
        float(gram[0, 0] / inner[0, 0].clamp(min=torch.finfo(torch.float64).tiny)),
    )
