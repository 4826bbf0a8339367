"""Exact Gauss-Newton steps on random rows of the Jacobian: their damping, acceleration and acceptance, and the race of starts."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from secondorder._tape.factored import Buffer, Jacobian
from secondorder._tape.graph import COMPILED
from secondorder._tape.jacobian import jacobian
from secondorder._tape.plans import Block, Plan, make_plan, signature
from secondorder._tape.uses import find_uses
from secondorder._tensors import host_numbers
from secondorder.errors import NonFiniteError
from secondorder.stepping.damped_least_squares import DampedLeastSquares
from secondorder.stepping.least_squares_loss import LeastSquaresLoss, Residuals

TRIES = 12  # dampings that a step tries
PROBE = 0.1  # of a step: where the second derivative along it is taken
BEND = 0.75  # an acceleration whose double is not less than this times the step is left out
RISE = 2.0  # the whole loss may become so many times what it was in a step that lowers that of the rows drawn
PATIENCE = 4  # steps without a new record of the whole loss, after which more rows are drawn
GROWTH = 1.5  # so many times as many
OVER = 4  # rows for each parameter where the parameters are no more than the rows asked for: then they fix a step
MANY = 20  # residuals: so many backward passes in a step are slow
SUSPECT = 2.0  # a reduction over the predicted one above which the residuals are compared with those at the start anew
SHARE = 0.5  # of an equal share of the rows that each term has at least
LEAST_DAMPING = 1e-16
HELD = 10  # one of so many residuals is held out
HELD_BLOCK = 100  # of blocks with at least so many
HELD_RATIO = 4  # where there are fewer than so many residuals for a parameter
HELD_PATIENCE = 12  # steps without a new record of the residuals held out
HELD_EXCESS = 1.1  # and how much larger than the others they then are
HELD_DAMPING = 100.0  # what mu is multiplied by on the way back; it does not fall below
HELD_DECAY = 0.9  # but this bound falls in every step
HELD_NOISE = 1e-5  # of the first loss: residuals held out that come below have too little noise to be held out for
PLANS = 16  # kept for graphs of as many structures

RACE_STEPS = 6  # of each start
RACE_ROWS = 150
RACE_WARM_UP = 40  # steps of a first-order optimizer before those of the first, and on until the loss has halved,
RACE_LONGEST = 120  # but no more than these
RACE_DAMPING = 1e-2  # and mu after them, relative to tr(J J^T)
RACE_FEW = 20  # parameters: then the second start is the first, since it mostly ends the race, and a warm one costs most of a fit
RACE_END = 1e-3  # of the first loss: a start that comes below ends the race,
RACE_FALL = 0.5  # and so does one whose second half of steps brings so much less


class Progress(NamedTuple):
    """What one step leaves to the next."""

    damping: float  # mu, relative to tr(J J^T)
    rows: float  # to be drawn; inf: all
    growth: float = 2.0  # what the next failure multiplies the damping by
    record: float = math.inf  # the least whole loss since the rows have last grown
    since: int = 0  # steps since then
    ratio: float = 0.0  # the last step's reduction over the predicted one; 0: no step was accepted
    whole: float = math.nan  # the whole loss after it
    held: float = math.inf  # the least loss of the residuals held out
    excess: float = 0.0  # their mean loss now, over that of the others of their blocks; 0: none are held out
    held_since: int = 0  # steps since `held`
    best: Tensor | None = None  # the parameters that had it [P]
    released: bool = False  # whether none are held out any more
    least: float = LEAST_DAMPING  # what mu does not fall below
    first: float = 0.0  # the whole loss where training began


class Settings(NamedTuple):
    """What does not change."""

    rows: float
    max_rows: float
    acceleration: bool
    holdout: bool | None
    solver: str
    memory: int


class _Rows(NamedTuple):
    """The residuals that a step looks at."""

    drawn: list[Tensor | None]  # of each block, the positions; None: all
    flat: Tensor  # [m], the same among the residuals of all terms, flattened
    scales: list[Tensor]  # of each block, the root of c n / m
    scale: Tensor  # [m], all of them
    whole: bool  # whether it looks at all
    held: list[tuple[Tensor, Tensor, Tensor]]  # of each block: those held out and the others, as `flat`, and all their roots of c


class GaussNewtonStep:
    """Steps that lower one batch's loss.

    Args:
        loss: of the batch.
        settings: what the optimizer was made with.
        plans: of graphs that have been seen, by their signatures, with how often.
        generator: draws rows.
        lr: multiplies a step, a number or one for each parameter's element [P].
        slow: is told of the parameters that cost a backward pass for each of many residuals, by their positions, and of the node
            by which each enters.
        buffer: memory for matrices.
        first_order: makes an optimizer of parameters that steps by their gradients.
    """

    def __init__(
        self, loss: LeastSquaresLoss, settings: Settings, plans: dict[object, tuple[Plan, int]], generator: torch.Generator,
        lr: float | Tensor, slow: Callable[[dict[int, str]], None], buffer: Buffer,
        first_order: Callable[[Sequence[Tensor]], torch.optim.Optimizer],
    ):  # fmt: skip
        self._buffer, self._first_order = buffer, first_order
        self.interpolates = False  # whether a step has gone back, since only the residuals drawn still fell
        self._loss, self._settings, self._plans = loss, settings, plans
        self._generator, self._lr, self._slow = generator, lr, slow
        self._index = {id(p): i for i, p in enumerate(loss.parameters)}

    def step(self, here: Residuals, progress: Progress) -> tuple[Residuals, Progress]:
        """One step; returns the loss where it leads, and what it leaves to the next."""
        loss, settings = self._loss, self._settings
        plan = self._plan(here, progress)
        theta, whole = loss.flat(), here.objective
        same = abs(whole - progress.whole) <= 1e-6 * whole
        if not same or (progress.best is not None and len(progress.best) != len(theta)):  # another batch, or other parameters
            progress = progress._replace(held=math.inf, held_since=0, best=None, released=False)
        rows = self._draw(plan, here, progress)
        jacobian = self._jacobian(plan, here, rows)
        if jacobian is None:
            plan = self._new_plan(here)
            rows = self._draw(plan, here, progress)
            jacobian = self._jacobian(plan, here, rows)
            assert jacobian is not None
        r, before = self._taken(here.values, rows), [v.detach() for v in here.values]
        problem = DampedLeastSquares(jacobian, here.penalties, settings.solver, settings.memory, self._generator, self._buffer)
        at_start = self._drawn_objective(r, theta, here)
        mu, growth = progress.damping, progress.growth
        for _ in range(TRIES):
            damping = (mu * problem.trace.double()).to(theta.dtype)
            solve, failed = problem.at(damping)
            delta = problem.step(solve, r, theta, damping)
            linear = self._drawn_objective(r + jacobian.mv(self._lr * delta), theta + self._lr * delta, here)
            trace, start, end, fails = host_numbers([problem.trace, at_start, linear, failed])
            if not math.isfinite(trace):
                raise NonFiniteError(f"{loss.owner}.step(): the Jacobian holds NaN or inf; no parameter and no state has changed")
            if trace == 0 and here.penalties is None:
                return here, progress
            if fails:
                mu = max(10 * mu, LEAST_DAMPING)
                continue
            predicted = start - end
            moved = theta + self._lr * delta
            if settings.acceleration:
                moved = moved + self._lr**2 * self._acceleration(here, rows, jacobian, solve, r, theta, delta)
            loss.move(moved)
            values = loss.there(here)
            all_of_them = loss.objective(values, here)
            of_drawn = all_of_them if rows.whole else self._drawn_objective(self._taken(values, rows), loss.flat(), here)
            now, drawn, *held = host_numbers([all_of_them, of_drawn, *self._held(values, rows)])
            limit = whole if rows.whole else RISE * (min(whole, progress.record) if same else whole)
            if drawn < start and now < limit and predicted > 0:
                ratio = (start - drawn) / predicted
                if ratio > SUSPECT:
                    reached = loss.flat()
                    loss.move(theta)
                    self._check_same(before, here, 1e-2)
                    loss.move(reached)
                    values = loss.there(here)
                least = max(HELD_DECAY * progress.least, LEAST_DAMPING)
                mu = max(mu * max(1 / 3, 1 - (2 * ratio - 1) ** 3), least)
                progress = self._recorded(
                    progress._replace(damping=mu, least=least, growth=2.0, ratio=ratio, whole=now), now, rows.whole
                )
                return self._held_out(here._replace(values=values, objective=now), progress, rows, held)
            mu, growth = mu * growth, 2 * growth
        loss.move(theta)
        self._check_same(before, here, 1e-2)
        progress = progress._replace(damping=min(10 * progress.damping, 1.0), growth=2.0, ratio=0.0)
        return self._held_out(here, progress, rows, host_numbers(self._held(here.values, rows)))

    def race(self, here: Residuals, damping: float) -> tuple[Residuals, Progress]:
        """Some steps from each of two starts; the lowest loss goes on.

        The first steps decide which minimum is reached: those after some of a first-order optimizer, or those with `damping`
        times the mean of the diagonal.
        """
        loss = self._loss
        theta, first = loss.flat(), here.objective
        rows = min(RACE_ROWS, self._settings.rows)
        drawn = min(rows, sum(r.numel() for r in here.values))
        best: tuple[float, Tensor, Residuals, Progress] | None = None
        starts = [(RACE_DAMPING, True), (damping / drawn, False)]
        for mu, warm in starts[::-1] if len(theta) < RACE_FEW else starts:
            progress = Progress(mu, rows, first=first)
            loss.move(theta)
            now = self._warmed_up(here) if warm else loss.again(here)
            values = []
            for _ in range(RACE_STEPS):
                now, progress = self.step(now, progress)
                if progress.ratio == 0:  # it was taken back, and has left the graph behind
                    now = loss.again(here)
                values.append(now.objective)
            value = values[-1]
            if best is None or value < best[0] or math.isnan(best[0]):
                best = value, loss.flat(), now, progress
            if value < RACE_END * first or value < RACE_FALL * values[RACE_STEPS // 2 - 1]:
                break
        assert best is not None
        if not best[0] < first:  # the parameters were trained before
            loss.move(theta)
            return here, Progress(damping / drawn, self._settings.rows, first=first)
        value, theta, now, progress = best
        loss.move(theta)
        return now, progress._replace(rows=self._settings.rows, growth=2.0, record=value, since=0)

    # --- the Jacobian of some rows ---

    def _plan(self, here: Residuals, progress: Progress) -> Plan:
        """Which rows of the graph's products are of which residuals; new for a new structure.

        It is checked when it is new, at the 2nd, 4th, 8th, ... step, and after a step that failed: what was zero when the plan
        was made, as gradients behind a ReLU or a last layer of zeros, did not show where it belongs.
        """
        uses = [find_uses(r, self._index) for r in here.values]
        self._loss.check_dtypes(use.operand for each in uses for use in each.uses if use.operand is not None)
        self._uses, self._key = uses, None if any(u.by_value for u in uses) else signature(uses)
        known = None if self._key is None else self._plans.get(self._key)
        if known is None:
            self._check_same(here.values, here, 1e-4)
            return self._new_plan(here)
        plan, times = known[0], known[1] + 1
        self._plans[self._key] = plan, times
        self._new, self._unchecked = False, times & (times - 1) == 0 or progress.ratio == 0
        return plan

    def _new_plan(self, here: Residuals) -> Plan:
        plan = make_plan(here.values, self._uses, self._loss.parameters)
        self._new = self._unchecked = True
        if self._key is not None:
            if len(self._plans) >= PLANS:
                self._plans.clear()
            self._plans[self._key] = plan, 1
        return plan

    def _check_same(self, values: Sequence[Tensor], here: Residuals, tolerance: float) -> None:
        """Raises RuntimeError where the closure has other residuals now than it had at the present parameters."""
        pairs = zip(values, self._loss.there(here), strict=True)
        norms = host_numbers([norm for old, new in pairs for norm in ((old - new).norm(), old.norm())])
        for difference, size in zip(norms[::2], norms[1::2], strict=True):
            if not difference <= tolerance * size:
                raise RuntimeError(
                    f"{self._loss.owner}.step(): expected the closure to evaluate the same residuals at every call of a step, "
                    "but they differ at the same parameters. Draw the batch outside of the closure, or by torch's own "
                    "generators, which start every call of a step alike; layers that change with every call, as spectral_norm "
                    "does, belong in eval mode."
                )

    def _fed(self, block: Block) -> bool:
        """Whether data, passing through layers, tell of a block's residuals what its others do not.

        Where parameters stand for themselves, as a field's values do, or in penalties, no residual says what another one would.
        """
        if any(2 * self._loss.parameters[p].numel() > block.size for p in block.others):
            return False
        operands = [self._uses[block.term].uses[k].operand for k in block.uses]
        return any(a is not None and 2 * int(a.count_nonzero()) > a.numel() for a in operands)

    def _draw(self, plan: Plan, here: Residuals, progress: Progress) -> _Rows:
        """Draws residuals: of each block its share, of a small one at least half of an equal share."""
        rows, total = progress.rows, sum(block.size for block in plan.blocks)
        self._total = total
        parameters = sum(p.numel() for p in self._loss.parameters)
        if parameters <= rows:
            rows = min(max(rows, OVER * parameters), self._settings.max_rows)
        whole = rows >= total
        holds = total < HELD_RATIO * parameters if self._settings.holdout is None else self._settings.holdout
        holds &= not progress.released
        fixed = torch.Generator().manual_seed(HELD)
        offsets = [0]
        for r in here.values:
            offsets.append(offsets[-1] + r.numel())
        drawn: list[Tensor | None] = []
        flat, scales, held = [], [], []
        for block in plan.blocks:
            c = here.weights[block.term].reshape(-1)
            all_elements = block.chosen(None, c.device) + offsets[block.term]
            d, kept = None, block.size
            if holds and block.size >= HELD_BLOCK and self._fed(block):
                order = torch.randperm(block.size, generator=fixed)
                out, inside = order[: block.size // HELD], order[block.size // HELD :]
                ordered = all_elements[order.to(c.device, non_blocking=True)]
                held.append((*ordered.split([len(out), len(inside)]), c[ordered - offsets[block.term]].sqrt()))
                kept, d = len(inside), inside
            if not whole:
                equal = int(SHARE * rows / len(plan.blocks))
                m = min(kept, max(math.ceil(rows * block.size / total), equal, 2))
                chosen = torch.randperm(kept, generator=self._generator)[:m]
                d = chosen if d is None else d[chosen]
            if d is not None:
                d = d.sort()[0].to(c.device, non_blocking=True)
                c = c * (block.size / len(d))
            elements = block.chosen(d, c.device)
            drawn.append(d)
            flat.append(elements + offsets[block.term])
            scales.append(c[elements].sqrt())
        return _Rows(drawn, torch.cat(flat), scales, torch.cat(scales), whole and not held, held)

    def _taken(self, values: Sequence[Tensor], rows: _Rows) -> Tensor:
        """The weighted residuals of these rows [m]."""
        return torch.cat([v.detach().flatten() for v in values])[rows.flat] * rows.scale

    def _jacobian(self, plan: Plan, here: Residuals, rows: _Rows) -> Jacobian | None:
        """That of these rows; None where a plan that was right before is so no more."""
        parameters = self._loss.parameters
        found = jacobian(plan, here.values, self._uses, parameters, rows.scales, rows.drawn, self._buffer)
        if self._unchecked:
            wrong = self._wrong(plan, here, rows, found)
            if wrong and not self._new:
                return None
            if wrong:
                for block in plan.blocks:
                    block.others.update(dict.fromkeys(wrong, "a product"))
                found = jacobian(plan, here.values, self._uses, parameters, rows.scales, rows.drawn, self._buffer)
                if wrong := self._wrong(plan, here, rows, found):
                    raise RuntimeError(
                        f"{self._loss.owner}.step(): the Jacobian of the parameter of shape {tuple(parameters[wrong[0]].shape)} "
                        "is not that of autograd; its graph is not understood"
                    )
            self._slow(
                {
                    p: node
                    for block, scale in zip(plan.blocks, rows.scales, strict=True)
                    for p, node in block.others.items()
                    if len(scale) >= MANY and (2 * parameters[p].numel() > len(scale) or node == COMPILED)
                }
            )
        return found

    def _wrong(self, plan: Plan, here: Residuals, rows: _Rows, found: Jacobian) -> list[int]:
        """Parameters whose columns are not those of one backward pass for a random combination of the rows."""
        parameters = self._loss.parameters
        generator = torch.Generator().manual_seed(len(rows.flat))
        u = torch.randn(len(rows.flat), generator=generator, dtype=torch.float64).to(rows.scale)
        seeds = torch.cat([v.detach().flatten() for v in here.values]).zero_().index_add_(0, rows.flat, u * rows.scale)
        weights = [w.view_as(v) for w, v in zip(seeds.split([v.numel() for v in here.values]), here.values, strict=True)]
        right = torch.autograd.grad(here.values, parameters, weights, retain_graph=True, allow_unused=True)
        ours = found.rmv(u).split([p.numel() for p in parameters])
        pairs = [(o, torch.zeros_like(o) if t is None else t.flatten()) for o, t in zip(ours, right, strict=True)]
        norms = [torch.cat([t for _, t in pairs]).norm(), *((o - t).norm() for o, t in pairs)]
        size, *errors = torch.stack(norms).tolist()  # one wait for the device
        if not math.isfinite(size):  # the trace will say so
            return []
        tolerance = 1e-8 if rows.scale.dtype == torch.float64 else 1e-3
        return [i for i, error in enumerate(errors) if not error <= tolerance * size]

    # --- parts of a step ---

    def _acceleration(
        self, here: Residuals, rows: _Rows, jacobian: Jacobian, solve: Callable[[Tensor], Tensor], r: Tensor, theta: Tensor,
        delta: Tensor,
    ) -> Tensor:  # fmt: skip
        """Half of the geodesic acceleration along a step where it is small, else zero (Transtrum & Sethna, 2012)."""
        self._loss.move(theta + PROBE * delta)
        probed = self._taken(self._loss.there(here), rows)
        bend = (2 / PROBE) * ((probed - r) / PROBE - jacobian.mv(delta))
        acceleration = -0.5 * solve(bend)
        return torch.where(2 * acceleration.norm() < BEND * delta.norm(), acceleration, 0.0)

    def _drawn_objective(self, r: Tensor, theta: Tensor, here: Residuals) -> Tensor:
        total = r.square().sum(dtype=torch.float64)
        if here.penalties is not None:
            total = total + (here.penalties * theta.square()).sum(dtype=torch.float64)
        return total

    def _held(self, values: Sequence[Tensor], rows: _Rows) -> list[Tensor]:
        """The mean loss of the residuals held out, and of the others of their blocks; nothing where none are held out."""
        if not rows.held:
            return []
        flat = torch.cat([v.detach().flatten() for v in values])
        sums = [torch.zeros((), dtype=torch.float64, device=flat.device)] * 2
        for out, inside, scale in rows.held:
            squares = (flat[torch.cat([out, inside])] * scale).square().double()
            parts = squares.split([len(out), len(inside)])
            sums = [total + part.mean() * len(squares) for total, part in zip(sums, parts, strict=True)]
        return sums

    def _held_out(self, there: Residuals, progress: Progress, rows: _Rows, means: list[float]) -> tuple[Residuals, Progress]:
        """Goes back to the least loss of the residuals held out where only the others fall: they are interpolated.

        At a minimum of all others those held out join them, unless holding out was asked for.

        Args:
            there: where the step has led.
            progress: so far.
            rows: those of the step.
            means: of `_held`.
        """
        if not means:
            return there, progress._replace(excess=0.0)
        held, others = means
        progress = progress._replace(excess=held / max(others, torch.finfo(torch.float64).tiny))
        ended = progress.ratio == 0 and len(rows.flat) + sum(len(out) for out, _, _ in rows.held) == self._total
        clean = held < HELD_NOISE * progress.first
        if (ended or clean) and self._settings.holdout is None:
            return there, progress._replace(released=True, best=None)
        if held < progress.held:
            progress = progress._replace(held=held, held_since=0, best=self._loss.flat())
            if not ended:
                return there, progress
        if progress.held_since + 1 < HELD_PATIENCE and not ended:
            return there, progress._replace(held_since=progress.held_since + 1)
        if progress.excess < HELD_EXCESS or progress.best is None:
            return there, progress._replace(held_since=0)
        self.interpolates = True
        self._loss.move(progress.best)
        there = self._loss.again(there)
        mu, whole = min(HELD_DAMPING * progress.damping, 1.0), there.objective
        return there, progress._replace(damping=mu, least=mu, held_since=0, whole=whole, record=whole)

    def _recorded(self, progress: Progress, now: float, whole: bool) -> Progress:
        """The rows of the next step: more after some steps without a new record."""
        if whole:
            return progress
        if now < progress.record:
            return progress._replace(record=now, since=0)
        if progress.since + 1 < PATIENCE:
            return progress._replace(since=progress.since + 1)
        rows = min(progress.rows * GROWTH, self._settings.max_rows, self._total)
        return progress._replace(rows=rows, record=now, since=0)

    def _warmed_up(self, here: Residuals) -> Residuals:
        """Where some steps of a first-order optimizer lead, from the parameters' present values."""
        loss, parameters = self._loss, self._loss.parameters
        kept = [p.grad for p in parameters]
        optimizer = self._first_order(parameters)
        try:
            for step in range(RACE_LONGEST):
                values = loss.there(here)
                if step >= RACE_WARM_UP and loss.objective(values, here) < here.objective / 2:
                    break
                with torch.enable_grad():
                    total = sum((c * r.square()).sum() for c, r in zip(here.weights, values, strict=True))
                    if here.penalties is not None:
                        each = here.penalties.split([p.numel() for p in parameters])
                        total = total + sum((t.view_as(p) * p.square()).sum() for t, p in zip(each, parameters, strict=True))
                gradients = torch.autograd.grad(total, parameters, allow_unused=True)  # type: ignore[arg-type]
                for p, g in zip(parameters, gradients, strict=True):
                    p.grad = g
                optimizer.step()
        finally:
            for p, gradient in zip(parameters, kept, strict=True):
                p.grad = gradient
        return loss.again(here)
