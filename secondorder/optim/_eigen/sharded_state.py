"""The state of a matrix whose rows ranks share, and its moments part by part."""

from typing import Any

import torch
from torch import Tensor

from secondorder import reference
from secondorder._tensors import is_sharded, local_rows
from secondorder.optim._eigen.matrices import Matrix
from secondorder.optim._eigen.shards import first_row, whole_shape
from secondorder.optim._eigen.state import MOMENTS, new_bases, sampled_rows


def new_sharded_state(matrix: Matrix, rank: int) -> dict[str, Any]:
    """Returns the state of a matrix, with a tensor for each part of a moment, "exp_avg_C" and so on; R and E are DTensors."""
    state = new_bases(matrix, rank)
    zero, shapes = state["mean"].new_zeros(()), part_shapes(matrix, state)
    for name in MOMENTS:
        for part, (rows, columns) in shapes.items():
            if name == "last" and part == "E":
                rows = sampled_count(matrix, state)
            if rows and columns:
                state[f"{name}_{part}"] = placed(zero.expand(rows, columns), matrix, part)
    return state


def relaid(matrix: Matrix, state: dict[str, Any]) -> dict[str, Any]:
    """Returns a matrix' state with its moments as they are kept for this matrix: in one tensor, or in one for each part."""
    if is_sharded(matrix.weight):
        state = dict(state)
        for name in MOMENTS:
            if name in state:
                parts = reference.eigen_split(state.pop(name), part_shapes(matrix, state))
                state |= {f"{name}_{part}": value for part, value in parts.items() if value.numel()}
            keys = {f"{name}_{part}": part for part in "CRTE"}
            state |= {key: placed(state[key], matrix, part) for key, part in keys.items() if key in state}
    elif MOMENTS[0] not in state:
        state = dict(state)
        for name in MOMENTS:
            every = [state.pop(f"{name}_{part}") for part in "CRTE" if f"{name}_{part}" in state]
            state[name] = torch.cat([(each.full_tensor() if is_sharded(each) else each).flatten() for each in every])
    return state


def local_moments(matrix: Matrix, state: dict[str, Any], name: str) -> dict[str, Tensor]:
    """Returns the parts of a moment, to be written to; of R and E the rows that this rank has."""
    shapes = part_shapes(matrix, state)
    if name in state:
        return reference.eigen_split(state[name], shapes)
    rows, empty = matrix.local_shape[0], state["mean"]
    return {
        part: local_rows(state[f"{name}_{part}"])
        if f"{name}_{part}" in state
        else empty.new_zeros(rows if part in "RE" else shape[0], shape[1])
        for part, shape in shapes.items()
    }


def local_share_in_bases(matrix: Matrix, state: dict[str, Any]) -> Tensor | None:
    """Returns the share of a gradient's mean square that is not in E, by this rank's rows; None: it has none."""
    rows, squares = matrix.local_shape[0], local_moments(matrix, state, "exp_avg_sq")
    if not rows:
        return None
    sums = {
        part: value.double().sum() * (whole_shape(matrix)[0] / rows if part in "RE" else 1.0) for part, value in squares.items()
    }
    whole = torch.stack([*sums.values()]).sum()
    return torch.where(whole > 0, 1 - sums.get("E", torch.zeros_like(whole)) / whole, 0.0)


def part_shapes(matrix: Matrix, state: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Returns the shapes of the whole parts of a moment."""
    return reference.eigen_shapes(*whole_shape(matrix), len(state["basis_out"]), len(state["basis_in"]), matrix.bias is not None)


def sampled_count(matrix: Matrix, state: dict[str, Any]) -> int:
    """Returns how many rows of E there are in `last`: for a vector, whose elements are rows, all."""
    n, p = whole_shape(matrix)
    return n if matrix.weight.dim() < 2 else sampled_rows(n, p, len(state["basis_out"]))


def placed(whole: Tensor, matrix: Matrix, part: str) -> Tensor:
    """Returns a part of a moment as it is kept: as a DTensor, placed as the weight is, if it has a row for each of its rows."""
    if part in "CT" or len(whole) != whole_shape(matrix)[0] or is_sharded(whole):
        return whole if is_sharded(whole) else whole.clone(memory_format=torch.contiguous_format)
    from torch.distributed.tensor import DTensor

    weight: Any = matrix.weight
    own = whole[first_row(matrix) :][: matrix.local_shape[0]].clone(memory_format=torch.contiguous_format)
    mesh, placements = weight.device_mesh, weight.placements
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=whole.shape, stride=(whole.shape[1], 1))
