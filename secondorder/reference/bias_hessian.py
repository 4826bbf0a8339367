"""The backward recursion of the bias Hessian (Chen et al., Eq. 8b)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from secondorder.reference.activation import activation_derivatives


def pos_eig(eigenvalues: Tensor, gamma: float) -> Tensor:
    """Pos-Eig on eigenvalues: a negative one l becomes gamma * l (Chen et al., between Eq. 3 and 4)."""
    return torch.where(eigenvalues < 0, gamma * eigenvalues, eigenvalues)


def bias_hessian(
    bias_hessian: Tensor, weight: Tensor, d1: Tensor, d2: Tensor | None, grad_input: Tensor | None, gamma: float
) -> Tensor:
    """Eq. 8b: (W^T H W) * E[d1 d1^T] + diag(PosEig(sum_i d2_i * grad_input_i)), symmetric in spite of rounding."""
    result = (weight.T @ bias_hessian @ weight) * (d1.T @ d1 / len(d1))
    result = (result + result.T) / 2
    if d2 is not None and grad_input is not None:
        result += torch.diag(pos_eig((d2 * grad_input).sum(0), gamma))
    return result


_one_layer = bias_hessian  # below, parameters of this name hide it


def bias_hessian_activation(
    bias_hessian: Tensor,
    weight: Tensor,
    saved: Tensor,
    activation: str,
    parameter: float,
    grad_input: Tensor | None,
    gamma: float,
) -> Tensor:
    """Eq. 8b with the derivatives of a known activation."""
    d1, d2 = activation_derivatives(saved, activation, parameter)
    return _one_layer(bias_hessian, weight, d1, None if grad_input is None else d2, grad_input, gamma)


def bias_hessian_chain(
    bias_hessian: Tensor,
    weight: Sequence[Tensor],
    saved: Sequence[Tensor],
    activation: Sequence[str],
    parameter: Sequence[float],
    grad_input: Sequence[Tensor | None],
    gamma: float,
) -> list[Tensor]:
    """Eq. 8b layer after layer, from the last one down."""
    hessians = [bias_hessian]
    for layer in zip(weight, saved, activation, parameter, grad_input, strict=True):
        hessians.append(bias_hessian_activation(hessians[-1], *layer, gamma))
    return hessians[1:]
