"""The solvers `kfi` and `kfi-rank-one`: a factored damping and Kronecker-factored inverses (Chen et al., Eq. 12, 13)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from secondorder import ops
from secondorder.linalg import inverse, shifted
from secondorder.solvers.base import Factors, Solver, SolverOptions, mean_inputs, register, second_moment


@dataclass(frozen=True)
class KFI(Solver):
    """The solvers `kfi` and `kfi-rank-one`: Kronecker-factored inverses (Chen et al., Eq. 12, 13; Botev et al., Eq. 36 to 38).

        P = -(H + sqrt(l)/pi I)^{-1} B (A + pi sqrt(l) I)^{-1},   pi^2 = (tr A / n_in) / (tr H / n_out),   d = -(H + l I)^{-1} g.

    As in the papers there is no scale c: it counts as 1.

    Args:
        max_elements: A = E[h h^T] where n_in^2 is at most this, else a a^T (Eq. 13), by Sherman-Morrison; 0: always that.
    """

    max_elements: int = SolverOptions.max_factor_elements

    def statistics(self, inputs: list[Tensor], samples: list[Tensor]) -> list[Factors]:
        """Returns the expectations that the solver needs, of every layer's input [m, n_in]."""
        rank_one = [h for h in inputs if h.shape[1] ** 2 > self.max_elements]
        means = iter(mean_inputs(rank_one))
        return [
            {"mean_input": next(means)} if h.shape[1] ** 2 > self.max_elements else {"input_second_moment": second_moment(sample)}
            for h, sample in zip(inputs, samples, strict=True)
        ]

    def prepare(self, factors: Factors, scale: float, damping: float) -> Factors:
        """Returns what `solve` needs, from the factors, the scale c and the damping l."""
        h = factors["bias_hessian"]
        root = damping**0.5
        if "mean_input" in factors:
            a = factors["mean_input"]
            pi = _balance(a @ a / len(a), h)
            prepared = {"mean_input": a, "input_shift": pi * root}
        else:
            moment = factors["input_second_moment"]
            pi = _balance(moment.trace() / len(moment), h)
            prepared = {"input_inverse": inverse(shifted(moment, 1.0, pi * root), "input second moment")}
        systems = torch.stack([shifted(h, 1.0, root / pi), shifted(h, 1.0, damping)])
        return {**prepared, "hessian_inverses": inverse(systems, "bias Hessian")}

    def solve(self, prepared: Factors, grad_weight: Tensor, grad_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns P [n_out, n_in] and d [n_out] (None without `grad_bias`) for a layer's gradients B and g."""
        weight_inverse, bias_inverse = prepared["hessian_inverses"]
        weight = ops.precondition(weight_inverse, grad_weight, prepared.get("input_inverse")).neg_()
        if "mean_input" in prepared:
            a, shift = prepared["mean_input"], prepared["input_shift"]
            weight.addr_(weight @ a / (shift + a @ a), a, alpha=-1).div_(shift)
        return weight, None if grad_bias is None else -(bias_inverse @ grad_bias)


def _balance(mean_a: Tensor, hessian: Tensor) -> Tensor:
    """Returns pi of KFI; a zero trace says nothing about the balance, so that it is 1 then."""
    mean_h = hessian.trace() / len(hessian)
    pi = (mean_a / mean_h).sqrt()
    return torch.where((mean_a > 0) & (mean_h > 0) & torch.isfinite(pi), pi, torch.ones_like(pi))


register("kfi", lambda options: KFI(options.max_factor_elements))
register("kfi-rank-one", lambda options: KFI(0))
