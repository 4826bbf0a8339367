"""How K-BFGS takes a step: it moves the parameters, and calls the closure again to see what that has done."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from secondorder._distributed import RankReducer, RankTerm
from secondorder._random import RandomState
from secondorder._tape import ForwardState
from secondorder._tensors import host_numbers, to_compute_dtype
from secondorder.optim._closure_pass import ClosurePass, kept_gradients
from secondorder.optim._kbfgs_layer import Pair, move, products

_HALVINGS = 10  # of a step before it is given up


class Step(NamedTuple):
    """Tells what a step has come to.

    Args:
        halvings: how often it was halved.
        pairs: (s, y) of the layers that have one; None: the step was given up.
        gradients: after the step, w.r.t. [W | b], of the loss or its negative, whichever is minimised; those that are finite.
        unlike: the layers that have no pair, since the closure calls them on other numbers of rows after the step.
    """

    halvings: int
    pairs: dict[nn.Linear, Pair] | None
    gradients: dict[nn.Linear, Tensor]
    unlike: set[nn.Linear]


class Trials:
    """Takes a step, halved until the loss after it is acceptable.

    The closure is called at the moved parameters, on the same mini-batch, from the same random state. Buffers and parameters'
    gradients stay as its first call has left them.

    Args:
        owner: the optimizer's name, for errors.
        closure: has been called once.
        first: what that call has left behind.
        random: the random state that it began from.
        model: any module.
        parameters: of the optimizer.
        gradients: whether the closure computes the gradients of parameters, too.
        ddp: the model's DistributedDataParallel, if any.
        ranks: whose mean the loss is; None: this process is alone.
    """

    def __init__(
        self, owner: str, closure: Callable[[], Tensor], first: ClosurePass, random: RandomState, model: nn.Module,
        parameters: Iterable[Tensor], gradients: bool, ddp: DistributedDataParallel | None, ranks: RankReducer | None,
    ):  # fmt: skip
        self._owner, self._closure, self._first, self._random = owner, closure, first, random
        self._all_parameters = list(dict.fromkeys([*model.parameters(), *parameters]))
        self._gradients, self._ddp, self._ranks = gradients, ddp, ranks
        self._state = ForwardState(nn.ModuleList([model, *([] if first.criterion is None else [first.criterion])]))

    @contextmanager
    def taken(
        self, moved: dict[nn.Linear, list[Tensor]], directions: list[Tensor], groups: dict[Tensor, dict[str, Any]], limit: float
    ) -> Iterator[Step]:
        """Takes the step, or a half of it, a quarter, and so on; takes it back if none will do, or if an error is raised within.

        Args:
            moved: the parameters of every layer.
            directions: the layers' [W | b] move against them, times their learning rates.
            groups: the param_group of every parameter.
            limit: the loss after the step is at most this, or the step is halved.
        """
        before = {layer: [p.clone() for p in each] for layer, each in moved.items()}
        step: Step | None = None
        try:
            step = self._found(moved, before, directions, groups, limit)
            yield step or Step(_HALVINGS, None, {}, set())
        except BaseException:
            step = None
            raise
        finally:
            if step is None:
                for layer, each in moved.items():
                    for p, value in zip(each, before[layer], strict=True):
                        p.copy_(value)

    def _found(
        self, moved: dict[nn.Linear, list[Tensor]], before: dict[nn.Linear, list[Tensor]], directions: list[Tensor],
        groups: dict[Tensor, dict[str, Any]], limit: float,
    ) -> Step | None:  # fmt: skip
        """Moves the parameters until the loss is acceptable; None: it never is."""
        after = RandomState.now()
        try:
            with kept_gradients(self._all_parameters, self._ddp) as lend:
                for halvings in range(_HALVINGS + 1):
                    for (layer, each), direction in zip(moved.items(), directions, strict=True):
                        move(each, before[layer], direction, [groups[p] for p in each], 0.5**halvings)
                    step = self._tried(moved, halvings, lend, limit)
                    if step is not None:
                        return step
        finally:
            after.restore()
        return None

    def _tried(self, moved: dict[nn.Linear, list[Tensor]], halvings: int, lend: Callable[[], None], limit: float) -> Step | None:
        """Returns what the step has come to at the moved parameters; None: the loss is above the limit, or not all is finite."""
        self._random.restore()
        for p in self._all_parameters if self._gradients else ():  # of a trial before; the closure need not clear them
            p.grad = None
        trial = self._first.again(self._gradients, lend)
        value, same = self._evaluated(trial)
        unlike = trial.unlike(self._first)  # the means of other rows differ by more than the step
        pairs = {
            layer: (
                trial.mean_preactivation(layer) - self._first.mean_preactivation(layer),
                trial.gradient[layer] - self._first.gradient[layer],
            )
            for layer in moved
            if layer in trial.gradient and trial.instances(layer) and layer not in unlike  # else the model left it out
        }
        # The loss may be finite though a weight is not, where the unit is saturated: so the weights are checked.
        sizes = torch._foreach_norm([p for each in moved.values() for p in each if p.numel()], math.inf)
        usable = [torch.isfinite(s + y).all() for s, y in pairs.values()]
        wanted = [number for s, y in pairs.values() for number in products(s, y)]
        loss, same_here, *rest = host_numbers([value, same, *sizes, *usable, *wanted])
        trial.check_same_data(bool(same_here), self._owner)
        if not (math.isfinite(loss) and loss <= limit and all(map(math.isfinite, rest[: len(sizes)]))):
            return None
        good, numbers = rest[len(sizes) :][: len(pairs)], rest[len(sizes) + len(pairs) :]
        usable_pairs = {layer: (*pair, numbers[3 * k : 3 * k + 3]) for k, (layer, pair) in enumerate(pairs.items()) if good[k]}
        return Step(halvings, usable_pairs, self._finite_gradients(moved) if self._gradients else {}, unlike)

    def _evaluated(self, trial: ClosurePass) -> tuple[Tensor | float, Tensor | bool]:
        """Calls the closure; returns the loss over all ranks, and whether its data is that of the first call."""

        def run() -> tuple[Tensor, Tensor | bool]:
            with trial, self._state.buffers_kept():
                value = trial.sign * trial.run(self._closure, self._owner)
            return value, trial.same_data(self._first, self._owner)

        def checked() -> float:
            value, same = host_numbers(run())
            trial.check_same_data(bool(same), self._owner)
            return value

        return run() if self._ranks is None else (trial.average(self._ranks, self._ranks.all(checked), first=self._first), True)

    def _finite_gradients(self, moved: dict[nn.Linear, list[Tensor]]) -> dict[nn.Linear, Tensor]:
        """Returns the gradients of [W | b] that the closure has left, where they are finite."""
        left = {layer: [p.grad for p in each if p.grad is not None] for layer, each in moved.items()}
        gradients = {
            layer: torch.cat([self._first.sign * to_compute_dtype(g).view(layer.out_features, -1) for g in left[layer]], 1)
            for layer, each in moved.items()
            if len(left[layer]) == len(each)
        }
        if self._ranks is not None:
            names = self._first.layers
            averages = self._ranks.average(lambda: [RankTerm(names[layer], g) for layer, g in gradients.items()])
            gradients = dict(zip(gradients, averages, strict=True))
        finite = host_numbers([g.isfinite().all() for g in gradients.values()])
        return {layer: g for (layer, g), good in zip(gradients.items(), finite, strict=True) if good}
