"""What a solver is, and the names by which optimizers take one."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from secondorder import ops
from secondorder._arguments import is_whole
from secondorder.errors import NonFiniteError

# What a layer's solver works with: "bias_hessian" [n_out, n_out] and its statistics of the input, by name.
Factors = dict[str, Tensor]


class Solver(ABC):
    """Solves the systems c H P A + l P = -B and (c H + l I) d = -g of a layer: `prepare` does the costly part, `solve` the rest.

    Attributes:
        factorises: whether an optimizer may keep what `prepare` returns for several steps, in which it serves newer factors.
    """

    factorises = True

    @abstractmethod
    def statistics(self, inputs: list[Tensor], samples: list[Tensor]) -> list[Factors]:
        """Returns the expectations over the instances that the solver needs, of every layer's input.

        An optimizer averages them over steps and keeps them in its state by the names that they have here.

        Args:
            inputs: h [m, n_in] of every layer, float32 or float64. If the loss weighs its rows, these are other rows, whose plain
                mean and second moment equal the weighted ones.
            samples: some of each input's rows, or all of them, for expectations that cost m n_in^2.

        Returns:
            A dictionary for every layer. The package's solvers use the names "mean_input" for a = E[h] [n_in],
            "input_second_moment" for E[h h^T] [n_in, n_in], and "mean_square_input" for E[|h|^2] (0-dim).
        """

    @abstractmethod
    def prepare(self, factors: Factors, scale: float, damping: float) -> Factors:
        """Returns what `solve` needs, from a layer's factors: their inverses or eigendecompositions, for example.

        Args:
            factors: "bias_hessian" H [n_out, n_out], and the solver's `statistics` by name.
            scale: c of the system c H P A + l P = -B.
            damping: l of that system, > 0.

        Returns:
            Tensors by name, which an optimizer keeps in its state.

        Raises:
            NonFiniteError: a factor holds NaN or inf; the message names it.
        """

    @abstractmethod
    def solve(self, prepared: Factors, grad_weight: Tensor, grad_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns the directions of a layer.

        Args:
            prepared: what `prepare` returned.
            grad_weight: B [n_out, n_in], the gradient of the loss w.r.t. W.
            grad_bias: g [n_out], the gradient w.r.t. b; None for a layer without a bias.

        Returns:
            P [n_out, n_in], and d [n_out] or None. Solutions that are not finite are returned as they are.
        """


@dataclass(frozen=True)
class SolverOptions:
    """Holds the arguments of an optimizer that a solver given by name may use.

    Args:
        max_cg: the most iterations of the solvers that use conjugate gradients, >= 1.
        eps_cg: these solvers stop once the residual is at most this times the first one, >= 0.
        max_factor_elements: limit on n_in^2 of a layer, >= 0; above it a rank-one form replaces the input factor [n_in, n_in].
    """

    max_cg: int = 50
    eps_cg: float = 1e-4
    max_factor_elements: int = 2**24


def check_cg(max_cg: int, eps_cg: float) -> None:
    """Raises ValueError unless conjugate gradients do an iteration at least, and stop at a residual >= 0."""
    if not (is_whole(max_cg) and max_cg >= 1):
        raise ValueError(f"expected max_cg to be an int >= 1, got {max_cg}")
    if not eps_cg >= 0:
        raise ValueError(f"expected eps_cg >= 0, got {eps_cg}")


# name -> what makes the solver
SOLVERS: dict[str, Callable[[SolverOptions], Solver]] = {}


def register(name: str, make: Callable[[SolverOptions], Solver]) -> None:
    """Makes a solver known to optimizers by a name.

    Args:
        name: what an optimizer's `solver` may then be.
        make: called with the optimizer's `SolverOptions`, returns the solver.

    Raises:
        ValueError: the name is taken.
    """
    if name in SOLVERS:
        raise ValueError(f"expected a name that no solver has yet, got {name!r}")
    SOLVERS[name] = make


def solver_by_name(solver: str | Solver, options: SolverOptions) -> Solver:
    """Makes the solver of this name with these options, or returns the one given, which has its own options.

    Args:
        solver: one of `SOLVERS`, or a `Solver`.
        options: for a solver by name.

    Raises:
        ValueError: there is none of this name.
    """
    if isinstance(solver, Solver):
        return solver
    if not isinstance(solver, str) or solver not in SOLVERS:
        raise ValueError(f"expected solver to be one of {', '.join(map(repr, SOLVERS))}, or a Solver, got {solver!r}")
    return SOLVERS[solver](options)


def mean_inputs(inputs: list[Tensor]) -> list[Tensor]:
    """Returns a = E[h] [n_in] of every layer's inputs [m, n_in]; NaN where a^T a overflows, which every step then refuses.

    Where a layer's gradient is zero, as behind saturated units, the step itself would not notice; the next ones, in whose
    average this a is, would all fail.
    """
    means = ops.mean_inputs(inputs)
    for a in means:
        a.add_(a.dot(a), alpha=0)
    return means


def second_moment(input: Tensor) -> Tensor:
    """Returns the second moment E[h h^T] = 1/m sum_i h_i h_i^T [n, n] of a layer's inputs, symmetric to the bit.

    Args:
        input: h [m, n], float32 or float64, m >= 1.
    """
    # One step of the bias Hessian's recursion from H = W = 1: it computes half of the symmetric product, a GEMM all of it.
    one = input.new_ones(1, 1)
    return ops.bias_hessian(one, one.expand(1, input.shape[1]), input, None, None, 0.0)


def finite(factors: Factors) -> Factors:
    """Returns the factors, or raises NonFiniteError: conjugate gradients do not notice NaN and inf if the gradient is 0."""
    for name, factor in factors.items():
        if not torch.isfinite(factor).all():
            raise NonFiniteError(f"NaN or inf in its {name.replace('_', ' ').replace('hessian', 'Hessian')}")
    return factors


def shift_of(like: Tensor, scale: float, damping: float) -> Factors:
    """Returns scale and damping as a tensor of a factor's dtype and device, for a solver that needs no factorisation."""
    return {"shift": torch.tensor([scale, damping], dtype=like.dtype, device=like.device)}
