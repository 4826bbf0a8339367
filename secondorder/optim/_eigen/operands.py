"""The parameters of matrices and their gradients, as EigenAdam's operators take them."""

import math

import torch
from torch import Tensor

from secondorder._tensors import cast, local_rows, real_view
from secondorder.optim._eigen.bounds import Bounds, Held, held_back
from secondorder.optim._eigen.matrices import Matrix, computed_in


class Operands:
    """The parameters of matrices as EigenAdam's operators take them, with the gradients of what is minimised.

    Attributes:
        dtype: what all are computed in.
        weights: [n, p] of every matrix, contiguous, to be written to.
        biases: [n] of every matrix, likewise; [0] without one.
        weight_grads: G [n, p] of every matrix; zeros where there is none.
        bias_grads: g [n] of every matrix, likewise; [0] without a bias.
        held: what of weights moves by itself, by their positions.

    Args:
        owner: who asks, for errors.
        matrices: those that have a gradient.
        sign: -1 where the loss is maximised.

    Raises:
        RuntimeError: parameters are on several devices or of several dtypes, expanded, of other shapes than before, or have
            sparse gradients.
    """

    def __init__(self, owner: str, matrices: list[Matrix], sign: int):
        self._owner, self._first, self._sign = owner, matrices[0], sign
        self.dtype, self._device = computed_in(self._first.weight), self._first.weight.device
        self._copies: list[tuple[Tensor, Tensor]] = []
        self.weights: list[Tensor] = []
        self.biases: list[Tensor] = []
        self.weight_grads: list[Tensor] = []
        self.bias_grads: list[Tensor] = []
        self.held: dict[int, Held] = {}
        nothing = torch.empty(0, dtype=self.dtype, device=self._device)
        for matrix in matrices:
            values, grad = self._with_gradient(matrix.weight, matrix)
            if values.shape != matrix.local_shape:
                if values.numel() != math.prod(matrix.local_shape):
                    raise RuntimeError(
                        f"{owner}: expected parameters of the shapes that they have had so far, got {list(matrix.weight.shape)} "
                        f"for {matrix.name!r}; make a new optimizer"
                    )
                values, grad = values.detach().view(matrix.local_shape), grad.reshape(matrix.local_shape)
            self.weights.append(values)
            self.weight_grads.append(grad)
            values, grad = (nothing, nothing) if matrix.bias is None else self._with_gradient(matrix.bias, matrix)
            self.biases.append(values)
            self.bias_grads.append(grad)

    def hold_back(self, i: int, matrix: Matrix, bounds: Bounds) -> None:
        """Leaves out the elements at the bounds that the loop holds the i-th weight in, which move by themselves."""
        self.weight_grads[i], self.held[i] = held_back(self.weights[i], self.weight_grads[i], bounds, matrix.weight.dtype)

    def write_back(self) -> None:
        """Gives the parameters what was written to their copies."""
        for p, copy in self._copies:
            p.copy_(copy)

    def _with_gradient(self, p: Tensor, matrix: Matrix) -> tuple[Tensor, Tensor]:
        """Returns a parameter's values, itself where that is possible, and its gradient."""
        g = p.grad
        if (  # almost always; with small layers each call of torch is what a step costs
            g is not None
            and matrix.is_real_and_local
            and p.dtype is self.dtype
            and g.dtype is self.dtype
            and p.device == self._device
            and p.is_contiguous()
            and g.layout is torch.strided
            and self._sign > 0
        ):
            return p, g
        self._check(p, matrix)
        parts = real_view(local_rows(p)).detach()
        values = parts.to(self.dtype).contiguous()
        if values.data_ptr() != parts.data_ptr():
            self._copies.append((parts, values))
        if g is None:
            return values, torch.zeros_like(values)
        grad = cast(real_view(local_rows(g)), self.dtype)
        return values, -grad if self._sign < 0 else grad

    def _check(self, p: Tensor, matrix: Matrix) -> None:
        """Raises RuntimeError where a parameter is not like the first one, or has no memory of its own, or a sparse gradient."""
        first, owner = self._first, self._owner
        if p.device != self._device:
            raise RuntimeError(
                f"{owner}: expected all parameters on one device, got {first.name!r} on {self._device} and "
                f"{matrix.name!r} on {p.device}"
            )
        if computed_in(p) is not self.dtype:
            raise RuntimeError(
                f"{owner}: expected all parameters of one dtype, 16-bit ones counting as float32, got {first.weight.dtype} and "
                f"{p.dtype} for {matrix.name!r}; give those of each dtype an optimizer of their own"
            )
        if not p.is_contiguous() and any(stride == 0 < length - 1 for stride, length in zip(p.stride(), p.shape, strict=True)):
            raise RuntimeError(f"{owner}: expected parameters with memory of their own, got expanded {matrix.name!r}")
        if p.grad is not None and p.grad.layout is not torch.strided:
            raise RuntimeError(f"{owner}: expected dense gradients, got a sparse one for {matrix.name!r}; use sparse=False")
