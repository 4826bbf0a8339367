"""The solvers `ea-cg` and `ea-cg-truncated`: A = a a^T (Chen et al., Eq. 11b)."""

from dataclasses import dataclass

from torch import Tensor

from secondorder import ops
from secondorder.solvers.base import Factors, Solver, SolverOptions, check_cg, finite, mean_inputs, register, shift_of


@dataclass(frozen=True)
class EACGSolver(Solver):
    """The solvers `ea-cg` and `ea-cg-truncated`: c H P a a^T + l P = -B, by `ops.eacg_solve`.

    Args:
        max_cg: at most so many iterations, >= 1.
        eps_cg: they stop at this residual, relative to the first one, >= 0.
        truncated: whether P is the paper's iterate, rather than exact across the mean input.
    """

    factorises = False

    max_cg: int = SolverOptions.max_cg
    eps_cg: float = SolverOptions.eps_cg
    truncated: bool = False

    def __post_init__(self) -> None:
        check_cg(self.max_cg, self.eps_cg)

    def statistics(self, inputs: list[Tensor], samples: list[Tensor]) -> list[Factors]:
        """Returns the expectations that the solver needs, of every layer's input [m, n_in]."""
        return [{"mean_input": a} for a in mean_inputs(inputs)]

    def prepare(self, factors: Factors, scale: float, damping: float) -> Factors:
        """Returns what `solve` needs, from the factors, the scale c and the damping l."""
        return {**finite(factors), **shift_of(factors["bias_hessian"], scale, damping)}

    def solve(self, prepared: Factors, grad_weight: Tensor, grad_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns P [n_out, n_in] and d [n_out] (None without `grad_bias`) for a layer's gradients B and g."""
        # The operator solves (1 - alpha) H P a a^T + alpha P = -B. Divided by c + l this solver's system has that form, with
        # alpha = l / (c + l). Where l > c, alpha might round to 1: then H takes the factor c / l, and alpha is 1/2.
        scale, damping = prepared["shift"].tolist()
        h, alpha, total = prepared["bias_hessian"], damping / (scale + damping), scale + damping
        if damping > scale:
            h, alpha, total = h * (scale / damping), 0.5, 2 * damping
        weight, bias, _ = ops.eacg_solve(
            h, prepared["mean_input"], grad_weight / total, None if grad_bias is None else grad_bias / total, alpha,
            self.max_cg, self.eps_cg, self.truncated,
        )  # fmt: skip
        return weight, None if grad_bias is None else bias


register("ea-cg", lambda options: EACGSolver(options.max_cg, options.eps_cg))
register("ea-cg-truncated", lambda options: EACGSolver(options.max_cg, options.eps_cg, truncated=True))
