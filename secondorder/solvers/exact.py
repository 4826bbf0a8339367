"""The solver `exact`: A = E[h h^T], by both eigendecompositions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from secondorder.linalg import eigh
from secondorder.solvers.base import Factors, Solver, register, second_moment


@dataclass(frozen=True)
class Exact(Solver):
    """The solver `exact`: c H P A + l P = -B with A = E[h h^T], by the eigendecompositions of both factors.

        P = -Q_H [(Q_H^T B Q_A) / (c l_H l_A^T + l)] Q_A^T,   H = Q_H diag(l_H) Q_H^T,   A = Q_A diag(l_A) Q_A^T,

    the quotient being elementwise.
    """

    def statistics(self, inputs: list[Tensor], samples: list[Tensor]) -> list[Factors]:
        """Returns the expectations that the solver needs, of every layer's input [m, n_in]."""
        return [{"input_second_moment": second_moment(sample)} for sample in samples]

    def prepare(self, factors: Factors, scale: float, damping: float) -> Factors:
        """Returns what `solve` needs, from the factors, the scale c and the damping l."""
        values_h, vectors_h = eigh(factors["bias_hessian"], "bias Hessian")
        values_a, vectors_a = eigh(factors["input_second_moment"], "input second moment")
        return {
            "hessian_vectors": vectors_h, "input_vectors": vectors_a,
            "weight_values": scale * torch.outer(values_h, values_a) + damping, "bias_values": scale * values_h + damping,
        }  # fmt: skip

    def solve(self, prepared: Factors, grad_weight: Tensor, grad_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns P [n_out, n_in] and d [n_out] (None without `grad_bias`) for a layer's gradients B and g."""
        q_h, q_a = prepared["hessian_vectors"], prepared["input_vectors"]
        weight = -q_h @ ((q_h.T @ grad_weight @ q_a) / prepared["weight_values"]) @ q_a.T
        return weight, None if grad_bias is None else -q_h @ ((q_h.T @ grad_bias) / prepared["bias_values"])


register("exact", lambda options: Exact())
