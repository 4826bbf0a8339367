"""The solver `auto`: that of two others which the layer's width calls for."""

from dataclasses import dataclass

from torch import Tensor

from secondorder.solvers.base import Factors, Solver, register
from secondorder.solvers.isotropic import Isotropic
from secondorder.solvers.kfi import KFI

# Above this, the product with A^{-1} costs more than the gradient of a usual batch does.
_N_IN = 1024
_KFI, _ISOTROPIC = KFI(_N_IN**2), Isotropic()


@dataclass(frozen=True)
class Auto(Solver):
    """The solver `auto`: `kfi` for a layer with n_in^2 <= max_elements, else `ea-isotropic`.

    Args:
        max_elements: 1024^2, or less.
    """

    max_elements: int = _N_IN**2

    def statistics(self, inputs: list[Tensor], samples: list[Tensor]) -> list[Factors]:
        """Returns the expectations that the solver needs, of every layer's input [m, n_in]."""
        pairs = zip(inputs, samples, strict=True)
        return [(_KFI if h.shape[1] ** 2 <= self.max_elements else _ISOTROPIC).statistics([h], [s])[0] for h, s in pairs]

    def prepare(self, factors: Factors, scale: float, damping: float) -> Factors:
        """Returns what `solve` needs, from the factors, the scale c and the damping l."""
        return (_KFI if "input_second_moment" in factors else _ISOTROPIC).prepare(factors, scale, damping)

    def solve(self, prepared: Factors, grad_weight: Tensor, grad_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns P [n_out, n_in] and d [n_out] (None without `grad_bias`) for a layer's gradients B and g."""
        return (_KFI if "input_inverse" in prepared else _ISOTROPIC).solve(prepared, grad_weight, grad_bias)


register("auto", lambda options: Auto(min(options.max_factor_elements, _N_IN**2)))
