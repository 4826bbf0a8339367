"""What EigenAdam keeps of a matrix, and of the step length."""

from typing import Any

import torch
from torch import Tensor

from secondorder import ops
from secondorder._tensors import compute_dtype, device_for
from secondorder.optim._matrices import Matrix

LENGTH, OSCILLATIONS, SLOPE, LAST_SLOPE, STEPS, REFUSED, UNRENEWED = range(len(ops.CONTROL))

SAMPLED = 4096  # elements of what has no basis, whose slopes stand for all


def new_control(like: Tensor) -> Tensor:
    """The control of the step length, [7] in float64, as training begins: see `ops.eigen_step_`."""
    control = torch.zeros(len(ops.CONTROL), dtype=torch.float64, device=device_for(torch.float64, like))
    control[LENGTH] = 0.01
    return control


def step_length(entries: list[float]) -> float:
    """The step length that control's entries give, without lr."""
    return entries[LENGTH] / (1 + entries[OSCILLATIONS] / 25) ** 0.5 * min(1.0, (entries[STEPS] + 2) / 14)


def new_state(matrix: Matrix, rank: int) -> dict[str, Any]:
    """The state of a matrix, with random bases of `rank` directions; a side with at most 2 rank + 1 elements has all."""
    n, p = matrix.shape
    device, dtype = matrix.weight.device, compute_dtype(matrix.weight.dtype)
    k = rank if matrix.eigen else 0
    ku, kv = (length if matrix.eigen and length <= 2 * k + 1 else k for length in (n, p))
    columns = kv + (matrix.bias is not None)
    rest = ku * columns + (n * columns if ku < n else 0) + (ku * p if kv < p else 0)
    residual = ku < n and kv < p
    sampled = max(1, min(n, k or SAMPLED // p)) if residual else 0

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    generator = torch.Generator("cpu").manual_seed(n * 1_000_003 + p)

    def basis(k: int, length: int) -> Tensor:
        numbers = torch.randn(length, k, generator=generator, dtype=torch.float64, device="cpu")
        return torch.linalg.qr(numbers)[0].T.to(device, dtype).contiguous()

    return {
        "step": 0, "renewals": 0, "unseen": 0, "basis_out": basis(ku, n), "basis_in": basis(kv, p), "scale_out": zeros(ku),
        "scale_in": zeros(kv), "mean": zeros(p if matrix.bias is not None else 0), "exp_avg": zeros(rest + residual * n * p),
        "exp_avg_sq": zeros(rest + residual * n * p), "last": zeros(rest + sampled * p),
        "size": torch.zeros(1, device=device_for(torch.float64, matrix.weight), dtype=torch.float64),
    }  # fmt: skip


def cast_state(state: dict[str, Any], p: Tensor) -> dict[str, Any]:
    """A matrix' state on its parameter's device, in the dtype that this is computed in."""

    def own(key: str, value: Tensor) -> Tensor:
        dtype = torch.float64 if key in ("control", "size") else compute_dtype(p.dtype)
        return value.to(device_for(dtype, p), dtype)

    return {key: own(key, value) if isinstance(value, Tensor) else value for key, value in state.items()}


def captured(matrix: Matrix, state: dict[str, Any]) -> Tensor:
    """The share of a gradient's mean square that is not in E, the part outside of both bases, which comes last."""
    (n, p), squares = matrix.shape, state["exp_avg_sq"].double()
    if len(state["basis_out"]) == n or len(state["basis_in"]) == p:
        squares = torch.cat([squares, squares.new_zeros(n * p)])
    whole = squares.sum()
    return torch.where(whole > 0, squares[: -n * p].sum() / whole, 0.0)
