"""The Jacobian of the rows that a step draws, checked against autograd's own gradients."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from secondorder._tape.factored import Buffer, Jacobian
from secondorder._tape.jacobian import jacobian
from secondorder._tape.nodes import COMPILED
from secondorder._tape.passes import by_columns
from secondorder._tape.plans import Plan, make_plan, signature
from secondorder._tape.uses import Uses, find_uses
from secondorder.stepping.drawn_rows import DrawnRows
from secondorder.stepping.least_squares_loss import LeastSquaresLoss, Residuals

MANY = 20  # so many residuals with a backward pass each are slow
NOISE = 30  # a difference is rounding if it is below so many times autograd's own,
AGAIN = (0.7, 1.3, 1.9)  # which is seen by computing J^T (k u) / k for these k: each is rounded otherwise
PLANS = 16  # plans are kept for graphs of so many structures


class Plans:
    """Plans by the signatures of the graphs that they were made for, kept from step to step."""

    def __init__(self) -> None:
        self._kept: dict[object, tuple[Plan, int]] = {}  # and how many graphs each was used for
        self.made = 0  # how many there have been, kept or not

    def find(self, uses: list[Uses]) -> tuple[Plan, int] | None:
        """Returns the plan for a graph with these uses, and which one of its graphs this is; None: a new plan is needed."""
        key = signature(uses)
        known = None if _by_value(uses) else self._kept.get(key)
        if known is not None:
            known = self._kept[key] = known[0], known[1] + 1
        return known

    def add(self, uses: list[Uses], plan: Plan) -> None:
        """Counts a new plan, and keeps it if it serves other graphs."""
        self.made += 1
        if _by_value(uses):
            return
        if len(self._kept) >= PLANS:
            self._kept.clear()
        self._kept[signature(uses)] = plan, 1


class _Planned(NamedTuple):
    """How a step computes the Jacobian."""

    plan: Plan
    uses: list[Uses]  # of parameters, in each term's graph
    new: bool  # whether the plan was made for this very graph
    checked: bool  # whether its Jacobian is compared with autograd's


class CheckedJacobian:
    """The Jacobians of one batch's residuals, by plans that are kept from step to step.

    A plan is checked when it is new, at the 2nd, 4th, 8th, ... step, and where that is asked for: gradients that were zero when
    it was made, as behind a ReLU or a last layer of zeros, did not show which residual they belong to. One that may lack rows
    for this reason is checked at every step.

    Args:
        loss: the loss of the batch.
        plans: those of graphs that have been seen.
        slow: called with the parameters that cost a backward pass for each of many residuals, by their positions, and with the
            node by which each enters.
        buffer: memory for matrices.
    """

    def __init__(self, loss: LeastSquaresLoss, plans: Plans, slow: Callable[[dict[int, str]], None], buffer: Buffer):
        self._loss, self._plans, self._slow, self._buffer = loss, plans, slow, buffer
        self._index = {id(p): i for i, p in enumerate(loss.parameters)}

    def of(self, here: Residuals, draw: Callable[[Plan, list[Uses]], DrawnRows], check: bool) -> tuple[DrawnRows, Jacobian]:
        """Returns some rows of the residuals, and their Jacobian.

        Args:
            here: the residuals, with their graphs.
            draw: draws the rows, given a plan and the uses of parameters in each term's graph.
            check: whether to check the plan at this step.
        """
        planned = self._planned(here, check)
        rows = draw(planned.plan, planned.uses)
        found = self._found(planned, here, rows)
        if found is None:
            planned = self._made(here, planned.uses)
            rows = draw(planned.plan, planned.uses)
            found = self._found(planned, here, rows)
            assert found is not None
        return rows, found

    def is_rounding(self, here: Residuals, rows: DrawnRows) -> bool:
        """Returns whether the Jacobian of these rows is no more than its own rounding."""
        u = self._combination(rows)
        right = self._combined(here, rows, u)
        return float(right.norm()) <= NOISE * math.hypot(*self._noise(here, rows, u, right))

    def _planned(self, here: Residuals, check: bool) -> _Planned:
        """Returns the plan of the residuals' graph, and makes one for a structure that is new."""
        uses = [find_uses(r, self._index) for r in here.values]
        self._loss.check_dtypes(use.operand for each in uses for use in each.uses if use.operand is not None)
        if (known := self._plans.find(uses)) is None:
            return self._made(here, uses)
        plan, times = known
        return _Planned(plan, uses, False, check or _is_power_of_two(times) or any(b.incomplete for b in plan.blocks))

    def _made(self, here: Residuals, uses: list[Uses]) -> _Planned:
        """Returns a new plan; for the 1st, 2nd, 4th, ... one the closure must have given the same residuals when called again."""
        if _is_power_of_two(self._plans.made + 1):
            self._loss.check_same(here, 1e-4)
        plan = make_plan(here.values, uses, self._loss.parameters)
        self._plans.add(uses, plan)
        return _Planned(plan, uses, True, True)

    def _found(self, planned: _Planned, here: Residuals, rows: DrawnRows) -> Jacobian | None:
        """Returns the Jacobian of these rows; None: a plan that was right before is wrong now.

        Parameters whose columns differ from autograd's get backward passes of their own.
        """
        plan, parameters = planned.plan, self._loss.parameters

        def computed() -> Jacobian:
            return jacobian(plan, here.values, planned.uses, parameters, rows.scales, rows.drawn, self._buffer)

        found = computed()
        if planned.checked:
            wrong = self._wrong(here, rows, found)
            if wrong and not planned.new:
                return None
            if wrong:
                for block in plan.blocks:
                    block.others.update(dict.fromkeys(wrong, "a product"))
                found = computed()
                if wrong := self._wrong(here, rows, found, certain=True):
                    raise RuntimeError(
                        f"{self._loss.owner}.step(): the Jacobian of the parameter of shape {tuple(parameters[wrong[0]].shape)} "
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
                if count >= MANY and (node == COMPILED or not by_columns(self._loss.parameters[p].numel(), count)):
                    found[p] = node
        return found

    def _wrong(self, here: Residuals, rows: DrawnRows, found: Jacobian, certain: bool = False) -> list[int]:
        """Returns the parameters whose columns disagree with one backward pass for a random combination of the rows.

        Where derivatives cancel out no two ways of computing them agree: what is no more than the rounding of autograd's own way
        is no disagreement.

        Args:
            here: the residuals, with their graphs.
            rows: which of them.
            found: their Jacobian.
            certain: whether only what is large beside the columns of all parameters counts, not beside the parameter's own.
        """
        u = self._combination(rows)
        right = self._combined(here, rows, u)
        pairs = [(theirs, ours - theirs) for ours, theirs in zip(self._split(found.rmv(u)), self._split(right), strict=True)]
        numbers = torch.stack([t.norm() for pair in pairs for t in pair]).tolist()  # one wait
        sizes, errors = numbers[::2], numbers[1::2]
        size = math.hypot(*sizes)
        if not math.isfinite(size):  # the trace will say so
            return []
        tolerance, floor = (1e-8, 1e-12) if right.dtype == torch.float64 else (1e-3, 1e-6)
        bounds = [tolerance * (size if certain else own) + floor * size for own in sizes]
        if not all(error <= bound for error, bound in zip(errors, bounds, strict=True)):
            noise = self._noise(here, rows, u, right)
            bounds = [b + NOISE * (math.hypot(*noise) if certain else own) for b, own in zip(bounds, noise, strict=True)]
        return [i for i, (error, bound) in enumerate(zip(errors, bounds, strict=True)) if not error <= bound]

    def _combination(self, rows: DrawnRows) -> Tensor:
        """Returns random factors u [m] of these rows, the same ones for the same number of rows."""
        generator = torch.Generator().manual_seed(len(rows.flat))
        return torch.randn(len(rows.flat), generator=generator, dtype=torch.float64, device="cpu").to(rows.scale)

    def _combined(self, here: Residuals, rows: DrawnRows, u: Tensor) -> Tensor:
        """Returns J^T u [P] of these rows by one backward pass."""
        parameters = self._loss.parameters
        seeds = torch.cat([v.detach().flatten() for v in here.values]).zero_().index_add_(0, rows.flat, u * rows.scale)
        weights = [w.view_as(v) for w, v in zip(seeds.split([v.numel() for v in here.values]), here.values, strict=True)]
        found = torch.autograd.grad(here.values, parameters, weights, retain_graph=True, allow_unused=True)
        return torch.cat(
            [(torch.zeros_like(p) if g is None else g.to_dense()).flatten() for p, g in zip(parameters, found, strict=True)]
        )

    def _noise(self, here: Residuals, rows: DrawnRows, u: Tensor, combined: Tensor) -> list[float]:
        """Returns how far each parameter's J^T u is from what autograd finds from multiples of u, which is its rounding."""
        others = [self._split(self._combined(here, rows, k * u) / k - combined) for k in AGAIN]
        norms = [torch.stack([t.norm() for t in each]) for each in others]
        return list(map(float, torch.stack(norms).amax(0).tolist()))

    def _split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Returns each parameter's part of a vector [P]."""
        return flat.split([p.numel() for p in self._loss.parameters])


def _by_value(uses: list[Uses]) -> bool:
    return any(u.by_value for u in uses)


def _is_power_of_two(n: int) -> bool:
    return n & (n - 1) == 0
