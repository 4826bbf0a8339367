"""The solver `ea-isotropic`: A = a a^T + rho I, by three inverses of [n_out, n_out]."""

from dataclasses import dataclass

import torch
from torch import Tensor

from secondorder import ops
from secondorder.linalg import inverse, shifted
from secondorder.solvers.base import Factors, Solver, register


@dataclass(frozen=True)
class Isotropic(Solver):
    """The solver `ea-isotropic`: A = a a^T + rho I, rho = tr Cov(h) / n_in, solved exactly.

        P = -[M^{-1} (B - u a^T / s) + q a^T / s],   M = c rho H + l I,   (c (s + rho) H + l I) q = u,

    with the scale c, the damping l, u = B a and s = a^T a. With rho = 0 it is EA-CG's system.
    """

    def statistics(self, inputs: list[Tensor], samples: list[Tensor]) -> list[Factors]:
        """Returns the expectations that the solver needs, of every layer's input [m, n_in]."""
        means = ops.mean_inputs(inputs)
        squares = [torch.linalg.vector_norm(h).square() / len(h) for h in inputs]
        return [{"mean_input": a, "mean_square_input": square} for a, square in zip(means, squares, strict=True)]

    def prepare(self, factors: Factors, scale: float, damping: float) -> Factors:
        """Returns what `solve` needs, from the factors, the scale c and the damping l."""
        h, a = factors["bias_hessian"], factors["mean_input"]
        s = a @ a
        rho = ((factors["mean_square_input"] - s) / len(a)).clamp(min=0)
        systems = torch.stack([shifted(h, scale * c, damping) for c in (rho, s + rho, 1.0)])
        return {"mean_input": a, "hessian_inverses": inverse(systems, "bias Hessian")}

    def solve(self, prepared: Factors, grad_weight: Tensor, grad_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns P [n_out, n_in] and d [n_out] (None without `grad_bias`) for a layer's gradients B and g."""
        across, along, bias_inverse = prepared["hessian_inverses"]
        a = prepared["mean_input"]
        s = a @ a
        u = grad_weight @ a
        unit = torch.where(s > 0, a / s, 0)
        # M^{-1} (B - u a^T / s) + q a^T / s: the two terms along a are one outer product.
        weight = ops.precondition(across, grad_weight, None).addr_(along @ u - across @ u, unit).neg_()
        return weight, None if grad_bias is None else -(bias_inverse @ grad_bias)


register("ea-isotropic", lambda options: Isotropic())
