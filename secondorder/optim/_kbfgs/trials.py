"""How K-BFGS takes a step: it moves the parameters, and calls the closure again to see what that has done."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from secondorder._distributed import RankReducer, RankTerm
from secondorder._random import RandomState
from secondorder._tape import ForwardState
from secondorder._tensors import host_numbers, to_compute_dtype
from secondorder.optim._kbfgs.closure_pass import ClosurePass
from secondorder.optim._kbfgs.layer import Pair, move, products

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
        both = {layer: (trial.layers[layer], self._first.layers[layer]) for layer in moved if layer in trial.layers}
        pairs = {
            layer: (after.mean_preactivation - before.mean_preactivation, after.gradient - before.gradient)
            for layer, (after, before) in both.items()
            if after.instances and not after.unlike  # the means of other rows differ by more than the step
        }
        # The loss may be finite though a weight is not, where the unit is saturated: so the weights are checked.
        sizes = torch._foreach_norm([p for each in moved.values() for p in each if p.numel()], math.inf)
        usable = [torch.isfinite(s + y).all() for s, y in pairs.values()]
        wanted = [number for s, y in pairs.values() for number in products(s, y)]
        loss, same_here, *rest = host_numbers([value, same, *sizes, *usable, *wanted])
        _check_same_data(bool(same_here), self._owner)
        if not (math.isfinite(loss) and loss <= limit and all(map(math.isfinite, rest[: len(sizes)]))):
            return None
        good, numbers = rest[len(sizes) :][: len(pairs)], rest[len(sizes) + len(pairs) :]
        usable_pairs = {layer: (*pair, numbers[3 * k : 3 * k + 3]) for k, (layer, pair) in enumerate(pairs.items()) if good[k]}
        unlike = {layer for layer, own in trial.layers.items() if own.unlike}
        return Step(halvings, usable_pairs, self._finite_gradients(moved) if self._gradients else {}, unlike)

    def _evaluated(self, trial: ClosurePass) -> tuple[Tensor | float, Tensor | bool]:
        """Calls the closure; returns the loss over all ranks, and whether its data is that of the first call."""

        def run() -> tuple[Tensor, Tensor | bool]:
            with trial, self._state.buffers_kept():
                value = trial.sign * trial.run(self._closure, self._owner)
            _note_unlike(trial, self._first)
            return value, _same_data(trial, self._first, self._owner)

        def checked() -> float:
            value, same = host_numbers(run())
            _check_same_data(bool(same), self._owner)
            return value

        return run() if self._ranks is None else (trial.average(self._ranks, self._ranks.all(checked)), True)

    def _finite_gradients(self, moved: dict[nn.Linear, list[Tensor]]) -> dict[nn.Linear, Tensor]:
        """Returns the gradients of [W | b] that the closure has left, where they are finite."""
        left = {layer: [p.grad for p in each if p.grad is not None] for layer, each in moved.items()}
        gradients = {
            layer: torch.cat([self._first.sign * to_compute_dtype(g).view(layer.out_features, -1) for g in left[layer]], 1)
            for layer, each in moved.items()
            if len(left[layer]) == len(each)
        }
        if self._ranks is not None:
            names = self._first.names
            averages = self._ranks.average(lambda: [RankTerm(names[layer], g) for layer, g in gradients.items()])
            gradients = dict(zip(gradients, averages, strict=True))
        finite = host_numbers([g.isfinite().all() for g in gradients.values()])
        return {layer: g for (layer, g), good in zip(gradients.items(), finite, strict=True) if good}


def _note_unlike(trial: ClosurePass, first: ClosurePass) -> None:
    """Notes which layers the trial has called on other numbers of rows than the first call of the closure has."""
    for layer, own in trial.layers.items():
        own.unlike = layer in first.layers and own.rows_of_calls != first.layers[layer].rows_of_calls


def _same_data(trial: ClosurePass, first: ClosurePass, name: str) -> Tensor | bool:
    """Tells whether the layer that was called first, on whose input no covered weight acts, has the input that it had then.

    Raises:
        RuntimeError: the layer was called on another number of rows.
    """
    if not first.layers:
        return True
    calls = ((layer, call) for layer, own in first.layers.items() for call in own.calls)
    layer, before = min(calls, key=lambda pair: pair[1].order)
    rows = [sum(each.layers[layer].rows_of_calls) if layer in each.layers else 0 for each in (first, trial)]
    if rows[0] != rows[1]:
        raise RuntimeError(
            f"{name}.step(): expected the closure to evaluate the same mini-batch at every call, but it calls layer "
            f"{trial.names[layer]!r} on {rows[0]} rows, and then on {rows[1]}. Draw the batch outside of the closure. A "
            "solver of differential equations whose steps adapt takes others at other weights, by which no means can be "
            "compared: give it steps of fixed length (method='rk4' in torchdiffeq), or take EigenAdam. No parameter and no "
            "state has changed."
        )
    after = min(trial.layers[layer].calls, key=lambda call: call.order)
    new, old = after.input.mean(0), before.input.mean(0)
    # Equal but for the rounding of whatever comes before that layer.
    return (new - old).norm() <= 1e-3 * old.norm()


def _check_same_data(same: bool, name: str) -> None:
    """Raises RuntimeError where the data is not the same."""
    if not same:
        raise RuntimeError(
            f"{name}.step(): expected the closure to evaluate the same mini-batch at every call, but the first layer's "
            "input has changed. Draw the batch outside of the closure, and freeze what changes with every call, as spectral_norm "
            "does. No parameter and no state has changed."
        )


@contextmanager
def kept_gradients(parameters: Iterable[Tensor], ddp: DistributedDataParallel | None) -> Iterator[Callable[[], None]]:
    """Leaves p.grad as it was before, whatever happens inside, and keeps DistributedDataParallel from averaging gradients.

    Yields:
        A function that gives parameters without a gradient copies of those before: a closure may clip them, say, after a
        backward() that has computed none.
    """
    before = [(p, p.grad) for p in parameters]
    for p, _ in before:
        p.grad = None

    def lend() -> None:
        for p, gradient in before:
            if p.grad is None and gradient is not None:
                p.grad = gradient.clone()

    try:
        with nullcontext() if ddp is None else ddp.no_sync():
            yield lend
    finally:
        for p, gradient in before:
            p.grad = gradient
