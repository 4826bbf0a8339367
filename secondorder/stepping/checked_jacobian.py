"""The Jacobian of the rows that a step draws, checked against autograd's own gradients."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from secondorder._tape.factored import Buffer, Jacobian
from secondorder._tape.jacobian import jacobian
from secondorder._tape.nodes import COMPILED
from secondorder._tape.plans import Plan, make_plan, signature
from secondorder._tape.uses import Uses, find_uses
from secondorder.stepping.drawn_rows import DrawnRows
from secondorder.stepping.least_squares_loss import LeastSquaresLoss, Residuals

MANY = 20  # so many residuals with a backward pass each are slow
NOISE = 30  # a difference is rounding below so many times that by which autograd disagrees with itself, where
AGAIN = (0.7, 1.3, 1.9)  # it computes J^T u again from these multiples of u, each of which is rounded otherwise
PLANS = 16  # plans are kept for graphs of so many structures


class CheckedJacobian:
    """The Jacobians of one batch's residuals, by plans that are kept from step to step.

    A plan is checked when it is new, at the 2nd, 4th, 8th, ... step, and where that is asked for: gradients that were zero when
    it was made, as behind a ReLU or a last layer of zeros, did not show which residual they belong to. One that may lack rows
    for this reason is checked at every step.

    Args:
        loss: the loss of the batch.
        plans: the plans for graphs that have been seen, by signature, and how often each graph was seen.
        slow: called with the parameters that cost a backward pass for each of many residuals, by their positions, and with the
            node by which each enters.
        buffer: memory for matrices.
    """

    def __init__(
        self,
        loss: LeastSquaresLoss,
        plans: dict[object, tuple[Plan, int]],
        slow: Callable[[dict[int, str]], None],
        buffer: Buffer,
    ):
        self._loss, self._plans, self._slow, self._buffer = loss, plans, slow, buffer
        self._index = {id(p): i for i, p in enumerate(loss.parameters)}

    def of(self, here: Residuals, draw: Callable[[Plan, list[Uses]], DrawnRows], check: bool) -> tuple[DrawnRows, Jacobian]:
        """Returns some rows of the residuals, and their Jacobian.

        Args:
            here: the residuals, with their graphs.
            draw: draws the rows, given a plan and the uses of parameters in each term's graph.
            check: whether to check the plan at this step.
        """
        plan = self._plan(here, check)
        rows = draw(plan, self._uses)
        found = self._found(plan, here, rows)
        if found is None:
            plan = self._new_plan(here)
            rows = draw(plan, self._uses)
            found = self._found(plan, here, rows)
            assert found is not None
        return rows, found

    def is_rounding(self, here: Residuals, rows: DrawnRows) -> bool:
        """Returns whether the Jacobian of these rows is no more than its own rounding."""
        u = self._combination(rows)
        right = self._combined(here, rows, u)
        return float(right.norm()) <= NOISE * self._noise(here, rows, u, right)

    def _plan(self, here: Residuals, check: bool) -> Plan:
        """Returns the plan of the residuals' graph, and makes one for a structure that is new."""
        uses = [find_uses(r, self._index) for r in here.values]
        self._loss.check_dtypes(use.operand for each in uses for use in each.uses if use.operand is not None)
        self._uses, self._key = uses, None if any(u.by_value for u in uses) else signature(uses)
        known = None if self._key is None else self._plans.get(self._key)
        if known is None:
            self._loss.check_same(here.values, here, 1e-4)
            return self._new_plan(here)
        plan, times = known[0], known[1] + 1
        self._plans[self._key] = plan, times
        incomplete = any(block.incomplete for block in plan.blocks)
        self._new, self._unchecked = False, incomplete or times & (times - 1) == 0 or check
        return plan

    def _new_plan(self, here: Residuals) -> Plan:
        plan = make_plan(here.values, self._uses, self._loss.parameters)
        self._new = self._unchecked = True
        if self._key is not None:
            if len(self._plans) >= PLANS:
                self._plans.clear()
            self._plans[self._key] = plan, 1
        return plan

    def _found(self, plan: Plan, here: Residuals, rows: DrawnRows) -> Jacobian | None:
        """Returns the Jacobian of these rows; None: a plan that was right before is wrong now."""
        parameters = self._loss.parameters
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
                if count >= MANY and (2 * self._loss.parameters[p].numel() > count or node == COMPILED):
                    found[p] = node
        return found

    def _wrong(self, here: Residuals, rows: DrawnRows, found: Jacobian) -> list[int]:
        """Returns the parameters whose columns disagree with one backward pass for a random combination of the rows.

        Where derivatives cancel out no two ways of computing them agree: what is no more than the rounding of autograd's own way
        is no disagreement.
        """
        sizes = [p.numel() for p in self._loss.parameters]
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

    def _noise(self, here: Residuals, rows: DrawnRows, u: Tensor, combined: Tensor) -> float:
        """Returns how far J^T u is from what autograd finds from multiples of u, which is its rounding."""
        return max(float((self._combined(here, rows, k * u) / k - combined).norm()) for k in AGAIN)
