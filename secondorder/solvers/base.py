"""What a solver is, and the names by which optimizers take one."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from secondorder import ops
from secondorder.errors import NonFiniteError

# What a layer's solver works with: "bias_hessian" [n_out, n_out] and its statistics of the input, by name.
Factors = dict[str, Tensor]


class Solver(ABC):
    """One way to solve a layer's systems: `prepare`, then `solve`, which is cheap in comparison.

    Attributes:
        factorises: whether `prepare` computes anything that is worth keeping over steps, of factors that are then older.
    """

    factorises = True

    @abstractmethod
    def statistics(self, inputs: list[Tensor], samples: list[Tensor]) -> list[Factors]:
        """The expectations over the instances that the solver needs of every layer's input.

        An optimizer averages them over steps and keeps them in its state, whatever their names are.

        Args:
            inputs: h [m, n_in] of every layer, float32 or float64. Where the loss gives rows weights, these are other rows, whose
                plain mean and second moment are the weighted ones.
            samples: some of each input's rows, or all of them, for expectations that cost m n_in^2.

        Returns:
            For every layer a dictionary by name. The package's solvers have "mean_input" a = E[h] [n_in], "input_second_moment"
            E[h h^T] [n_in, n_in] and "mean_square_input" E[|h|^2] (0-dim).
        """

    @abstractmethod
    def prepare(self, factors: Factors, scale: float, damping: float) -> Factors:
        """What `solve` needs of a layer's factors: its inverses or eigendecompositions, say.

        Args:
            factors: "bias_hessian" H [n_out, n_out], and the solver's `statistics` by name.
            scale: c of the system c H P A + l P = -B.
            damping: l of it, > 0.

        Returns:
            Tensors by name, which an optimizer keeps in its state.

        Raises:
            NonFiniteError: a factor holds NaN or inf; the message names it.
        """

    @abstractmethod
    def solve(self, prepared: Factors, grad_weight: Tensor, grad_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The directions of a layer.

        Args:
            prepared: what `prepare` returned.
            grad_weight: B [n_out, n_in], the gradient of the loss w.r.t. W.
            grad_bias: g [n_out], that w.r.t. b; None for a layer without a bias.

        Returns:
            P [n_out, n_in], and d [n_out] or None. Numbers that are not finite come out as such.
        """


@dataclass(frozen=True)
class SolverOptions:
    """The arguments of an optimizer that a solver given by name may take.

    Args:
        max_cg: the CG solvers do at most this many iterations, >= 1.
        eps_cg: the CG solvers stop at this residual, relative to the first one, >= 0.
        max_factor_elements: an input factor [n_in, n_in] of more elements is replaced by its rank-one form, >= 0.
    """

    max_cg: int = 50
    eps_cg: float = 1e-4
    max_factor_elements: int = 2**24


def check_cg(max_cg: int, eps_cg: float) -> None:
    """Raises ValueError unless conjugate gradients do an iteration at least, and stop at a residual >= 0."""
    if not max_cg >= 1:
        raise ValueError(f"expected max_cg >= 1, got {max_cg}")
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
    """The solver of this name with these options, or the one given, which has its own.

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


def second_moment(input: Tensor) -> Tensor:
    """The second moment E[h h^T] = 1/m sum_i h_i h_i^T [n, n] of a layer's inputs, symmetric to the bit.

    Args:
        input: h [m, n], float32 or float64, m >= 1.
    """
    # One step of the bias Hessian's recursion from H = W = 1: it computes half of the symmetric product, a GEMM all of it.
    one = input.new_ones(1, 1)
    return ops.bias_hessian(one, one.expand(1, input.shape[1]), input, None, None, 0.0)


def finite(factors: Factors) -> Factors:
    """The same; factorisations notice NaN and inf by themselves, but CG does not where the gradient is 0."""
    for name, factor in factors.items():
        if not torch.isfinite(factor).all():
            raise NonFiniteError(f"NaN or inf in its {name.replace('_', ' ').replace('hessian', 'Hessian')}")
    return factors


def shift_of(like: Tensor, scale: float, damping: float) -> Factors:
    """Scale and damping as tensors of a factor's dtype and device, for a solver that needs no factorisation."""
    return {"shift": torch.tensor([scale, damping], dtype=like.dtype, device=like.device)}
