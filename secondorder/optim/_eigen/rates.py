"""What EigenAdam's step reads in its param_groups: learning rates and weight decays, checked and dealt out to the matrices."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder.optim._eigen.matrices import Matrix
from secondorder.optim._eigen.tables import times_as_far
from secondorder.optim._numbers import Numbers, as_number, check_arguments, check_numbers, warn_of_short_steps

_NUMBERS: Numbers = {
    "lr": (lambda v: 0 <= v < float("inf"), ">= 0"),
    "weight_decay": (lambda v: 0 <= v < float("inf"), ">= 0"),
    "eps": (lambda v: 0 <= v < float("inf"), ">= 0"),
}
SLOW = 100  # steps after which the optimizer warns of an lr that has always been as small as another optimizer's

Group = dict[str, Any]
OnDevice = Callable[[Any], bool]  # whether the operators read this learning rate on the device, rather than be told its value


class GroupRates(NamedTuple):
    """The learning rate of a group, and its weight decay."""

    lr: float  # 1 where there is one on the device
    weight_decay: float
    on_device: Tensor | None  # the learning rate, where the operators read it; else None


class MatrixRates(NamedTuple):
    """What multiplies the step length of every matrix' weight and bias, and the weight decays of both."""

    weights: list[float]
    biases: list[float]
    weight_decays: list[float]
    bias_decays: list[float]
    on_device: Tensor | None  # further factors of the step lengths, which the operators read [matrices, 2]; None: there are none


def check_group(owner: str, group: Group) -> None:
    """Raises TypeError or ValueError where a group's numbers are not what they must be."""
    check_numbers(owner, group, _NUMBERS)
    betas = group["betas"]
    given = betas if isinstance(betas, tuple | list) else ()
    decays = [number for beta in given if (number := as_number(beta)) is not None]
    valid = len(given) == len(decays) == 2 and 0 <= decays[0] < 1 and 0 < decays[1] < 1
    check_arguments(owner, [("betas", betas, valid, "to be two numbers, in [0, 1) and (0, 1)")])


class RateReader:
    """Reads the groups' numbers at every step, and warns once of learning rates that are another optimizer's.

    Args:
        owner: the optimizer's name, for messages.
    """

    def __init__(self, owner: str):
        self._owner = owner
        self._highest = 0.0  # the highest learning rate of all steps
        self._has_max_lr = False  # whether a group has had a scheduler's "max_lr", which was looked at

    def read(self, groups: Sequence[Group], on_device: OnDevice) -> list[GroupRates]:
        """Returns every group's learning rate and weight decay, once all numbers are valid."""
        first, found = groups[0], []
        for group in groups:
            read_later = group["lr"] if on_device(group["lr"]) else None
            on_host = group if read_later is None else {**group, "lr": 1.0}
            check_group(f"{self._owner}.step()", on_host)
            found.append(GroupRates(float(on_host["lr"]), float(group["weight_decay"]), read_later))
            if "max_lr" in group and not self._has_max_lr:  # OneCycleLR's
                self._has_max_lr = True
                warn_of_short_steps(self._owner, group["max_lr"], "max_lr")
            self._highest = max(self._highest, found[-1].lr)
            if group is first:
                continue
            for name, same in (("betas", tuple(group["betas"]) == tuple(first["betas"])), ("eps", group["eps"] == first["eps"])):
                if not same:
                    raise ValueError(
                        f"{self._owner}.step(): expected {name} to be the same in all param_groups, got "
                        f"{first[name]!r} and {group[name]!r}"
                    )
        return found

    def warn_if_slow(self, at_construction: Any) -> None:
        """Warns if all learning rates so far were another optimizer's, unless the one at construction was warned of."""
        if not (self._has_max_lr or at_construction <= 0.01):
            warn_of_short_steps(self._owner, self._highest)


def rates_of_matrices(
    matrices: list[Matrix],
    states: list[dict[str, Any]],
    row_shares: dict[Matrix, float],
    rates: list[GroupRates],
    groups_of: dict[Matrix, tuple[int, int]],
    control: Tensor,
) -> MatrixRates:
    """Returns the rates and weight decays of every matrix.

    A table of which a step meets a share s of the rows moves `times_as_far(s)` times as far. What has no gradient is given one
    of zeros, so that it does not move; it does not decay either.

    Args:
        matrices: the matrices with a gradient.
        states: their states.
        row_shares: of the tables that were counted for this step, the share of rows; other tables have theirs in the state.
        rates: every group's.
        groups_of: of each matrix, the positions of the groups of its weight and of its bias.
        control: rates on the device get its dtype and device.
    """
    on_device: Tensor | None = None
    if any(rate.on_device is not None for rate in rates):
        one = control.new_ones(())
        factors = [one if rate.on_device is None else rate.on_device.to(control).reshape(()) for rate in rates]
        on_device = torch.stack([factors[group] for matrix in matrices for group in groups_of[matrix]]).view(-1, 2)
    found = MatrixRates([], [], [], [], on_device)
    for matrix, state in zip(matrices, states, strict=True):
        row_share = row_shares.get(matrix, state.get("share"))  # None: it is no table
        further = 1.0 if row_share is None else times_as_far(row_share)
        own, of_bias = (rates[group] for group in groups_of[matrix])
        bias = matrix.bias
        found.weights.append(own.lr * further)
        found.biases.append(of_bias.lr)
        found.weight_decays.append(own.weight_decay / further if matrix.weight.grad is not None else 0.0)
        found.bias_decays.append(of_bias.weight_decay if bias is not None and bias.grad is not None else 0.0)
    return found
