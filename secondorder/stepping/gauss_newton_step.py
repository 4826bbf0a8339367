"""Exact Gauss-Newton steps on random rows of the Jacobian: their damping, acceleration, corrections and acceptance."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from secondorder._tape.factored import Buffer, Jacobian
from secondorder._tape.jacobian import jacobian
from secondorder._tape.plans import Block, Plan, make_plan, signature
from secondorder._tape.residuals import COMPILED
from secondorder._tape.uses import find_uses
from secondorder._tensors import host_numbers
from secondorder.errors import NonFiniteError
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
MANY = 20  # so many residuals with a backward pass each are slow
SUSPECT = 2.0  # above this ratio of reduction and predicted reduction the residuals at the start are evaluated and compared anew
LEAST_DAMPING = 1e-16
SMALL = 100  # a Jacobian may be rounding, as where derivatives cancel out, below so many times eps |r| / (1 + |theta|),
NOISE = 30  # and what is less than so many times that by which autograd disagrees with itself, is
AGAIN = (0.7, 1.3, 1.9)  # autograd computes J^T u again from these multiples of u, each of which is rounded otherwise
HELD_RATIO = 4  # if there are fewer than so many residuals for each parameter
HELD_PATIENCE = 12  # a step goes back after so many steps without a new record of what residuals held out say of the whole loss,
HELD_EXCESS = 1.1  # if that is then so many times its record, or their own loss so many times that of the others
HELD_DAMPING = 100.0  # on the way back mu is multiplied by this, and the product is a lower bound on mu from then on,
HELD_DECAY = 0.9  # which is multiplied by this in every step
HELD_NOISE = 1e-5  # below this share of the first loss, the residuals held out have too little noise to be held out any more
PLANS = 16  # plans are kept for graphs of so many structures


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

    def with_new_record(self) -> "Progress":
        """Returns it for another batch or other parameters, whose residuals held out have no record."""
        return self._replace(held=math.inf, held_since=0, best=None, released=False)


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


class GaussNewtonStep:
    """Steps that lower the loss of one batch.

    Args:
        loss: the loss of the batch.
        settings: the arguments of the optimizer.
        plans: the plans for graphs that have been seen, by signature, and how often each graph was seen.
        generator: the generator that draws rows.
        lr: what multiplies a step, one number or one for each parameter's element [P].
        slow: called with the parameters that cost a backward pass for each of many residuals, by their positions, and with the
            node by which each enters.
        buffer: memory for matrices.
    """

    def __init__(
        self, loss: LeastSquaresLoss, settings: Settings, plans: dict[object, tuple[Plan, int]], generator: torch.Generator,
        lr: float | Tensor, slow: Callable[[dict[int, str]], None], buffer: Buffer,
    ):  # fmt: skip
        self._buffer = buffer
        self.interpolates = False  # whether a step has gone back, since only the residuals drawn still fell
        self.loss, self.settings, self._plans = loss, settings, plans
        self._generator, self._lr, self._slow = generator, lr, slow
        self._index = {id(p): i for i, p in enumerate(loss.parameters)}

    def step(self, here: Residuals, progress: Progress) -> tuple[Residuals, Progress]:
        """Makes one step; returns the residuals where it leads, and what it leaves to the next step."""
        loss, settings = self.loss, self.settings
        if here.objective == 0:
            return here, progress._replace(ratio=0.0)
        plan = self._plan(here, progress)
        theta, whole = loss.flat(), here.objective
        same = abs(whole - progress.whole) <= 1e-6 * whole
        if not same or (progress.best is not None and len(progress.best) != len(theta)):
            progress = progress.with_new_record()
        if same and whole > RISE * progress.record:  # no step leads there: the record is that of another loss
            progress = progress._replace(record=whole, since=0)
        rows = self._draw(plan, here, progress)
        jacobian = self._jacobian(plan, here, rows)
        if jacobian is None:
            plan = self._new_plan(here)
            rows = self._draw(plan, here, progress)
            jacobian = self._jacobian(plan, here, rows)
            assert jacobian is not None
        r, before = rows.taken(here.values), [v.detach() for v in here.values]
        problem = DampedLeastSquares(jacobian, here.penalties, settings.solver, settings.memory, self._generator, self._buffer)
        at_start = self._drawn_objective(r, theta, here)
        mu, growth = progress.damping, progress.growth
        for attempt in range(TRIES):
            damping = (mu * problem.trace.double()).to(theta.dtype)
            solve, failed = problem.at(damping)
            delta = problem.step(solve, r, theta, damping)
            aim = r + jacobian.mv(self._lr * delta)
            linear = self._drawn_objective(aim, theta + self._lr * delta, here)
            trace, start, end, fails, length = host_numbers([problem.trace, at_start, linear, failed, theta.norm()])
            if not math.isfinite(trace):
                raise NonFiniteError(f"{loss.owner}.step(): the Jacobian holds NaN or inf; no parameter and no state has changed")
            small = SMALL * torch.finfo(theta.dtype).eps * math.sqrt(start) / (1 + length)
            tiny = attempt == 0 and here.penalties is None and math.sqrt(trace) <= small
            # Beside residuals of 1e7 and more, as in pascals, a Jacobian is as small, and is no rounding.
            if tiny and (trace == 0 or self._is_rounding(here, rows)):
                return here, progress._replace(ratio=0.0)
            if fails:
                mu = max(10 * mu, LEAST_DAMPING)
                continue
            predicted = start - end
            moved = theta + self._lr * delta
            if settings.acceleration:
                moved = moved + self._lr**2 * self._acceleration(here, rows, jacobian, solve, r, theta, delta)
            limit = whole if rows.whole else RISE * (min(whole, progress.record) if same else whole)
            trial = self._corrected(moved, here, rows, aim, solve, delta, (start, end, limit))
            if trial.drawn < start and trial.whole < limit and predicted > 0:
                ratio = (start - trial.drawn) / predicted
                if ratio > SUSPECT:
                    reached = loss.flat()
                    loss.move(theta)
                    self._check_same(before, here, 1e-2)
                    trial = self._trial(here, rows, reached)
                least = max(HELD_DECAY * progress.least, LEAST_DAMPING)
                mu = max(mu * max(1 / 3, 1 - (2 * ratio - 1) ** 3), least)
                progress = progress._replace(damping=mu, least=least, growth=2.0, ratio=ratio, whole=trial.whole)
                progress = self._recorded(progress, trial.whole, rows)
                return self._held_out(here._replace(values=trial.values, objective=trial.whole), progress, rows, trial.held)
            mu, growth = mu * growth, 2 * growth
        loss.move(theta)
        self._check_same(before, here, 1e-2)
        progress = progress._replace(damping=min(10 * progress.damping, 1.0), growth=2.0, ratio=0.0)
        return self._held_out(here, progress, rows, host_numbers(rows.held_losses(here.values)))

    # --- the Jacobian of some rows ---

    def _plan(self, here: Residuals, progress: Progress) -> Plan:
        """Returns the plan of the residuals' graph, and makes one for a structure that is new.

        A plan is checked when it is new, at the 2nd, 4th, 8th, ... step, and after a step that failed: gradients that were zero
        when it was made, as behind a ReLU or a last layer of zeros, did not show which residual they belong to. One that may lack
        rows for this reason is checked at every step.
        """
        uses = [find_uses(r, self._index) for r in here.values]
        self.loss.check_dtypes(use.operand for each in uses for use in each.uses if use.operand is not None)
        self._uses, self._key = uses, None if any(u.by_value for u in uses) else signature(uses)
        known = None if self._key is None else self._plans.get(self._key)
        if known is None:
            self._check_same(here.values, here, 1e-4)
            return self._new_plan(here)
        plan, times = known[0], known[1] + 1
        self._plans[self._key] = plan, times
        incomplete = any(block.incomplete for block in plan.blocks)
        self._new, self._unchecked = False, incomplete or times & (times - 1) == 0 or progress.ratio == 0
        return plan

    def _new_plan(self, here: Residuals) -> Plan:
        plan = make_plan(here.values, self._uses, self.loss.parameters)
        self._new = self._unchecked = True
        if self._key is not None:
            if len(self._plans) >= PLANS:
                self._plans.clear()
            self._plans[self._key] = plan, 1
        return plan

    def _check_same(self, values: Sequence[Tensor], here: Residuals, tolerance: float) -> None:
        """Raises RuntimeError if the closure's residuals at the present parameters are no longer these values."""
        pairs = zip(values, self.loss.there(here), strict=True)
        norms = host_numbers([norm for old, new in pairs for norm in ((old - new).norm(), old.norm())])
        for difference, size in zip(norms[::2], norms[1::2], strict=True):
            if not difference <= tolerance * size:
                raise RuntimeError(
                    f"{self.loss.owner}.step(): expected the closure to evaluate the same residuals at every call of a step, "
                    "but they differ at the same parameters. Draw the batch outside of the closure, or by torch's own "
                    "generators, which start every call of a step alike; layers that change with every call, as spectral_norm "
                    "does, belong in eval mode."
                )

    def _fed(self, block: Block) -> bool:
        """Returns whether the loss of some of a block's residuals tells something of that of the others.

        It does where data pass through layers. Where parameters stand for themselves, as a field's values or in penalties, no
        residual says anything of another one.
        """
        if any(2 * self.loss.parameters[p].numel() > block.size for p in block.others):
            return False
        uses = [self._uses[block.term].uses[k] for k in block.uses]
        return any(u.operand is not None and 2 * u.blocks * int(u.operand.count_nonzero()) > u.operand.numel() for u in uses)

    def _draw(self, plan: Plan, here: Residuals, progress: Progress) -> DrawnRows:
        """Draws as many residuals as `progress` and the number of parameters ask for."""
        parameters = sum(p.numel() for p in self.loss.parameters)
        rows = progress.rows
        if parameters <= rows:
            rows = min(max(rows, OVER * parameters), self.settings.max_rows)
        few = sum(block.size for block in plan.blocks) < HELD_RATIO * parameters
        holds = not progress.released and (few if self.settings.holdout is None else self.settings.holdout)
        return draw_rows(plan.blocks, here, rows, self._generator, lambda block: holds and self._fed(block))

    def _jacobian(self, plan: Plan, here: Residuals, rows: DrawnRows) -> Jacobian | None:
        """Returns the Jacobian of these rows; None: a plan that was right before is wrong now."""
        parameters = self.loss.parameters
        found = jacobian(plan, here.values, self._uses, parameters, rows.scales, rows.drawn, self._buffer)
        if self._unchecked:
            wrong = self._wrong(here, rows, found)
            if wrong and not self._new:
                return None
            if wrong:
                for block in plan.blocks:
                    block.others.update(dict.fromkeys(wrong, "a product"))
                found = jacobian(plan, here.values, self._uses, parameters, rows.scales, rows.drawn, self._buffer)
                if wrong := self._wrong(here, rows, found):
                    raise RuntimeError(
                        f"{self.loss.owner}.step(): the Jacobian of the parameter of shape {tuple(parameters[wrong[0]].shape)} "
                        "is not that of autograd; its graph is not understood"
                    )
            self._slow(self._by_passes(plan, rows))
        return found

    def _by_passes(self, plan: Plan, rows: DrawnRows) -> dict[int, str]:
        """Returns the parameters that cost a backward pass for each of many residuals, and the nodes by which they enter."""
        found: dict[int, str] = {}
        for members in plan.with_others():
            count = sum(len(rows.scales[i]) for i in members)
            for p, node in plan.blocks[members[0]].others.items():
                if count >= MANY and (2 * self.loss.parameters[p].numel() > count or node == COMPILED):
                    found[p] = node
        return found

    def _wrong(self, here: Residuals, rows: DrawnRows, found: Jacobian) -> list[int]:
        """Returns the parameters whose columns disagree with one backward pass for a random combination of the rows.

        Where derivatives cancel out no two ways of computing them agree: what is no more than the rounding of autograd's own way
        is no disagreement.
        """
        sizes = [p.numel() for p in self.loss.parameters]
        u = self._combination(rows)
        right = self._combined(here, rows, u)
        pairs = zip(found.rmv(u).split(sizes), right.split(sizes), strict=True)
        size, *errors = torch.stack([right.norm(), *((ours - theirs).norm() for ours, theirs in pairs)]).tolist()  # one wait
        if not math.isfinite(size):  # the trace will say so
            return []
        bound = (1e-8 if right.dtype == torch.float64 else 1e-3) * size
        if not all(error <= bound for error in errors):
            bound += NOISE * self._noise(here, rows, u, right)
        return [i for i, error in enumerate(errors) if not error <= bound]

    def _is_rounding(self, here: Residuals, rows: DrawnRows) -> bool:
        """Returns whether the Jacobian of these rows is no more than its own rounding."""
        u = self._combination(rows)
        right = self._combined(here, rows, u)
        return float(right.norm()) <= NOISE * self._noise(here, rows, u, right)

    def _combination(self, rows: DrawnRows) -> Tensor:
        """Returns random factors u [m] of these rows, the same ones for the same number of rows."""
        generator = torch.Generator().manual_seed(len(rows.flat))
        return torch.randn(len(rows.flat), generator=generator, dtype=torch.float64, device="cpu").to(rows.scale)

    def _combined(self, here: Residuals, rows: DrawnRows, u: Tensor) -> Tensor:
        """Returns J^T u [P] of these rows by one backward pass."""
        parameters = self.loss.parameters
        seeds = torch.cat([v.detach().flatten() for v in here.values]).zero_().index_add_(0, rows.flat, u * rows.scale)
        weights = [w.view_as(v) for w, v in zip(seeds.split([v.numel() for v in here.values]), here.values, strict=True)]
        found = torch.autograd.grad(here.values, parameters, weights, retain_graph=True, allow_unused=True)
        return torch.cat(
            [(torch.zeros_like(p) if g is None else g.to_dense()).flatten() for p, g in zip(parameters, found, strict=True)]
        )

    def _noise(self, here: Residuals, rows: DrawnRows, u: Tensor, combined: Tensor) -> float:
        """Returns how far J^T u is from what autograd finds from multiples of u, which is its rounding."""
        return max(float((self._combined(here, rows, k * u) / k - combined).norm()) for k in AGAIN)

    # --- parts of a step ---

    def _trial(self, here: Residuals, rows: DrawnRows, theta: Tensor) -> _Trial:
        """Moves the parameters, and evaluates the residuals there."""
        self.loss.move(theta)
        values = self.loss.there(here)
        whole = self.loss.objective(values, here)
        drawn = whole if rows.whole else self._drawn_objective(rows.taken(values), theta, here)
        now, of_drawn, *held = host_numbers([whole, drawn, *rows.held_losses(values)])
        return _Trial(values, now, of_drawn, held)

    def _corrected(
        self, moved: Tensor, here: Residuals, rows: DrawnRows, aim: Tensor, solve: Callable[[Tensor], Tensor], delta: Tensor,
        losses: tuple[float, float, float],
    ) -> _Trial:  # fmt: skip
        """Makes a step, and corrects it by chords until it is as good as the linear model promises, or cannot be corrected.

        By how much the residuals miss the linear model's, r + lr J delta, is solved for with the same Jacobian. A correction
        costs one call of the closure; a step with more damping, in place of one that fails, costs two, and is shorter.

        Args:
            moved: where the step leads.
            here: the residuals where it began.
            rows: the rows of the step.
            aim: the residuals r + lr J delta of these rows.
            solve: the step's solve, at its damping.
            delta: the step without acceleration.
            losses: of the rows drawn that at the start, and that of `aim`; and the limit of the whole loss.
        """
        start, end, limit = losses
        trial = self._trial(here, rows, moved)
        for _ in range(self.settings.corrections if end < start else 0):
            if not math.isfinite(trial.drawn) or (start - trial.drawn > ENOUGH * (start - end) and trial.whole < limit):
                break
            at, correction = self.loss.flat(), self._lr * solve(rows.taken(trial.values) - aim)
            if not bool(correction.norm() < CHORD * (self._lr * delta).norm()):
                break
            drawn = trial.drawn
            del trial  # its graph is freed before the next one is made
            trial = self._trial(here, rows, at - correction)
            if not trial.drawn < drawn:
                del trial
                return self._trial(here, rows, at)
        return trial

    def _acceleration(
        self, here: Residuals, rows: DrawnRows, jacobian: Jacobian, solve: Callable[[Tensor], Tensor], r: Tensor, theta: Tensor,
        delta: Tensor,
    ) -> Tensor:  # fmt: skip
        """Returns half of the geodesic acceleration along a step if it is small, else zero (Transtrum & Sethna, 2012)."""
        self.loss.move(theta + PROBE * delta)
        probed = rows.taken(self.loss.there(here))
        bend = (2 / PROBE) * ((probed - r) / PROBE - jacobian.mv(delta))
        acceleration = -0.5 * solve(bend)
        return torch.where(2 * acceleration.norm() < BEND * delta.norm(), acceleration, 0.0)

    def _drawn_objective(self, r: Tensor, theta: Tensor, here: Residuals) -> Tensor:
        total = r.square().sum(dtype=torch.float64)
        if here.penalties is not None:
            total = total + (here.penalties * theta.square()).sum(dtype=torch.float64)
        return total

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
