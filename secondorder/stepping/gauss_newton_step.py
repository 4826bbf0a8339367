"""Exact Gauss-Newton steps on random rows of the Jacobian: their damping, acceleration, corrections and acceptance."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from secondorder._tape.factored import Buffer, Jacobian
from secondorder._tape.plans import Block, Plan
from secondorder._tape.uses import Uses
from secondorder._tensors import host_numbers
from secondorder.errors import NonFiniteError
from secondorder.stepping.checked_jacobian import CheckedJacobian
from secondorder.stepping.damped_least_squares import DampedLeastSquares
from secondorder.stepping.drawn_rows import DrawnRows, draw_rows
from secondorder.stepping.least_squares_loss import LeastSquaresLoss, Residuals

TRIES = 12  # a step tries at most so many dampings
PROBE = 0.1  # the second derivative along a step is taken at this share of the step
BEND = 0.75  # an acceleration is left out if its double is not less than this times the step
ENOUGH = 0.75  # a step is corrected while it lowers the loss of the rows drawn by less than this share of what was predicted,
CHORD = 0.1  # by less than this times the step
RISE = 2.0  # a step that lowers the loss of the rows drawn may raise the whole loss to so many times its record
PATIENCE = 4  # after so many steps without a new record of the whole loss more rows are drawn,
GROWTH = 1.5  # so many times as many
OVER = 4  # rows drawn for each parameter, at least, if the parameters are no more than the rows asked for: then they fix a step
SUSPECT = 2.0  # above this ratio of reduction and predicted reduction the residuals at the start are evaluated and compared anew
LEAST_DAMPING = 1e-16
FEW = 20  # with fewer parameters than these, steps do not depend on the parameters' units
SMALL = 100  # a Jacobian may be rounding, as where derivatives cancel out, below so many times eps |r| / (1 + |theta|)
HELD_RATIO = 4  # if there are fewer than so many residuals for each parameter
HELD_PATIENCE = 12  # a step goes back after so many steps without a new record of what residuals held out say of the whole loss,
HELD_EXCESS = 1.1  # if that is then so many times its record, or their own loss so many times that of the others
HELD_DAMPING = 100.0  # on the way back mu is multiplied by this, and the product is a lower bound on mu from then on,
HELD_DECAY = 0.9  # which is multiplied by this in every step
HELD_NOISE = 1e-5  # below this share of the first loss, the residuals held out have too little noise to be held out any more


class Progress(NamedTuple):
    """What one step leaves to the next one."""

    damping: float  # mu, relative to tr(J J^T)
    rows: float  # how many rows are to be drawn; inf: all
    growth: float = 2.0  # what the next failure multiplies the damping by
    record: float = math.inf  # the least whole loss since the rows have last grown
    since: int = 0  # steps since that record
    ratio: float = 0.0  # the last step's reduction over the predicted one; 0: no damping was accepted
    whole: float = math.nan  # the whole loss after the last step
    held: float = math.inf  # the least whole loss that the residuals held out foretell
    excess: float = 0.0  # the mean loss of the residuals held out over that of the others of their blocks; 0: none are held out
    held_since: int = 0  # steps since `held` was reached
    best: Tensor | None = None  # the parameters that had the loss `held` [P]
    released: bool = False  # whether no residuals are held out any more
    least: float = LEAST_DAMPING  # a lower bound on mu
    first: float = 0.0  # the whole loss where training began
    norms: Tensor | None = None  # the largest norms of J's columns so far [P]; None: they are not used

    def with_new_record(self) -> "Progress":
        """Returns it for another batch or other parameters, whose residuals held out have no record."""
        return self._replace(held=math.inf, held_since=0, best=None, released=False, norms=None)


class Settings(NamedTuple):
    """The arguments of the optimizer that steps take."""

    rows: float
    max_rows: float
    acceleration: bool
    corrections: int
    holdout: bool | None
    solver: str
    memory: int


class _Trial(NamedTuple):
    """The residuals where a step leads."""

    values: list[Tensor]  # those of all terms
    whole: float  # the whole loss
    drawn: float  # the loss of the rows drawn
    held: list[float]  # what `held_losses` returns


class _LinearModel(NamedTuple):
    """What a step goes by: the linear model of the rows drawn, where it begins."""

    here: Residuals  # all residuals
    rows: DrawnRows
    jacobian: Jacobian  # J of these rows
    r: Tensor  # their weighted residuals [m]
    theta: Tensor  # the parameters [P]
    units: Tensor | float  # what their changes are measured in, one number or [P]

    def length(self, change: Tensor) -> Tensor:
        """Returns the norm of a change of the parameters, in units."""
        return (change / self.units).norm()

    def objective(self, r: Tensor, theta: Tensor) -> Tensor:
        """Returns the loss of the rows drawn at residuals r and parameters theta, |r|^2 + sum_j t_j theta_j^2, in float64."""
        total = r.square().sum(dtype=torch.float64)
        if self.here.penalties is not None:
            total = total + (self.here.penalties * theta.square()).sum(dtype=torch.float64)
        return total


class GaussNewtonStep:
    """Steps that lower the loss of one batch.

    Args:
        loss: the loss of the batch.
        jacobians: of its residuals.
        settings: the arguments of the optimizer.
        generator: the generator that draws rows.
        lr: what multiplies a step, one number or one for each parameter's element [P].
        buffer: memory for matrices.
    """

    def __init__(
        self, loss: LeastSquaresLoss, jacobians: CheckedJacobian, settings: Settings, generator: torch.Generator,
        lr: float | Tensor, buffer: Buffer,
    ):  # fmt: skip
        self._jacobians, self._buffer = jacobians, buffer
        self.interpolates = False  # whether a step has gone back, since only the residuals drawn still fell
        self.loss, self.settings = loss, settings
        self.generator, self._lr = generator, lr

    def step(self, here: Residuals, progress: Progress) -> tuple[Residuals, Progress]:
        """Makes one step; returns the residuals where it leads, and what it leaves to the next step."""
        loss = self.loss
        if here.objective == 0:
            return here, progress._replace(ratio=0.0)
        theta, whole = loss.flat(), here.objective
        same, progress = self._entered(progress, whole, theta)
        draw = functools.partial(self._draw, here, progress)
        rows, jacobian = self._jacobians.of(here, draw, check=progress.ratio == 0)
        norms = _norms(jacobian, here.penalties, progress.norms)
        progress = progress._replace(norms=norms)
        units = 1.0 if norms is None else 1 / norms.where(norms > 0, 1.0)
        model = _LinearModel(here, rows, jacobian, rows.taken(here.values), theta, units)
        problem = self._problem(model)
        size = problem.trace if norms is None else jacobian.squared_norm()
        at_start = model.objective(model.r, theta)
        mu, growth = progress.damping, progress.growth
        for attempt in range(TRIES):
            damping = (mu * problem.trace.double()).to(theta.dtype)
            solve_in_units, failed = problem.at(damping)
            delta = units * problem.step(solve_in_units, model.r, theta / units, damping)
            solve = functools.partial(_scaled, units, solve_in_units)
            moved = theta + self._lr * delta
            aim = model.r + jacobian.mv(self._lr * delta)
            linear = model.objective(aim, moved)
            trace, start, end, fails, length = host_numbers([size, at_start, linear, failed, theta.norm()])
            if not math.isfinite(trace):
                raise NonFiniteError(f"{loss.owner}.step(): the Jacobian holds NaN or inf; no parameter and no state has changed")
            small = SMALL * torch.finfo(theta.dtype).eps * math.sqrt(start) / (1 + length)
            tiny = attempt == 0 and here.penalties is None and math.sqrt(trace) <= small
            # Beside residuals of 1e7 and more, as in pascals, a Jacobian is as small, and is no rounding.
            if tiny and (trace == 0 or self._jacobians.is_rounding(here, rows)):
                return here, progress._replace(ratio=0.0)
            if fails:
                mu = max(10 * mu, LEAST_DAMPING)
                continue
            if self.settings.acceleration:
                moved = moved + self._lr**2 * self._acceleration(model, solve, delta)
            limit = whole if rows.whole else RISE * (min(whole, progress.record) if same else whole)
            trial = self._corrected(moved, model, aim, solve, delta, (start, end, limit))
            if trial.drawn < start and trial.whole < limit and start > end:
                return self._accepted(trial, model, progress, mu, (start - trial.drawn) / (start - end))
            mu, growth = mu * growth, 2 * growth
        loss.move(theta)
        loss.check_same(here, 1e-2)
        progress = progress._replace(damping=min(10 * progress.damping, 1.0), growth=2.0, ratio=0.0)
        return self._held_out(here, progress, rows, host_numbers(rows.held_losses(here.values)))

    def _entered(self, progress: Progress, whole: float, theta: Tensor) -> tuple[bool, Progress]:
        """Returns whether the batch is that of the step before, by its loss, and what still holds of that step for this one."""
        same = abs(whole - progress.whole) <= 1e-6 * whole
        if not same or (progress.best is not None and len(progress.best) != len(theta)):
            progress = progress.with_new_record()
        if same and whole > RISE * progress.record:  # no step leads there: the record is that of another loss
            progress = progress._replace(record=whole, since=0)
        return same, progress

    # --- parts of a step ---

    def _draw(self, here: Residuals, progress: Progress, plan: Plan, uses: list[Uses]) -> DrawnRows:
        """Draws as many residuals as `progress` and the number of parameters ask for."""
        parameters = sum(p.numel() for p in self.loss.parameters)
        rows = progress.rows
        if parameters <= rows:
            rows = min(max(rows, OVER * parameters), self.settings.max_rows)
        few = sum(block.size for block in plan.blocks) < HELD_RATIO * parameters
        holds = not progress.released and (few if self.settings.holdout is None else self.settings.holdout)
        return draw_rows(plan.blocks, here, rows, self.generator, lambda block: holds and self._fed(block, uses))

    def _fed(self, block: Block, uses: list[Uses]) -> bool:
        """Returns whether the loss of some of a block's residuals tells something of that of the others.

        It does where data pass through layers. Where parameters stand for themselves, as a field's values or in penalties, no
        residual says anything of another one.
        """
        if any(2 * self.loss.parameters[p].numel() > block.size for p in block.others):
            return False
        own = [uses[block.term].uses[k] for k in block.uses]
        return any(u.operand is not None and 2 * u.blocks * int(u.operand.count_nonzero()) > u.operand.numel() for u in own)

    def _problem(self, model: _LinearModel) -> DampedLeastSquares:
        """Returns the least squares problem of a model, for changes of the parameters in units."""
        jacobian, penalties, units = model.jacobian, model.here.penalties, model.units
        if isinstance(units, Tensor):
            jacobian, penalties = jacobian.times(units), None if penalties is None else penalties * units**2
        return DampedLeastSquares(jacobian, penalties, self.settings.solver, self.settings.memory, self.generator, self._buffer)

    def _accepted(
        self, trial: _Trial, model: _LinearModel, progress: Progress, mu: float, ratio: float
    ) -> tuple[Residuals, Progress]:
        """Returns the residuals where an accepted trial has led, and what it leaves to the next step."""
        if ratio > SUSPECT:
            reached = self.loss.flat()
            self.loss.move(model.theta)
            self.loss.check_same(model.here, 1e-2)
            trial = self._trial(model, reached)
        least = max(HELD_DECAY * progress.least, LEAST_DAMPING)
        mu = max(mu * max(1 / 3, 1 - (2 * ratio - 1) ** 3), least)
        progress = progress._replace(damping=mu, least=least, growth=2.0, ratio=ratio, whole=trial.whole)
        progress = self._recorded(progress, trial.whole, model.rows)
        there = model.here._replace(values=trial.values, objective=trial.whole)
        return self._held_out(there, progress, model.rows, trial.held)

    def _trial(self, model: _LinearModel, theta: Tensor) -> _Trial:
        """Moves the parameters, and evaluates the residuals there."""
        self.loss.move(theta)
        values = self.loss.there(model.here)
        whole = self.loss.objective(values, model.here)
        drawn = whole if model.rows.whole else model.objective(model.rows.taken(values), theta)
        now, of_drawn, *held = host_numbers([whole, drawn, *model.rows.held_losses(values)])
        return _Trial(values, now, of_drawn, held)

    def _corrected(
        self, moved: Tensor, model: _LinearModel, aim: Tensor, solve: Callable[[Tensor], Tensor], delta: Tensor,
        losses: tuple[float, float, float],
    ) -> _Trial:  # fmt: skip
        """Makes a step, and corrects it by chords until it is as good as the linear model promises, or cannot be corrected.

        By how much the residuals miss the linear model's, r + lr J delta, is solved for with the same Jacobian. A correction
        costs one call of the closure; a step with more damping, in place of one that fails, costs two, and is shorter.

        Args:
            moved: where the step leads.
            model: the linear model.
            aim: the residuals r + lr J delta.
            solve: the step's solve, at its damping.
            delta: the step without acceleration.
            losses: of the rows drawn that at the start, and that of `aim`; and the limit of the whole loss.
        """
        start, end, limit = losses
        trial = self._trial(model, moved)
        for _ in range(self.settings.corrections if end < start else 0):
            if not math.isfinite(trial.drawn) or (start - trial.drawn > ENOUGH * (start - end) and trial.whole < limit):
                break
            reached, correction = self.loss.flat(), self._lr * solve(model.rows.taken(trial.values) - aim)
            if not bool(model.length(correction) < CHORD * model.length(self._lr * delta)):
                break
            drawn = trial.drawn
            del trial  # its graph is freed before the next one is made
            trial = self._trial(model, reached - correction)
            if not trial.drawn < drawn:
                del trial
                return self._trial(model, reached)
        return trial

    def _acceleration(self, model: _LinearModel, solve: Callable[[Tensor], Tensor], delta: Tensor) -> Tensor:
        """Returns half of the geodesic acceleration along a step if it is small, else zero (Transtrum & Sethna, 2012)."""
        self.loss.move(model.theta + PROBE * delta)
        probed = model.rows.taken(self.loss.there(model.here))
        bend = (2 / PROBE) * ((probed - model.r) / PROBE - model.jacobian.mv(delta))
        acceleration = -0.5 * solve(bend)
        return torch.where(2 * model.length(acceleration) < BEND * model.length(delta), acceleration, 0.0)

    def _held_out(self, there: Residuals, progress: Progress, rows: DrawnRows, means: list[float]) -> tuple[Residuals, Progress]:
        """Goes back to the least loss that the residuals held out foretell if only that of the others still falls.

        Then these are interpolated. At a minimum of the others, the residuals held out join them, unless holding out was asked
        for.

        Args:
            there: the residuals where the step has led.
            progress: what the steps so far have left.
            rows: the rows of the step.
            means: the losses of `rows` that `held_losses` returns there.
        """
        if not means:
            return there, progress._replace(excess=0.0)
        held, others, both = means
        # Terms of which nothing is held out, as few data and initial values, stand for themselves: an equation alone is met
        # best where nothing happens.
        expected = held + there.objective - both
        progress = progress._replace(excess=held / max(others, torch.finfo(torch.float64).tiny))
        ended = progress.ratio == 0 and len(rows.flat) + sum(len(out) for out, _, _ in rows.held) == rows.total
        clean = held < HELD_NOISE * progress.first
        if (ended or clean) and self.settings.holdout is None:
            return there, progress._replace(released=True, best=None)
        if expected < progress.held:
            progress = progress._replace(held=expected, held_since=0, best=self.loss.flat())
            if not ended:
                return there, progress
        if progress.held_since + 1 < HELD_PATIENCE and not ended:
            return there, progress._replace(held_since=progress.held_since + 1)
        if (progress.excess < HELD_EXCESS and expected < HELD_EXCESS * progress.held) or progress.best is None:
            return there, progress._replace(held_since=0)
        self.interpolates = True
        self.loss.move(progress.best)
        there = self.loss.again(there)
        mu, whole = min(HELD_DAMPING * progress.damping, 1.0), there.objective
        return there, progress._replace(damping=mu, least=mu, held_since=0, whole=whole, record=whole)

    def _recorded(self, progress: Progress, now: float, rows: DrawnRows) -> Progress:
        """Notes the whole loss; after some steps without a new record the next step draws more rows."""
        if rows.whole:
            return progress
        if now < progress.record:
            return progress._replace(record=now, since=0)
        if progress.since + 1 < PATIENCE:
            return progress._replace(since=progress.since + 1)
        more = max(progress.rows, min(progress.rows * GROWTH, self.settings.max_rows, rows.total))
        return progress._replace(rows=more, record=now, since=0)


def _norms(jacobian: Jacobian, penalties: Tensor | None, before: Tensor | None) -> Tensor | None:
    """Returns the largest norms of J's columns so far [P], one over which parameters are measured in; None: they are many.

    So a step is the same in meters and in nanometers (Marquardt, 1963), and where a column vanishes its parameter goes no further
    than before (Moré, 1978).
    """
    if jacobian.columns >= FEW:
        return None
    norms = jacobian.column_norms(penalties)
    return norms if before is None else torch.maximum(norms, before)


def _scaled(units: Tensor | float, solve: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    """Returns a solution in units of one."""
    return units * solve(b)
