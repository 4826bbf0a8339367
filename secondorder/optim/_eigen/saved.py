"""EigenAdam's states as they are saved, in particular those of weights that may turn out to be no maps.

torch.distributed.checkpoint reads into the tensors of a new optimizer, which has seen no gradient yet. So the saved state of such
a weight has room for both: the bases and moments of a map, and the moments of numbers that each stand for themselves. It says
which of the two the weight is; what the other one would have is zero.
"""

from typing import Any

import torch
from torch import Tensor

from secondorder._tensors import is_sharded
from secondorder.ops import CONTROL
from secondorder.optim._eigen.matrices import Matrix
from secondorder.optim._eigen.sharded_state import part_shapes, placed, relaid
from secondorder.optim._eigen.state import MOMENTS, SHARED, basis_sizes, check_state, has_no_bases, moment_lengths, sampled_rows


def with_room(matrix: Matrix, state: dict[str, Any], rank: int) -> dict[str, Any]:
    """Returns a matrix' state as it is saved; `rank`: how many directions its bases would have if it were a map."""
    if not matrix.decided_by_gradient or "basis_out" not in state:
        return state
    (n, p), mean = matrix.shape, state["mean"]
    ku, kv = (len(state["basis_out"]), len(state["basis_in"])) if matrix.has_bases else basis_sizes(matrix, rank)
    saved = {**state, "map": matrix.has_bases, "share": state.get("share", 1.0)}
    if not matrix.has_bases:
        saved |= {"basis_out": mean.new_zeros(ku, n), "basis_in": mean.new_zeros(kv, p)}
        saved |= {"scale_out": mean.new_zeros(ku), "scale_in": mean.new_zeros(kv)}
    if not is_sharded(matrix.weight):
        rooms = [moment_lengths(n, p, *bases, False) for bases in ((ku, kv), (0, 0))]
        return saved | {name: _longer(state[name], max(room[name] for room in rooms)) for name in MOMENTS}
    sampled = max(_sampled(n, p, ku, kv), _sampled(n, p, 0, 0))
    for name in MOMENTS:
        for part, (rows, columns) in {**part_shapes(matrix, saved), "E": (n, p)}.items():
            if rows and columns:
                key, length = f"{name}_{part}", sampled if (name, part) == ("last", "E") else rows
                value = state.get(key, mean.new_zeros(()).expand(0, columns))
                saved[key] = placed(_longer(value, length), matrix, part) if len(value) < length else value
    return saved


def without_room(matrix: Matrix, state: dict[str, Any]) -> dict[str, Any]:
    """Returns a matrix' state as it is kept, from one that may have been saved by `with_room`."""
    if not {"map", "share", "basis_out", "basis_in", "scale_out", "scale_in"} <= state.keys():
        return state
    state = dict(state)
    n, p = state["basis_out"].shape[-1], state["basis_in"].shape[-1]
    if not state.pop("map"):
        state |= {key: state[key][:0] for key in ("basis_out", "basis_in", "scale_out", "scale_in")}
    if state["share"] == 1:
        del state["share"]
    ku, kv = len(state["basis_out"]), len(state["basis_in"])
    if MOMENTS[0] in state:
        return state | {name: state[name][:length] for name, length in moment_lengths(n, p, ku, kv, False).items()}
    shapes = part_shapes(matrix, state)
    for part in (part for part in "CRTE" if not all(shapes.get(part, (0, 0)))):
        for name in MOMENTS:
            state.pop(f"{name}_{part}", None)
    last, length = state.get("last_E"), _sampled(n, p, ku, kv)
    if last is not None and len(last) > length:
        state["last_E"] = (last.full_tensor() if is_sharded(last) else last)[:length]
    return state


def as_kept(owner: str, matrix: Matrix | None, state: dict[str, Any]) -> dict[str, Any]:
    """Returns the saved state of a parameter as it is kept, once it is known to be one; sets the matrix' `has_bases` by it.

    Args:
        owner: who loads it, for the error.
        matrix: whose weight the parameter is; None: it is a bias.
        state: the saved state.

    Raises:
        ValueError: it is the state of another optimizer, of another parameter, or of another version of the package.
    """
    entries = len(state.get("control", CONTROL))
    if entries != len(CONTROL):
        raise ValueError(
            f"{owner}: expected a control of {len(CONTROL)} entries, got {entries}, of another version of the package"
        )
    # A bias has no more; what else stands there is a wrapper's own, such as Lookahead's.
    if state.keys() <= {*SHARED, "step"} or (matrix is None and "step" in state and not {"basis_out", "exp_avg"} & state.keys()):
        return state
    if matrix is not None:
        state = without_room(matrix, state)
    if matrix is not None and matrix.decided_by_gradient and "basis_in" in state:
        matrix.has_bases = not has_no_bases(state)  # as its first gradient has shown
    check_state(owner, matrix, state)
    assert matrix is not None
    return relaid(matrix, state)


def _sampled(n: int, p: int, ku: int, kv: int) -> int:
    """Returns how many rows of E there are in `last`."""
    return sampled_rows(n, p, ku) if ku < n and kv < p else 0


def _longer(t: Tensor, length: int) -> Tensor:
    """Returns a tensor with zeros at the end of its first dimension, which then has this length."""
    return t if len(t) == length else torch.cat([t, t.new_zeros(length - len(t), *t.shape[1:])])
