"""EigenAdam's state of a matrix, and of the step length."""

import math
from typing import Any

import torch
from torch import Tensor

from secondorder import ops
from secondorder._tensors import device_for, outside_inference_mode
from secondorder.ops.eigen import FIRST_LENGTH, LENGTH
from secondorder.optim._eigen.matrices import Matrix, computed_in

SHARED = ("control", "steps", "refused")  # what the first parameter's state has for all of them
MOMENTS = ("exp_avg", "exp_avg_sq", "last")  # of a matrix: the first, the second, and some rows of the last step
FIRST_STEPS = 5  # so many steps renew bases, and count the rows of tables that are looked up
SAMPLED = 4096  # of a parameter without bases, the slopes of so many elements stand for those of all


@outside_inference_mode
def new_control(like: Tensor) -> Tensor:
    """Returns the control of the step length [8], in float64, as training begins; see `ops.eigen_step_`."""
    control = torch.zeros(len(ops.CONTROL), dtype=torch.float64, device=device_for(torch.float64, like))
    control[LENGTH] = FIRST_LENGTH
    return control


def new_bases(matrix: Matrix, rank: int) -> dict[str, Any]:
    """Returns the state of a matrix without moments, with random bases of as many directions as `basis_sizes` says."""
    n, p = matrix.shape
    device, dtype = matrix.weight.device, computed_in(matrix.weight)
    ku, kv = basis_sizes(matrix, rank) if matrix.has_bases else (0, 0)
    generator = torch.Generator("cpu").manual_seed(n * 1_000_003 + p)

    def basis(k: int, length: int) -> Tensor:
        numbers = torch.randn(length, k, generator=generator, dtype=torch.float64, device="cpu")
        return torch.linalg.qr(numbers)[0].T.to(device, dtype).contiguous()

    return {
        **({"share": 1.0} if matrix.lookups else {}),  # the share of its rows that a step looks up
        "step": 0, "renewals": 0, "unseen": 0, "basis_out": basis(ku, n), "basis_in": basis(kv, p),
        "scale_out": torch.zeros(ku, device=device, dtype=dtype), "scale_in": torch.zeros(kv, device=device, dtype=dtype),
        "mean": torch.zeros(p if matrix.bias is not None else 0, device=device, dtype=dtype),
        "size": torch.zeros(1, device=device_for(torch.float64, matrix.weight), dtype=torch.float64),
        "low": math.inf, "high": -math.inf,  # what the loop sets elements to; as long as low > high, it sets none
    }  # fmt: skip


def basis_sizes(matrix: Matrix, rank: int) -> tuple[int, int]:
    """Returns how many directions the bases U and V of a map have: `rank`, or all if the side has at most 2 rank + 1."""
    ku, kv = (length if length <= 2 * rank + 1 else rank for length in matrix.shape)
    return ku, kv


def sampled_rows(n: int, p: int, ku: int) -> int:
    """Returns how many rows of E [n, p] the slopes are taken from."""
    return max(1, min(n, ku or SAMPLED // p))


def new_state(matrix: Matrix, rank: int) -> dict[str, Any]:
    """Returns the state of a matrix, with all parts of a moment in one flat tensor."""
    state = new_bases(matrix, rank)
    lengths = moment_lengths(*matrix.shape, len(state["basis_out"]), len(state["basis_in"]), matrix.bias is not None)
    return state | {name: state["mean"].new_zeros(length) for name, length in lengths.items()}


def moment_lengths(n: int, p: int, ku: int, kv: int, bias: bool) -> dict[str, int]:
    """Returns how many numbers each moment of a matrix [n, p] has with bases of these sizes."""
    columns = kv + bias
    rest = ku * columns + (n * columns if ku < n else 0) + (ku * p if kv < p else 0)
    residual = ku < n and kv < p
    moments = {"exp_avg": n * p, "exp_avg_sq": n * p, "last": sampled_rows(n, p, ku) * p}
    return {name: rest + residual * more for name, more in moments.items()}


def cast_state(state: dict[str, Any], p: Tensor) -> dict[str, Any]:
    """Returns a matrix' state on its parameter's device, in the dtype that the parameter is computed in."""

    def own(key: str, value: Tensor) -> Tensor:
        dtype = torch.float64 if key in ("control", "size") else computed_in(p)
        return value.to(device_for(dtype, p), dtype)

    return {key: own(key, value) if isinstance(value, Tensor) else value for key, value in state.items()}


def is_current(state: dict[str, Any], p: Tensor) -> bool:
    """Returns whether it is a matrix' state on its parameter's device, in the dtype that the parameter is computed in."""
    return "basis_out" in state and state["basis_out"].dtype is computed_in(p) and state["basis_out"].device == p.device


def share_in_bases(matrix: Matrix, state: dict[str, Any]) -> Tensor:
    """Returns the share of a gradient's mean square that lies in either basis: all of it but E."""
    (n, p), squares = matrix.shape, state["exp_avg_sq"].double()  # E comes last in it
    if len(state["basis_out"]) == n or len(state["basis_in"]) == p:
        squares = torch.cat([squares, squares.new_zeros(n * p)])
    whole = squares.sum()
    return torch.where(whole > 0, squares[: -n * p].sum() / whole, 0.0)


def forget_state(state: dict[str, Any], *kept: str) -> None:
    """Drops a parameter's own state, but for what is to be kept, so that it begins anew."""
    for key in state.keys() - {*SHARED, *kept}:
        del state[key]


def fits_matrix(matrix: Matrix, state: dict[str, Any]) -> bool:
    """Returns whether a state with bases is one of such a matrix: of its shape, with or without a bias, and bases or none."""
    shape = state["basis_out"].shape[-1], state["basis_in"].shape[-1]
    return (
        shape == matrix.shape
        and (state["mean"].numel() > 0) == (matrix.bias is not None)
        and has_no_bases(state) != matrix.has_bases
    )


def has_no_bases(state: dict[str, Any]) -> bool:
    """Returns whether it is the state of a matrix whose elements each stand for themselves."""
    return "basis_in" in state and not len(state["basis_in"])


def check_state(owner: str, matrix: Matrix | None, state: dict[str, Any]) -> None:
    """Raises if a parameter cannot have a saved state.

    Args:
        owner: who loads it, for the error.
        matrix: the matrix whose weight the parameter is; None: it is a bias, whose state is its weight's.
        state: the saved state.

    Raises:
        ValueError: it is the state of another optimizer, or one of another shape, bias or basis.
    """
    if "basis_out" not in state or "basis_in" not in state:
        raise ValueError(f"{owner}: expected the state of an EigenAdam, got one of {sorted(state)}")
    shape = state["basis_out"].shape[-1], state["basis_in"].shape[-1]
    if matrix is None or shape != matrix.shape:
        wanted = "no state for a bias" if matrix is None else f"the state of a matrix of shape {list(matrix.shape)}"
        named = "" if matrix is None else f" for {matrix.name!r}"
        raise ValueError(f"{owner}: expected {wanted}{named}, got one of {list(shape)}")
    if not fits_matrix(matrix, state):
        raise ValueError(
            f"{owner}: expected the state of an optimizer that was made as this one is, got one for {matrix.name!r} that "
            "knows another bias or basis; give both the model, or neither"
        )
