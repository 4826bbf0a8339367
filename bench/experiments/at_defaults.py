"""The package's optimizers at their defaults against a tuned Adam: which run on a problem, how fast, and where they end."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import secondorder as so
from bench.experiments import comparison
from bench.experiments.eigen_adam import METHODS as TUNED
from bench.experiments.eigen_adam import PAPERS
from bench.experiments.everyday import SCRIPTS
from bench.experiments.everyday.script import Script
from bench.experiments.harness import Method, Problem, Run, Store, best_runs
from bench.experiments.training import study

EIGEN, ADAM = (next(method for method in TUNED if method.name == name) for name in ("EigenAdam", "Adam"))


def _own(optimizer: Callable[..., torch.optim.Optimizer]) -> Method:
    return Method(optimizer.__name__, lambda model, criterion: optimizer(model, criterion), guest=True)


@dataclass(frozen=True)
class Comparison:
    """Which optimizers take part on which problems; `results` is the file's stem."""

    results: str
    problems: list[Problem]
    optimizers: list[Method]

    @property
    def methods(self) -> list[Method]:
        return [ADAM, *self.optimizers]


COMPARISONS = {
    "package": Comparison(
        "package",
        PAPERS,
        [EIGEN, *map(_own, (so.EACG, so.LayerwiseNewton, so.KFAC, so.KFRA, so.KFLR, so.KBFGS, so.KBFGSL))],
    ),
    "everyday-papers": Comparison(
        "everyday_papers", list(SCRIPTS), [*map(_own, (so.EACG, so.LayerwiseNewton, so.KFAC, so.KBFGS))]
    ),
}


def compare(
    name: str,
    results: Path,
    data_dir: Path | None,
    seeds: list[int],
    share: float = 1.0,
    only: list[str] | None = None,
    again: bool = False,
) -> str:
    """Trains what is not stored yet; returns the tables, which `only` leaves out.

    Args:
        name: of the comparison.
        results: the folder of the stored runs.
        data_dir: see `bench.data`.
        seeds: the first one chooses Adam's setting.
        share: of each problem's seconds.
        only: these methods alone.
        again: forget their stored runs first.
    """
    own = COMPARISONS[name]
    methods = [method for method in own.methods if not only or method.name in only]
    store = Store(results / f"{own.results}.jsonl")
    if again:
        store.forget(lambda run: run.method in [method.name for method in methods])
    runs = study(own.problems, methods, seeds, store, data_dir, share)
    return "" if only else tables(own, best_runs(runs))


def tables(own: Comparison, best: dict[str, comparison.Best]) -> str:
    """Markdown: how many problems each method trains and how fast, then a line per problem."""
    names = [method.name for method in own.optimizers]
    problems = {problem.name: problem for problem in own.problems if problem.name in best}
    columns = [
        "", "runs", "ends below its start", "time ratio to Adam, mean of those that run", "ahead on", "loss ratio, mean", "worst",
        "better score on", "refused",
    ]  # fmt: skip
    lines = [comparison.row(columns), "|---" * len(columns) + "|"]
    counted = [name for name, problem in problems.items() if not (isinstance(problem, Script) and problem.noise)]

    def of(value: Callable[..., float], method: str, name: str, option: bool) -> float:
        return comparison.paired(value, best[name][method], best[name]["Adam"], option)

    for method in names:
        ran = [name for name in problems if not any(run.diverged for run in best[name][method])]
        judged = [name for name in counted if name in ran]
        below = sum(_median(best[name][method], -1) < _median(best[name][method], 0) for name in ran)
        times = [of(comparison.time_ratio, method, name, problems[name].signed) for name in judged]
        losses = {name: of(comparison.loss_ratio, method, name, problems[name].signed) for name in judged}
        scores = [
            (of(comparison.score_difference, method, name, p.higher), p.higher) for name in judged for p in [problems[name]]
        ]
        better = sum(difference > 0 if higher else difference < 0 for difference, higher in scores)
        lines.append(
            comparison.row([
                method, f"{len(ran)} of {len(problems)}", f"{below} of {len(ran)}",
                f"{comparison.geometric_mean(times or [math.nan]):.2f}", f"{sum(ratio < 1 for ratio in times)} of {len(judged)}",
                *comparison.mean_and_worst(losses or {"": math.nan}), f"{better} of {len(judged)}",
                ", ".join(name for name in problems if name not in ran) or "-",
            ])
        )  # fmt: skip
    head = ["loss ratio to Adam", "s", "Adam's loss", *names]
    lines += ["", comparison.row(head), "|---" * len(head) + "|"]
    for name, problem in problems.items():
        adam = best[name]["Adam"]
        cells = [name, f"{adam[0].budget:g}", f"{_median(adam, -1):.4g}"]
        for method in names:
            stopped = next((run.diverged for run in best[name][method] if run.diverged), "")
            cells.append("-" if stopped else f"{of(comparison.loss_ratio, method, name, problem.signed):.3g}")
        lines.append(comparison.row(cells))
    reasons: dict[tuple[str, str], tuple[str, list[str]]] = {}  # by method and what was expected: in full, and where
    for name in problems:
        for method in names:
            stopped = next((run.diverged for run in best[name][method] if run.diverged), "")
            if stopped:
                reasons.setdefault((method, stopped.partition("; got")[0].partition(", got")[0]), (stopped, []))[1].append(name)
    told = [f"{method}, {'; '.join(where)}: {reason}" for (method, _), (reason, where) in reasons.items()]
    machines = sorted({run.environment for methods in best.values() for each in methods.values() for run in each})
    return "\n".join([*lines, "", *(f"- {reason}" for reason in told), "", f"Measured on: {'; '.join(machines)}."])


def _median(runs: list[Run], position: int) -> float:
    return statistics.median(run.loss[position] for run in runs)
