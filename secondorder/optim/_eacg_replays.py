"""What EACG's captured steps, which replays of a CUDA graph make, share with those that Python makes.

A replay launches the captured kernels again, at the same addresses and with the same numbers. So the counts are on the device,
and the state stays where it is. Python counts no replay, and catches up when it reads its counts again.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

Group = Mapping[str, Any]
States = Mapping[Tensor, dict[str, Any]]

_COUNTS = ("step", "factor_updates")  # of a weight's state


class EACGReplays:
    """What captured steps and those that Python makes have in common: the counts, and the places of the state.

    Args:
        weights: of the layers that have counts.
    """

    def __init__(self, weights: Iterable[Tensor]):
        self._rows = {weight: row for row, weight in enumerate(dict.fromkeys(weights))}  # layers may share one
        self._counts: Tensor | None = None  # [layers + 1, 2] in float64: `_COUNTS` of each layer; last the refused steps
        self._places: dict[Tensor, dict[str, Any]] = {}  # by parameter: the tensors that captured steps read and write

    def __bool__(self) -> bool:
        """Tells whether a step was captured, so that the device may have made more steps than Python knows of."""
        return bool(self._places)

    @property
    def ready(self) -> bool:
        """Tells whether the device has the counts."""
        return self._counts is not None

    def add(self, states: States) -> None:
        """Notes that a step was captured, and where the state is."""
        for p, state in states.items():
            self._places[p] = _tensors(state)

    def keep(self, states: States) -> None:
        """Gives the device the counts and numbers that a step by Python has left, so that replays go on from there."""
        counts = [[float(states.get(weight, {}).get(name, 0)) for name in _COUNTS] for weight in self._rows]
        if self._counts is None:
            device = next(iter(self._rows)).device
            self._counts = torch.zeros(len(counts) + 1, len(_COUNTS), dtype=torch.float64, device=device)
        self._counts[:-1].copy_(torch.tensor(counts, dtype=torch.float64, device="cpu"))
        for p, places in self._places.items():
            _put(states[p], places)

    def catch_up(self, states: States) -> int:
        """Brings Python's counts to those of the device, for which it waits; returns how many steps were refused since."""
        if self._counts is None or not self:
            return 0
        counts = self._counts.tolist()
        self._counts[-1].zero_()
        for weight, row in self._rows.items():
            if "step" in states.get(weight, {}):
                states[weight].update(zip(_COUNTS, map(int, counts[row]), strict=True))
        return int(counts[-1][0])

    # --- within a captured step ----------------------------------------------------------------------------------------------

    def true(self) -> Tensor:
        """Returns True [], on the device."""
        assert self._counts is not None
        return torch.ones((), dtype=torch.bool, device=self._counts.device)

    def factor_shares(self, decay: float, dtype: torch.dtype) -> dict[Tensor, Tensor]:
        """Returns what each layer's new factors weigh in their bias-corrected average (see `FactorSource`), [] by weight."""
        shares = (1 - decay) / (1 - decay ** (self._column(1) + 1))
        return dict(zip(self._rows, shares.to(dtype).unbind(), strict=True))

    def parameter_share(self) -> Tensor:
        """Returns 1 - beta_t of `update_averages` after the steps that were counted."""
        return (1 / self._column(0).max()).clamp(min=0.05)

    def count(self, made: Tensor, stepped: Iterable[Tensor], renewed: Iterable[Tensor]) -> None:
        """Counts a step of these layers, by their weights, and a renewal of these; or that it was refused."""
        assert self._counts is not None
        columns = [self._column(column).unbind() for column in range(len(_COUNTS))]
        counts = [own[self._rows[weight]] for own, weights in zip(columns, (stepped, renewed), strict=True) for weight in weights]
        torch._foreach_add_(counts, [made.double()] * len(counts))
        self._counts.select(0, -1).add_(made.logical_not())

    def _column(self, column: int) -> Tensor:
        """Returns a view of one count of all layers."""
        assert self._counts is not None
        return self._counts.select(1, column).narrow(0, 0, len(self._rows))


def rate(lr: float | Tensor, made: Tensor) -> Tensor:
    """Returns a learning rate on the device, in float64; 0 where the step is refused."""
    number = lr.double().reshape(()) if isinstance(lr, Tensor) else torch.full_like(made, lr, dtype=torch.float64)
    return torch.where(made, number, 0.0)


def move(p: Tensor, v: Tensor, group: Group, rate: Tensor, sign: float = 1.0) -> None:
    """Sets p <- (1 - rate weight_decay) p + sign rate v, as `_momentum.apply`, for a finite v."""
    decay = float(group["weight_decay"]) if group["decoupled_weight_decay"] else 0.0
    shrink, step = 1 - rate * decay, sign * rate * v
    if p.dtype == v.dtype:
        (p if decay == 0 else p.mul_(shrink)).add_(step)
    else:
        p.copy_(p.to(v.dtype) * shrink + step)  # rounded once


def _tensors(state: dict[str, Any]) -> dict[str, Any]:
    """Returns a parameter's state without its numbers."""
    nested = {name: _tensors(value) for name, value in state.items() if isinstance(value, dict)}
    return {name: value for name, value in state.items() if isinstance(value, Tensor)} | nested


def _put(state: dict[str, Any], places: dict[str, Any]) -> None:
    """Copies the tensors of a state to their places, and has the state hold these."""
    for name, place in places.items():
        if isinstance(place, dict):
            _put(state[name], place)
        elif state[name] is not place:
            state[name] = place.copy_(state[name])
