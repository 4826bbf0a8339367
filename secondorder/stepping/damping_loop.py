"""The Levenberg-Marquardt loop: a step from the quadratic model, its trial, and the dampings that follow from how it went.

It is that of KFAC and of the optimizers like it; the optimizer `LevenbergMarquardt` has its own, in `gauss_newton_step`. The loop
knows no optimizer: it asks a loss for trial values and quadratic terms, and a function for directions at a damping.
(Botev et al., Appendix B; Martens & Grosse, 2015, sections 6 and 7.)
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from secondorder._tensors import Later, Transfer, compute_dtype
from secondorder.stepping.quadratic_model import QuadraticModel, QuadraticTerms, Step

Prepared = TypeVar("Prepared")

# Dampings are relative to the first loss, which usually is on the curvature's scale: below 100 times the curvature along its
# gradient. Above so many times it is not, since targets far from zero add a constant to the loss.
_LARGEST_LOSS = 1000.0
# Tries that fail raise tau to at most so many times the curvature along the direction.
_LARGEST_DAMPING = 1e4
# A change of the loss by less than so many units of its rounding is no evidence for or against a step.
_ROUNDING = 8

# A direction for every parameter, and what was prepared.
Found = tuple[list[Tensor], Prepared]
# (damping, whether what was prepared at an earlier one may not be used, what the model's numbers come to the host with)
# -> what was found, and what is to be called once they are there: it gives what replaces it, mostly None, or raises.
Directions = Callable[[float, bool, Transfer], tuple[Found[Prepared], Later[Found[Prepared] | None]]]


class TrialLoss(QuadraticTerms, Protocol):
    """The loss of a step's batch as a function of the parameters."""

    here: list[Tensor]  # the parameters' own values

    @property
    def start(self) -> float:
        """Returns the loss there."""

    @property
    def instances(self) -> int:
        """Returns how many instances it is of."""

    def value(self, parameters: list[Tensor]) -> float:
        """Returns the loss at other values; inf where they are not finite."""


@dataclass(frozen=True)
class DampingSchedule:
    """How the dampings begin and change.

    Args:
        tau: the start of C's damping, relative to the first loss, so that a factor on the loss does not matter; > 0. None: the
            more, the fewer instances m a step has, 250 / m^2, but from 1e-4 to 1. Where the first loss is zero, or more than 1000
            times the curvature along its gradient, g^T G g / |g|^2, it is relative to that.
        gamma: the start of the solver's own damping, likewise; None: it is tau throughout.
        floor: tau stays at least this fraction of its start: a step is judged by the very batch it was fitted to, and that alone
            would have tau fall for ever. Where the loss rises from batch to batch nevertheless (`LossTrend`), the floor rises.
            0: the papers' rule, without a floor.
        momentum: whether the previous step is a second direction of the model.
        omega: per step, < 1. tau is multiplied by omega^every where rho > 3/4, and divided by it where rho < 1/4.
        every: tau is adapted every so many steps.
        gamma_every: gamma becomes, every so many steps, the best of {w gamma, gamma, gamma / w} under q, w = omega^gamma_every.
        tries: a step that fails its check is taken back and tried anew with a larger tau, at most so often.
    """

    tau: float | None
    gamma: float | None = None
    floor: float = 0.0
    momentum: bool = False
    omega: float = 0.95
    every: int = 5
    gamma_every: int = 20
    tries: int = 8

    def adapted(self, tau: float, rho: float) -> float:
        """Returns tau after a step of reduction ratio rho (Botev et al., B.3.1)."""
        factor = self.omega**self.every
        return tau * factor if rho > 0.75 else tau / factor if rho < 0.25 else tau

    def start(self, instances: int) -> float:
        """Returns tau's start, relative to the first loss, for a step of so many instances."""
        return min(1.0, max(1e-4, 250 / max(1, instances) ** 2)) if self.tau is None else self.tau


@dataclass(frozen=True)
class LossTrend:
    """Tau's floor, and the losses of new batches before their steps, which no step has been fitted to.

    Where their average over some 3 steps is a fifth above that over some 20, the steps do not generalise: tau and its floor
    become four times what they were, at most 400 times the first floor. Else the floor falls by 1 % a step, to where it began.
    """

    least: float  # the floor of the floor
    floor: float
    short: float  # average of the losses over some 3 steps
    long: float  # and over some 20

    def seen(self, loss: float, tau: float) -> tuple["LossTrend", bool]:
        """Returns the trend with a new batch's loss, at the damping of the moment, and whether the losses rise."""
        short, long = 0.7 * self.short + 0.3 * loss, 0.95 * self.long + 0.05 * loss
        if short > long + 0.2 * abs(long):
            return LossTrend(self.least, min(4 * max(self.floor, tau), 400 * self.least), short, short), True
        return LossTrend(self.least, max(self.least, 0.99 * self.floor), short, long), False


@dataclass(frozen=True)
class Damping:
    """What the loop carries from one step to the next."""

    tau: float
    gamma: float | None  # None: tau throughout
    trend: LossTrend
    rho: float | None = None  # the reduction ratio of the last step; None: it was taken back, or had nothing to follow
    coefficients: tuple[float, float] = (0.0, 0.0)  # of the direction and the step before it in the last step


class LevenbergMarquardtLoop:
    """Finds one step after another; every step's loss is compared with what the quadratic model predicted, on the same batch.

    Args:
        schedule: how the dampings begin and change.
    """

    def __init__(self, schedule: DampingSchedule):
        self.schedule = schedule

    def step(
        self, model: QuadraticModel[TrialLoss], directions: Directions[Prepared], previous: list[Tensor] | None,
        damping: Damping | None, steps: int, lr: float = 1.0,
    ) -> tuple[list[Tensor], Prepared | None, Damping | None]:  # fmt: skip
        """Makes one step: delta = lr (c P + c' previous), c and c' minimising the quadratic model of the regularised loss.

        Where the loss has not fallen at theta + delta, the step is taken back and tried with a larger damping, without the
        previous one. If that does not help either, delta is zero. A change that is predicted to be below the loss' rounding, and
        is, is taken and says nothing of the damping.

        Args:
            model: of the step's batch.
            directions: P, at a damping.
            previous: the delta of the step before, or None.
            damping: what the step before has left; None: this is the first.
            steps: how many came before.
            lr: in [0, 2).

        Returns:
            delta; what was prepared for it, None where no try was accepted; the dampings for the next step, None where there is
            nothing to begin them with: no step before, no loss and no gradient.
        """
        rule, loss = self.schedule, model.loss
        if damping is None and loss.start == 0 and not any(bool(g.any()) for g in model.gradients):
            return [torch.zeros_like(p) for p in loss.here], None, None
        damping, rising = self._entered(model, damping)
        tau, gamma = damping.tau, damping.gamma
        if rising or not rule.momentum:
            previous = None
        proposed = functools.partial(_proposed, model, directions, lr)
        noise = _ROUNDING * torch.finfo(compute_dtype(loss.here[0].dtype)).eps * abs(loss.start)
        delta: list[Tensor] | None = None
        accepted, rho, coefficients = None, None, (0.0, 0.0)
        for attempt in range(rule.tries + 1):
            choose = gamma is not None and attempt == 0 and steps % rule.gamma_every == rule.gamma_every - 1
            step, prepared = proposed(previous, tau, gamma, choose or attempt > 0)
            if choose:
                assert gamma is not None
                factor = rule.omega**rule.gamma_every
                choices = [(step, prepared, gamma)]
                choices += [(*proposed(previous, tau, g, True), g) for g in (gamma * factor, gamma / factor)]
                step, prepared, gamma = min(choices, key=lambda choice: choice[0].predicted)
            if not step.predicted < 0:  # no gradient to follow
                accepted = prepared
                break
            moved = [(p + d).to(p.dtype) for p, d in zip(loss.here, step.delta, strict=True)]
            # By how much the loss misses the model on the subsample estimates by how much it does on the whole batch.
            change = loss.value(moved) - loss.start
            found = float(step.coefficients[0]), 0.0 if previous is None else float(step.coefficients[1])
            if max(abs(change), -step.predicted) <= noise:
                delta, accepted, coefficients = step.delta, prepared, found
                break
            rho = (step.undamped + change - step.modelled) / step.predicted
            if math.isfinite(rho) and rho > 0:
                delta, accepted, coefficients = step.delta, prepared, found
                break
            previous, rho = None, None
            if step.curvature > 0 and 4 * tau > _LARGEST_DAMPING * step.curvature:
                continue
            tau *= 4
            gamma = None if gamma is None else 4 * gamma

        if rho is not None and steps % rule.every == rule.every - 1:
            tau = max(rule.adapted(tau, rho), damping.trend.floor)
        if delta is None:
            delta = [torch.zeros_like(p) for p in loss.here]
        return delta, accepted, Damping(tau, gamma, damping.trend, rho, coefficients)

    def _entered(self, model: QuadraticModel[TrialLoss], damping: Damping | None) -> tuple[Damping, bool]:
        """Returns the dampings with which a step begins, and whether the losses of new batches rise."""
        rule, loss = self.schedule, model.loss
        if damping is None:
            scale = _scale(model)
            tau = rule.start(loss.instances) * scale
            trend = LossTrend(rule.floor * tau, rule.floor * tau, loss.start, loss.start)
            return Damping(tau, None if rule.gamma is None else rule.gamma * scale, trend), False
        if rule.floor == 0:
            return damping, False
        trend, rising = damping.trend.seen(loss.start, damping.tau)
        return Damping(max(damping.tau, trend.floor), damping.gamma, trend), rising


def _proposed(
    model: QuadraticModel[TrialLoss], directions: Directions[Prepared], lr: float, previous: list[Tensor] | None, tau: float,
    gamma: float | None, fresh: bool,
) -> tuple[Step, Prepared]:  # fmt: skip
    """Returns the model's best step at these dampings, along the direction and the previous step if there is one.

    With it comes what was prepared for the direction.
    """
    transfer = Transfer()
    (direction, prepared), revised = directions(tau if gamma is None else gamma, fresh, transfer)

    def best(direction: list[Tensor]) -> Later[Step]:
        return model.best_step([direction] if previous is None else [direction, previous], tau, lr, transfer)

    step = best(direction)
    if (other := revised()) is not None:
        direction, prepared = other
        step = best(direction)
    return step(), prepared


def _scale(model: QuadraticModel[TrialLoss]) -> float:
    """Returns what dampings are relative to: the first loss, or the curvature along its gradient if that loss tells nothing."""
    loss, transfer = model.loss, Transfer()
    squares = transfer.numbers([g.double().square().sum() for g in model.gradients])
    terms = loss.products([model.gradients], transfer)
    square = math.fsum(squares())
    curvature = float(terms()[1][0, 0]) / square if square > 0 else 0.0
    if curvature > 0 and not torch.finfo(torch.float32).tiny < abs(loss.start) <= _LARGEST_LOSS * curvature:
        return curvature
    return max(abs(loss.start), torch.finfo(torch.float32).tiny)
