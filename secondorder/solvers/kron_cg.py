"""The solver `kron-cg`: A = E[h h^T], by conjugate gradients (Chen et al., Eq. 11a)."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from secondorder.linalg import conjugate_gradient
from secondorder.solvers.base import Factors, Solver, SolverOptions, check_cg, finite, register, second_moment, shift_of


@dataclass(frozen=True)
class KroneckerCG(Solver):
    """The solver `kron-cg`: conjugate gradients on Eq. 11a from zero, an iteration being the product H P A.

    Args:
        max_cg: at most so many iterations, >= 1.
        eps_cg: they stop at this residual, relative to the first one, >= 0.
    """

    factorises = False

    max_cg: int = SolverOptions.max_cg
    eps_cg: float = SolverOptions.eps_cg

    def __post_init__(self) -> None:
        check_cg(self.max_cg, self.eps_cg)

    def statistics(self, inputs: list[Tensor], samples: list[Tensor]) -> list[Factors]:
        """Returns the expectations that the solver needs, of every layer's input [m, n_in]."""
        return [{"input_second_moment": second_moment(sample)} for sample in samples]

    def prepare(self, factors: Factors, scale: float, damping: float) -> Factors:
        """Returns what `solve` needs, from the factors, the scale c and the damping l."""
        return {**finite(factors), **shift_of(factors["bias_hessian"], scale, damping)}

    def solve(self, prepared: Factors, grad_weight: Tensor, grad_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns P [n_out, n_in] and d [n_out] (None without `grad_bias`) for a layer's gradients B and g."""
        h, a = prepared["bias_hessian"], prepared["input_second_moment"]
        scale, damping = prepared["shift"]

        def cg(matrix: Callable[[Tensor], Tensor], rhs: Tensor) -> Tensor:
            return conjugate_gradient(matrix, rhs, self.max_cg, self.eps_cg)[0]

        weight = cg(lambda p: scale * (h @ p @ a) + damping * p, -grad_weight)
        return weight, None if grad_bias is None else cg(lambda p: scale * (h @ p) + damping * p, -grad_bias)


register("kron-cg", lambda options: KroneckerCG(options.max_cg, options.eps_cg))
