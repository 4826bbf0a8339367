"""What EigenAdam's step reads in its param_groups: learning rates and weight decays, checked and dealt out to the matrices."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from secondorder.optim._matrices import Matrix
from secondorder.optim._numbers import Numbers, check_arguments, check_numbers, warn_of_short_steps

_NUMBERS: Numbers = {
    "lr": (lambda v: 0 <= v < float("inf"), ">= 0"),
    "weight_decay": (lambda v: 0 <= v < float("inf"), ">= 0"),
    "eps": (lambda v: 0 <= v < float("inf"), ">= 0"),
}
SLOW = 100  # steps after which the optimizer warns of an lr that has always been as small as another optimizer's

Group = dict[str, Any]
OnDevice = Callable[[Any], bool]  # whether the operators read this learning rate on the device, rather than be told its value


def check_group(owner: str, group: Group) -> None:
    """Raises TypeError or ValueError where a group's numbers are not what they must be."""
    check_numbers(owner, group, _NUMBERS)
    betas = group["betas"]
    valid = isinstance(betas, tuple | list) and len(betas) == 2 and 0 <= betas[0] < 1 and 0 < betas[1] < 1
    check_arguments(owner, [("betas", betas, valid, "to be two numbers, in [0, 1) and (0, 1)")])


class Rates:
    """Reads the groups' numbers at every step, and warns once of learning rates that are another optimizer's.

    Args:
        owner: the optimizer's name, for messages.
    """

    def __init__(self, owner: str):
        self._owner = owner
        self._highest = 0.0  # the highest learning rate of all steps
        self._told = False  # whether a group has had a scheduler's "max_lr", which was looked at

    def read(self, groups: Sequence[Group], on_device: OnDevice) -> list[tuple[float, float]]:
        """Returns every group's learning rate (1 if the operators read it) and weight decay, once all numbers are valid."""
        first, found = groups[0], []
        for group in groups:
            told = {**group, "lr": 1.0} if on_device(group["lr"]) else group
            check_group(f"{self._owner}.step()", told)
            found.append((float(told["lr"]), float(group["weight_decay"])))
            if "max_lr" in group and not self._told:  # OneCycleLR's
                self._told = True
                warn_of_short_steps(self._owner, group["max_lr"], "max_lr")
            self._highest = max(self._highest, found[-1][0])
            if group is first:
                continue
            for name in ("betas", "eps"):
                if tuple(group["betas"]) != tuple(first["betas"]) or group["eps"] != first["eps"]:
                    raise ValueError(
                        f"{self._owner}.step(): expected {name} to be the same in all param_groups, got "
                        f"{first[name]!r} and {group[name]!r}"
                    )
        return found

    def warn_if_slow(self, at_construction: Any) -> None:
        """Warns if all learning rates so far were another optimizer's, unless the one at construction was warned of."""
        if not (self._told or at_construction <= 0.01):
            warn_of_short_steps(self._owner, self._highest)


def rates_on_device(
    groups: Sequence[Group], on_device: OnDevice, places: Iterable[tuple[int, int]], control: Tensor
) -> Tensor | None:
    """Returns the learning rates that the operators read, 1 for the others, [matrices, 2]; None if they read none.

    Args:
        groups: the param_groups.
        on_device: tells whether the operators read a learning rate on the device.
        places: of each matrix, the positions of the groups of its weight and of its bias.
        control: whose dtype and device the rates get.
    """
    known = [on_device(group["lr"]) for group in groups]
    if not any(known):
        return None
    one = control.new_ones(())
    own = [group["lr"].to(control).reshape(()) if on else one for group, on in zip(groups, known, strict=True)]
    return torch.stack([own[place] for both in places for place in both]).view(-1, 2)


def rates_and_decays(
    present: list[Matrix],
    states: list[dict[str, Any]],
    shares: dict[Matrix, float],
    numbers: list[tuple[float, float]],
    places: dict[Matrix, tuple[int, int]],
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Returns what multiplies the step length of every weight and of every bias, and the weight decay of both.

    A table of which a step looks up a share of the rows moves further by that share. What has no gradient is given one of zeros,
    so that it does not move; it does not decay either.

    Args:
        present: the matrices with a gradient.
        states: their states.
        shares: of the tables that were counted for this step, the share of rows; other tables have theirs in the state.
        numbers: every group's learning rate and weight decay.
        places: of each matrix, the positions of the groups of its weight and of its bias.
    """
    rates, bias_rates, decays, bias_decays = [], [], [], []
    for matrix, state in zip(present, states, strict=True):
        share, (place, bias_place) = shares.get(matrix, state.get("share", 1.0)), places[matrix]
        rate, decay = numbers[place]
        bias_rate, bias_decay = numbers[bias_place]
        rates.append(rate / share)
        bias_rates.append(bias_rate)
        decays.append(decay * share if decay and matrix.weight.grad is not None else 0.0)
        bias_decays.append(bias_decay if bias_decay and matrix.bias is not None and matrix.bias.grad is not None else 0.0)
    return rates, bias_rates, decays, bias_decays
