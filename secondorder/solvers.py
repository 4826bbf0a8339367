"""From a layer's curvature and gradients to its update directions: which linear system a step solves, and how.

For a layer z = W h + b with gradients B and g of the mean loss, bias Hessian H, input factor A ~ E[h h^T], a scale c and a
damping l, the directions P and d solve

    c H P A + l P = -B     and     (c H + l I) d = -g.

EACG's fixed damping alpha is c = 1 - alpha, l = alpha (Chen et al., Eq. 9); c = 1 is Levenberg-Marquardt's. The solvers
differ in A and in exactness:

| solver            | A                              | method                                     |
|-------------------|--------------------------------|--------------------------------------------|
| `ea-cg`           | a a^T (Eq. 11b)                | closed form across a, CG along it          |
| `ea-cg-truncated` | a a^T                          | the paper's CG iterates                    |
| `kron-cg`         | E[h h^T] (Eq. 11a)             | CG                                         |
| `kfi`             | E[h h^T], factored damping     | two inverses (Eq. 12)                      |
| `kfi-rank-one`    | a a^T, factored damping        | inverse and Sherman-Morrison (Eq. 13)      |
| `exact`           | E[h h^T]                       | both eigendecompositions                   |
| `auto`            | that of one of these two       | `kfi` up to n_in = 1024, else `ea-isotropic` |
| `ea-isotropic`    | a a^T + rho I (docs/math.md)   | three inverses of [n_out, n_out]           |

Every statistic of the input is an expectation, so that averages of it over steps are statistics again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from secondorder import ops
from secondorder.linalg import conjugate_gradient

# What a layer's solver works with: "bias_hessian" [n_out, n_out] and its statistics of the input, by name.
Factors = dict[str, Tensor]


class Solver(Protocol):
    """One way to solve a layer's systems. `prepare` may be amortised over steps; `solve` is cheap in comparison."""

    def statistics(self, inputs: list[Tensor], samples: list[Tensor]) -> list[Factors]:
        """The expectations over the instances that the solver needs of every layer's input [m, n_in].

        "mean_input" a = E[h] [n_in], "input_second_moment" E[h h^T] [n_in, n_in], or "mean_square_input" E[|h|^2] (0-dim).
        The second moment, which costs m n_in^2, is taken over the `samples` alone, some of an input's rows or all of them.
        """

    def prepare(self, factors: Factors, scale: float, damping: float) -> Factors:
        """What `solve` needs, as tensors (an optimizer keeps them in its state).

        Raises:
            RuntimeError: a factorisation failed; the message names the factor.
        """

    def solve(self, prepared: Factors, grad_weight: Tensor, grad_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """P [n_out, n_in] and d [n_out] (None without `grad_bias`). Numbers that are not finite come out as such."""


@dataclass(frozen=True)
class EACG:
    """The solvers `ea-cg` and `ea-cg-truncated`, by `ops.eacg_solve`; see there for the arguments."""

    max_cg: int
    eps_cg: float
    truncated: bool = False

    def statistics(self, inputs: list[Tensor], samples: list[Tensor]) -> list[Factors]:
        """See `Solver`."""
        return [{"mean_input": a} for a in ops.mean_inputs(inputs)]

    def prepare(self, factors: Factors, scale: float, damping: float) -> Factors:
        """See `Solver`."""
        return {**_finite(factors), **_shift(factors["bias_hessian"], scale, damping)}

    def solve(self, prepared: Factors, grad_weight: Tensor, grad_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Solver`."""
        # The operator has (1 - alpha) H P a a^T + alpha P = -B: of alpha = l / (c + l) where l <= c. Above, where that may round
        # to 1, of alpha = 1/2, with the rest of c / l in H.
        scale, damping = prepared["shift"].tolist()
        h, alpha, total = prepared["bias_hessian"], damping / (scale + damping), scale + damping
        if damping > scale:
            h, alpha, total = h * (scale / damping), 0.5, 2 * damping
        weight, bias, _ = ops.eacg_solve(
            h, prepared["mean_input"], grad_weight / total, None if grad_bias is None else grad_bias / total, alpha,
            self.max_cg, self.eps_cg, self.truncated,
        )  # fmt: skip
        return weight, None if grad_bias is None else bias


@dataclass(frozen=True)
class KroneckerCG:
    """The solver `kron-cg`: conjugate gradients on Eq. 11a from zero, an iteration being the product H P A."""

    max_cg: int
    eps_cg: float

    def statistics(self, inputs: list[Tensor], samples: list[Tensor]) -> list[Factors]:
        """See `Solver`."""
        return [{"input_second_moment": second_moment(sample)} for sample in samples]

    def prepare(self, factors: Factors, scale: float, damping: float) -> Factors:
        """See `Solver`."""
        return {**_finite(factors), **_shift(factors["bias_hessian"], scale, damping)}

    def solve(self, prepared: Factors, grad_weight: Tensor, grad_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Solver`."""
        h, a = prepared["bias_hessian"], prepared["input_second_moment"]
        scale, damping = prepared["shift"]

        def cg(matrix: Callable[[Tensor], Tensor], rhs: Tensor) -> Tensor:
            return conjugate_gradient(matrix, rhs, self.max_cg, self.eps_cg)[0]

        weight = cg(lambda p: scale * (h @ p @ a) + damping * p, -grad_weight)
        return weight, None if grad_bias is None else cg(lambda p: scale * (h @ p) + damping * p, -grad_bias)


@dataclass(frozen=True)
class KFI:
    """The solvers `kfi` and `kfi-rank-one`: Kronecker-factored inverses (Chen et al., Eq. 12, 13; Botev et al., Eq. 36 to 38).

        P = -(H + sqrt(l)/pi I)^{-1} B (A + pi sqrt(l) I)^{-1},   pi^2 = (tr A / n_in) / (tr H / n_out),   d = -(H + l I)^{-1} g.

    As in the papers there is no scale c: it counts as 1.

    Args:
        max_elements: A = E[h h^T] where n_in^2 is at most this, else a a^T (Eq. 13), by Sherman-Morrison; 0: always that.
    """

    max_elements: int

    def statistics(self, inputs: list[Tensor], samples: list[Tensor]) -> list[Factors]:
        """See `Solver`."""
        rank_one = [h for h in inputs if h.shape[1] ** 2 > self.max_elements]
        means = iter(ops.mean_inputs(rank_one))
        return [
            {"mean_input": next(means)} if h.shape[1] ** 2 > self.max_elements else {"input_second_moment": second_moment(sample)}
            for h, sample in zip(inputs, samples, strict=True)
        ]

    def prepare(self, factors: Factors, scale: float, damping: float) -> Factors:
        """See `Solver`."""
        h = factors["bias_hessian"]
        root = damping**0.5
        if "mean_input" in factors:
            a = factors["mean_input"]
            pi = _balance(a @ a / len(a), h)
            prepared = {"mean_input": a, "input_shift": pi * root}
        else:
            moment = factors["input_second_moment"]
            pi = _balance(moment.trace() / len(moment), h)
            prepared = {"input_inverse": inverse(_shifted(moment, 1.0, pi * root), "input second moment")}
        shifted = torch.stack([_shifted(h, 1.0, root / pi), _shifted(h, 1.0, damping)])
        return {**prepared, "hessian_inverses": inverse(shifted, "bias Hessian")}

    def solve(self, prepared: Factors, grad_weight: Tensor, grad_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Solver`."""
        weight_inverse, bias_inverse = prepared["hessian_inverses"]
        weight = ops.precondition(weight_inverse, grad_weight, prepared.get("input_inverse")).neg_()
        if "mean_input" in prepared:
            a, shift = prepared["mean_input"], prepared["input_shift"]
            weight.addr_(weight @ a / (shift + a @ a), a, alpha=-1).div_(shift)
        return weight, None if grad_bias is None else -(bias_inverse @ grad_bias)


@dataclass(frozen=True)
class Exact:
    """The solver `exact`: P = -Q_H [(Q_H^T B Q_A) / (c l_H l_A^T + l)] Q_A^T by both eigendecompositions (docs/math.md)."""

    def statistics(self, inputs: list[Tensor], samples: list[Tensor]) -> list[Factors]:
        """See `Solver`."""
        return [{"input_second_moment": second_moment(sample)} for sample in samples]

    def prepare(self, factors: Factors, scale: float, damping: float) -> Factors:
        """See `Solver`."""
        values_h, vectors_h = eigh(factors["bias_hessian"], "bias Hessian")
        values_a, vectors_a = eigh(factors["input_second_moment"], "input second moment")
        return {
            "hessian_vectors": vectors_h, "input_vectors": vectors_a,
            "weight_values": scale * torch.outer(values_h, values_a) + damping, "bias_values": scale * values_h + damping,
        }  # fmt: skip

    def solve(self, prepared: Factors, grad_weight: Tensor, grad_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Solver`."""
        q_h, q_a = prepared["hessian_vectors"], prepared["input_vectors"]
        weight = -q_h @ ((q_h.T @ grad_weight @ q_a) / prepared["weight_values"]) @ q_a.T
        return weight, None if grad_bias is None else -q_h @ ((q_h.T @ grad_bias) / prepared["bias_values"])


@dataclass(frozen=True)
class Isotropic:
    """The solver `ea-isotropic`: A = a a^T + rho I, rho = tr Cov(h) / n_in, solved exactly (docs/math.md, section 6).

        P = -[M^{-1} (B - u a^T / s) + q a^T / s],   M = c rho H + l I,   (c (s + rho) H + l I) q = u,

    with u = B a and s = a^T a.
    """

    def statistics(self, inputs: list[Tensor], samples: list[Tensor]) -> list[Factors]:
        """See `Solver`."""
        means = ops.mean_inputs(inputs)
        squares = [torch.linalg.vector_norm(h).square() / len(h) for h in inputs]
        return [{"mean_input": a, "mean_square_input": square} for a, square in zip(means, squares, strict=True)]

    def prepare(self, factors: Factors, scale: float, damping: float) -> Factors:
        """See `Solver`."""
        h, a = factors["bias_hessian"], factors["mean_input"]
        s = a @ a
        rho = ((factors["mean_square_input"] - s) / len(a)).clamp(min=0)
        systems = torch.stack([_shifted(h, scale * c, damping) for c in (rho, s + rho, 1.0)])
        return {"mean_input": a, "hessian_inverses": inverse(systems, "bias Hessian")}

    def solve(self, prepared: Factors, grad_weight: Tensor, grad_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Solver`."""
        across, along, bias_inverse = prepared["hessian_inverses"]
        a = prepared["mean_input"]
        s = a @ a
        u = grad_weight @ a
        unit = torch.where(s > 0, a / s, 0)
        # M^{-1} (B - u a^T / s) + q a^T / s: the two terms along a are one outer product.
        weight = ops.precondition(across, grad_weight, None).addr_(along @ u - across @ u, unit).neg_()
        return weight, None if grad_bias is None else -(bias_inverse @ grad_bias)


# Above this, the product with A^{-1} costs more than the gradient of a usual batch does.
_AUTO_N_IN = 1024


@dataclass(frozen=True)
class Auto:
    """The solver `auto`: `kfi` for a layer with n_in <= 1024, else `ea-isotropic`."""

    def statistics(self, inputs: list[Tensor], samples: list[Tensor]) -> list[Factors]:
        """See `Solver`."""
        pairs = zip(inputs, samples, strict=True)
        return [(_KFI if h.shape[1] <= _AUTO_N_IN else _ISOTROPIC).statistics([h], [sample])[0] for h, sample in pairs]

    def prepare(self, factors: Factors, scale: float, damping: float) -> Factors:
        """See `Solver`."""
        return (_KFI if "input_second_moment" in factors else _ISOTROPIC).prepare(factors, scale, damping)

    def solve(self, prepared: Factors, grad_weight: Tensor, grad_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Solver`."""
        return (_KFI if "input_inverse" in prepared else _ISOTROPIC).solve(prepared, grad_weight, grad_bias)


_KFI, _ISOTROPIC = KFI(_AUTO_N_IN**2), Isotropic()


def second_moment(input: Tensor) -> Tensor:
    """E[h h^T] [n, n] of inputs [m, n], float32 or float64."""
    # One step of the bias Hessian's recursion from H = W = 1: it computes half of the symmetric product, a GEMM all of it.
    one = input.new_ones(1, 1)
    return ops.bias_hessian(one, one.expand(1, input.shape[1]), input, None, None, 0.0)


def inverse(matrix: Tensor, name: str) -> Tensor:
    """The inverse of a positive semi-definite matrix [..., n, n] that rounding may have left indefinite.

    A product with it is several times as fast as the two triangular solves with a Cholesky factor.

    Raises:
        RuntimeError: it holds NaN or inf; the message names it.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not info.any():
        return torch.cholesky_inverse(factor)
    values, vectors = _eigh(matrix.double(), name)
    floor = values.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) * torch.finfo(matrix.dtype).eps
    return ((vectors / values.clamp(min=floor).unsqueeze(-2)) @ vectors.mT).to(matrix.dtype)


def eigh(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues, rounding's negative ones set to 0, and eigenvectors of a positive semi-definite matrix [n, n].

    In float32 LAPACK may fail to converge on an ill-conditioned matrix; it is then done in float64.

    Raises:
        RuntimeError: the matrix holds NaN or inf; the message names it.
    """
    try:
        values, vectors = _eigh(matrix, name)
    except torch.linalg.LinAlgError:
        values, vectors = (t.to(matrix.dtype) for t in _eigh(matrix.double(), name))
    return values.clamp(min=0), vectors


def _eigh(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if not torch.isfinite(matrix).all():
        raise RuntimeError(f"NaN or inf in its {name}")
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return values, vectors


def _finite(factors: Factors) -> Factors:
    """The same; factorisations notice NaN and inf by themselves, but CG does not where the gradient is 0."""
    for name, factor in factors.items():
        if not torch.isfinite(factor).all():
            raise RuntimeError(f"NaN or inf in its {name.replace('_', ' ').replace('hessian', 'Hessian')}")
    return factors


def _shift(like: Tensor, scale: float, damping: float) -> Factors:
    return {"shift": torch.tensor([scale, damping], dtype=like.dtype, device=like.device)}


def _shifted(matrix: Tensor, scale: float | Tensor, shift: float | Tensor) -> Tensor:
    result = scale * matrix
    result.diagonal().add_(shift)
    return result


def _balance(mean_a: Tensor, hessian: Tensor) -> Tensor:
    """Pi of KFI; a zero trace says nothing about the balance, so that it is 1 then."""
    mean_h = hessian.trace() / len(hessian)
    pi = (mean_a / mean_h).sqrt()
    return torch.where((mean_a > 0) & (mean_h > 0) & torch.isfinite(pi), pi, torch.ones_like(pi))


# name -> the solver, given max_cg, eps_cg and the budget of elements of an input factor
SOLVERS: dict[str, Callable[[int, float, int], Solver]] = {
    "ea-cg": lambda max_cg, eps_cg, elements: EACG(max_cg, eps_cg),
    "ea-cg-truncated": lambda max_cg, eps_cg, elements: EACG(max_cg, eps_cg, truncated=True),
    "kron-cg": lambda max_cg, eps_cg, elements: KroneckerCG(max_cg, eps_cg),
    "kfi": lambda max_cg, eps_cg, elements: KFI(elements),
    "kfi-rank-one": lambda max_cg, eps_cg, elements: KFI(0),
    "exact": lambda max_cg, eps_cg, elements: Exact(),
    "ea-isotropic": lambda max_cg, eps_cg, elements: Isotropic(),
    "auto": lambda max_cg, eps_cg, elements: Auto(),
}
