"""The race of starts: the first steps decide which minimum is reached."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from secondorder.errors import NonFiniteError
from secondorder.stepping.gauss_newton_step import FEW, GaussNewtonStep, Progress
from secondorder.stepping.least_squares_loss import LeastSquaresLoss, Residuals

STEPS = 6  # of each start
ROWS = 150  # drawn in these steps
# The warm start begins with steps of a first-order optimizer:
WARM_UP = 40  # so many,
EARLY = 0.1  # or fewer, if the loss is below this share of the first one by then,
HALVED = 0.5  # or more until it is below this share,
LONGEST = 120  # but no more than these
ROUNDING = 100  # a race that gains no more than so many eps of the first loss gains nothing
DAMPING = 1e-2  # mu after these steps, relative to tr(J J^T)
END = 1e-3  # a start whose loss comes below this share of the first loss ends the race,
FALL = 0.5  # and so does one whose second half of steps brings the loss below this share of that after the first half

FirstOrder = Callable[[Sequence[Tensor]], torch.optim.Optimizer]  # makes an optimizer that steps by gradients


def race(run: GaussNewtonStep, here: Residuals, damping: float, first_order: FirstOrder) -> tuple[Residuals, Progress]:
    """Makes some steps from each of two starts, and goes on from the lowest loss.

    The warm start begins with steps of a first-order optimizer, and is left out if these end where the loss is not finite. The
    cold one begins with the parameters as they are, and with a mu of `damping` times the mean of J J^T's diagonal.
    """
    # With few parameters the cold start comes first, since it mostly ends the race, and a warm start costs most of a fit.
    loss = run.loss
    theta, first = loss.flat(), here.objective
    rows = min(ROWS, run.settings.rows)
    drawn = min(rows, sum(r.numel() for r in here.values))
    best: tuple[float, Tensor, Residuals, Progress] | None = None
    starts = [(DAMPING, True), (damping / drawn, False)]
    for mu, warm in starts[::-1] if len(theta) < FEW else starts:
        progress = Progress(mu, rows, first=first)
        loss.move(theta)
        values = []
        try:
            now = _warmed_up(loss, here, first_order) if warm else loss.again(here)
            for _ in range(STEPS):
                now, progress = run.step(now, progress)
                if progress.ratio == 0:  # it was taken back, and has left the graph behind
                    now = loss.again(here)
                values.append(now.objective)
        except NonFiniteError:
            if warm:
                continue
            raise
        value = values[-1]
        if best is None or value < best[0] or math.isnan(best[0]):
            best = value, loss.flat(), now, progress
        if value < END * first or value < FALL * values[STEPS // 2 - 1]:
            break
    assert best is not None
    rounding = ROUNDING * torch.finfo(theta.dtype).eps
    if not best[0] < (1 - rounding) * first:  # the parameters were trained before, or move nothing
        loss.move(theta)
        return here, Progress(damping / drawn, run.settings.rows, first=first)
    value, theta, now, progress = best
    loss.move(theta)
    return now, progress._replace(rows=run.settings.rows, growth=2.0, record=value, since=0)


def _warmed_up(loss: LeastSquaresLoss, here: Residuals, first_order: FirstOrder) -> Residuals:
    """Makes some steps of a first-order optimizer; returns the residuals where they lead."""
    parameters = loss.parameters
    kept = [p.grad for p in parameters]
    optimizer = first_order(parameters)
    try:
        for step in range(LONGEST):
            values = loss.there(here)
            if loss.objective(values, here) < (EARLY if step < WARM_UP else HALVED) * here.objective:
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
