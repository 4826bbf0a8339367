"""EigenAdam's operators: sketches of inputs, renewals of bases, and the step of a whole net with its step length."""

import math
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from secondorder.reference.eigen_rows import (
    eigen_renew_rows_,
    eigen_shapes,
    eigen_split,
    eigen_step_rows_,
    to_float64,
)

# The entries of `control`: see `secondorder.ops.CONTROL`.
LENGTH, OSCILLATIONS, SLOPE, LAST_SLOPE, STEPS, REFUSED, UNRENEWED, _FIRST_SLOPE = range(8)

# The rule of the step length l = L (1 + K / 25)^(-1/2) min(1, (t + 2) / 14).
BEGINNING = 14  # steps over which l rises
FIRST_LENGTH = 0.01  # what L is at first, and at most in the beginning
MOST_OSCILLATIONS = 25  # K from which on L rises no more
SHORTEST, LONGEST = 1e-6, 0.1  # L is between these
GROWS, SHRINKS = 0.1, -0.6  # r above which L rises, and below which it falls,
CHANGE = 0.05  # by exp(0.05 d), where d is how far r is beyond, at most 1
SHORTENED = 0.7  # times as long is L where the first steps are too long
AVERAGED = 0.2  # the weight of a new slope in the averages


def eigen_sketch_(
    sketch: Tensor, inputs: Tensor, basis: Tensor, shift: Tensor, control: Tensor | None = None, renew_every: int = 0
) -> None:
    """Adds V^T sum x x^T and sum x over the rows x of the shifted inputs."""
    if _idle(control, renew_every):
        return
    x = inputs - shift if shift.numel() else inputs
    sketch += torch.cat([(x @ basis.T).T @ x, x.sum(0, keepdim=True)])


def eigen_renew_(
    mean: Sequence[Tensor],
    basis_out: Sequence[Tensor],
    basis_in: Sequence[Tensor],
    scale_out: Sequence[Tensor],
    scale_in: Sequence[Tensor],
    first: Sequence[Tensor],
    control: Tensor,
    grad_weight: Sequence[Tensor],
    grad_bias: Sequence[Tensor],
    sketch: Sequence[Tensor],
    bias_hessian: Sequence[Tensor],
    rows: Sequence[int],
    share: Sequence[float],
    renew_every: int = 0,
    since: int = 0,
    decay: float = 0.0,
) -> None:
    """Renews the bases of every matrix by one power iteration on the averaged second moments of both sides."""
    if _idle(control, renew_every):
        return
    if not _squares_are_finite([*grad_weight, *grad_bias, *sketch, *bias_hessian], control):
        control[UNRENEWED] = 1
        return
    for i, w in enumerate(share):
        if renew_every:  # 1 / w = 1 + decay + decay^2 + ... has a term more for each renewal since then
            for _ in range(renewals_before(since, renew_every), renewals_before(int(control[STEPS]), renew_every)):
                w = 1 / (1 + decay / w)
        (n, p), ku, kv = grad_weight[i].shape, len(basis_out[i]), len(basis_in[i])
        moments = eigen_split(first[i], eigen_shapes(n, p, ku, kv, grad_bias[i].numel() > 0))
        _in_one_process(
            eigen_renew_rows_(
                mean[i], basis_out[i], basis_in[i], scale_out[i], scale_in[i], moments, grad_weight[i], grad_bias[i], sketch[i],
                bias_hessian[i], rows[i], w, 0,
            )
        )  # fmt: skip


def eigen_step_(
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    last: Sequence[Tensor],
    size: Sequence[Tensor],
    control: Tensor,
    grad_weight: Sequence[Tensor],
    grad_bias: Sequence[Tensor],
    mean: Sequence[Tensor],
    basis_out: Sequence[Tensor],
    basis_in: Sequence[Tensor],
    lr: Sequence[float],
    lr_bias: Sequence[float],
    decay: Sequence[float],
    decay_bias: Sequence[float],
    step: Sequence[int],
    beta1: float,
    beta2: float,
    eps: float,
    renewed: bool,
    renew_every: int = 0,
    since: int = 0,
    rate: Tensor | None = None,
) -> None:
    """Applies Adam's rule to every part of every gradient, and adapts the step length by the slopes."""
    rates = (torch.ones(len(weight), 2, device="cpu") if rate is None else rate).tolist()
    valid = all(0 <= number < math.inf for pair in rates for number in pair)
    if control[UNRENEWED] or not valid or not _squares_are_finite([*grad_weight, *grad_bias], control):
        control[REFUSED] += 1
        control[UNRENEWED] = 0
        return
    length, slopes = eigen_length(control.tolist()), control.new_zeros(2)
    more = int(control[STEPS]) - since if renew_every else 0
    for i, t in enumerate(step):
        (n, p), ku, kv = grad_weight[i].shape, len(basis_out[i]), len(basis_in[i])
        shapes = eigen_shapes(n, p, ku, kv, grad_bias[i].numel() > 0)
        one, two, before = (eigen_split(flat[i], shapes) for flat in (first, second, last))
        slopes += _in_one_process(
            eigen_step_rows_(
                weight[i], bias[i], one, two, before, size[i], grad_weight[i], grad_bias[i], mean[i], basis_out[i], basis_in[i],
                length, lr[i] * rates[i][0], lr_bias[i] * rates[i][1], decay[i], decay_bias[i], t + more, beta1, beta2, eps, 0,
                len(before.get("E", ())),
            )
        )  # fmt: skip
    slope, last_slope = slopes.tolist()
    eigen_control_(control, slope, last_slope, renewed and not _idle(control, renew_every))


def renewals_before(step: int, renew_every: int) -> int:
    """Returns how many of the steps 0, 1, ... before this one renew bases: those that `renew_every` divides."""
    return -(-step // renew_every)


def _idle(control: Tensor | None, renew_every: int) -> bool:
    """Tells whether `renew_every` > 0 says that the step after those of `control` renews no bases."""
    return control is not None and renew_every > 0 and int(control[STEPS]) % renew_every != 0


def eigen_length(entries: Sequence[float]) -> float:
    """Returns the step length that the entries of `control` give, without lr."""
    falling = (1 + entries[OSCILLATIONS] / MOST_OSCILLATIONS) ** 0.5
    return entries[LENGTH] / falling * min(1.0, (entries[STEPS] + 2) / BEGINNING)


def eigen_control_(control: Tensor, slope: float, last_slope: float, renewed: bool) -> None:
    """Updates `control` after a step with these slopes: its step length, averages and counts."""
    length, oscillations, average, last_average, t, refused, unrenewed, first = control.tolist()
    if t == 0:
        average = first = slope
    else:
        average += AVERAGED * (slope - average)
        if not renewed:
            last_average += AVERAGED * (last_slope - last_average)
            oscillations += last_slope < 0
            if t <= BEGINNING and first > 0:
                if last_slope > GROWS * average:
                    length = min(length / SHORTENED, FIRST_LENGTH)
                    first *= length < FIRST_LENGTH
                elif last_average < 0 or average > first:
                    length *= SHORTENED
    if t > BEGINNING and average != 0:
        r = last_average / abs(average)
        if r > GROWS and oscillations < MOST_OSCILLATIONS:
            length *= math.exp(CHANGE * min(1.0, r - GROWS))
        elif r < SHRINKS:
            length *= math.exp(CHANGE * max(-1.0, r - SHRINKS))
        length = min(max(length, SHORTEST), LONGEST)
    entries = [length, oscillations, average, last_average, t + 1, refused, unrenewed, first]
    control.copy_(torch.tensor(entries, dtype=control.dtype, device="cpu"))


def _in_one_process(rows: Generator[list[Tensor], list[Tensor], Any]) -> Any:
    """Runs a generator of `eigen_rows` where one process has all rows: the sums are what it yields. Returns its result."""
    sums = next(rows)
    while True:
        try:
            sums = rows.send(sums)
        except StopIteration as end:
            return end.value


def _squares_are_finite(tensors: Sequence[Tensor], control: Tensor) -> bool:
    """Tells whether the sum of squares of every tensor is finite, with some room, in the tensor's own dtype."""
    return all(to_float64(t, control).square().sum() < torch.finfo(t.dtype).max / 4 for t in tensors)
