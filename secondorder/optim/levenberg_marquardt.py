"""LevenbergMarquardt: exact Gauss-Newton steps for losses that are sums of squares."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from secondorder._tape.jacobian import Plan
from secondorder._warnings import warn
from secondorder.errors import NonFiniteError
from secondorder.optim._closure import idle_backward
from secondorder.optim._numbers import check_arguments, check_numbers
from secondorder.optim._optimizer import SecondOrderOptimizer
from secondorder.stepping.damped_least_squares import SOLVERS
from secondorder.stepping.gauss_newton_step import GaussNewtonStep, Progress, Settings
from secondorder.stepping.least_squares_loss import LeastSquaresLoss

_NUMBERS = {"lr": (lambda v: 0 < v < 2, "in (0, 2)"), "damping": (lambda v: 0 < v < math.inf, "> 0")}


class LevenbergMarquardt(SecondOrderOptimizer):
    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1.0,
        *,
        rows: int | None = 300,
        max_rows: int | None = None,
        acceleration: bool = True,
        damping: float = 1e-3,
        race: bool = True,
        solver: str = "auto",
        memory: int = 2**30,
        seed: int = 0,
        nonfinite: str = "error",
    ):
        name = type(self).__name__
        check_numbers(name, {"lr": lr, "damping": damping}, _NUMBERS)
        counts = [("rows", rows), ("max_rows", max_rows)]
        checks: list[tuple[str, Any, bool, str]] = [
            (key, value, value is None or (type(value) is int and value >= 1), "to be an int >= 1, or None") for key, value in counts
        ]
        checks += [
            ("solver", solver, solver in SOLVERS, f"one of {', '.join(map(repr, SOLVERS))}"),
            ("memory", memory, memory >= 0, ">= 0"),
            ("nonfinite", nonfinite, nonfinite in ("error", "skip"), "'error' or 'skip'"),
        ]
        check_arguments(name, checks)
        self._settings = Settings(rows or math.inf, max_rows or math.inf, acceleration, solver, memory)
        self._damping, self._race, self._seed, self._nonfinite = damping, race, seed, nonfinite
        self._plans: dict[object, Plan] = {}
        self._told: set[int] = set()
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:  # type: ignore[override]
        name = type(self).__name__
        if closure is None:
            raise RuntimeError(
                f"{name}.step(): expected a closure, since the loss is needed at several points: a function that computes the loss "
                "and returns it; it may call optimizer.zero_grad() and loss.backward(), which do nothing here"
            )
        parameters = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        state = self.state[self.param_groups[0]["params"][0]]
        generator = torch.Generator().manual_seed(self._seed)
        if "generator" in state:
            generator.set_state(state["generator"])
        before = [p.detach().clone() for p in parameters]
        loss = LeastSquaresLoss(name, closure, parameters)
        try:
            with idle_backward():
                here = loss.here()
                value = here.loss.detach().clone()
                if not math.isfinite(value):
                    raise NonFiniteError(f"{name}.step(): the loss is {float(value)}; no parameter and no state has changed")
                run = GaussNewtonStep(loss, self._settings, self._plans, generator, self._lr(parameters), self._slow)
                if "damping" in state:
                    progress = run.step(here, Progress(**{f.name: state[f.name] for f in fields(Progress)}))[1]
                elif self._race:
                    progress = run.race(here, self._damping)[1]
                else:
                    rows = sum(r.numel() for r in here.values)
                    progress = run.step(here, Progress(self._damping / min(rows, self._settings.rows), self._settings.rows))[1]
        except BaseException as error:
            for p, old in zip(parameters, before, strict=True):
                p.copy_(old)
            if isinstance(error, NonFiniteError) and self._nonfinite == "skip":
                state["skipped"] = state.get("skipped", 0) + 1
                return torch.tensor(math.nan)
            raise
        loss.leave()
        state.update(asdict(progress), generator=generator.get_state(), step=state.get("step", 0) + 1)
        return value

    def _lr(self, parameters: list[Tensor]) -> float | Tensor:
        rates = {id(p): float(group["lr"]) for group in self.param_groups for p in group["params"]}
        each = [rates[id(p)] for p in parameters]
        if len(set(each)) == 1:
            return each[0]
        return torch.cat([torch.full((p.numel(),), rate, dtype=p.dtype, device=p.device) for p, rate in zip(parameters, each)])

    def _slow(self, parameter: int, node: str) -> None:
        if parameter not in self._told:
            self._told.add(parameter)
            warn(f"slow {parameter} {node}")
