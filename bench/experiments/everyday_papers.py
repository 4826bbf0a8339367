"""The papers' methods at their defaults on everyday scripts, which nobody wrote for them: which run, and where they end."""

import math
import statistics
from pathlib import Path

import secondorder as so
from bench.experiments import comparison
from bench.experiments.eigen_adam import METHODS as PEERS
from bench.experiments.everyday import SCRIPTS
from bench.experiments.harness import Method, Run, Store, best_runs
from bench.experiments.training import study

NAME = "everyday-papers"
_ADAM = next(method for method in PEERS if method.name == "Adam")
METHODS = [
    _ADAM,
    Method("EACG", lambda model, criterion: so.EACG(model, criterion), guest=True),
    Method("LayerwiseNewton", lambda model, criterion: so.LayerwiseNewton(model, criterion), guest=True),
    Method("KFAC", lambda model, criterion: so.KFAC(model, criterion), guest=True),
    Method("KBFGS", lambda model, criterion: so.KBFGS(model, criterion), guest=True),
]


def compare(path: Path, seeds: list[int], share: float = 1.0, only: list[str] | None = None, again: bool = False) -> str:
    """Trains what is not stored yet; returns the tables, which `only` leaves out.

    Args:
        path: of the stored runs.
        seeds: the first one chooses Adam's setting.
        share: of each script's seconds.
        only: these methods alone.
        again: forget their stored runs first.
    """
    methods = [method for method in METHODS if not only or method.name in only]
    store = Store(path)
    if again:
        store.forget(lambda run: run.method in [method.name for method in methods])
    runs = study(SCRIPTS, methods, seeds, store, None, share)
    return "" if only else tables(best_runs(runs))


def tables(best: dict[str, comparison.Best]) -> str:
    """Markdown: how many scripts each method trains, then a line per script."""
    own = [method.name for method in METHODS if method is not _ADAM]
    scripts = {script.name: script for script in SCRIPTS if script.name in best}
    columns = ["", "runs", "ends below its start", "no higher than Adam", "loss ratio to Adam, mean of those that run", "refused"]
    lines = [comparison.row(columns), "|---" * len(columns) + "|"]
    counted = [name for name, script in scripts.items() if not script.noise]
    ratios = {
        method: {
            name: comparison.paired(comparison.loss_ratio, best[name][method], best[name]["Adam"], scripts[name].signed)
            for name in scripts
        }
        for method in own
    }
    for method in own:
        ran = [name for name in scripts if not any(run.diverged for run in best[name][method])]
        below = sum(_median(best[name][method], -1) < _median(best[name][method], 0) for name in ran)
        level = sum(name in ran and ratios[method][name] <= 1 for name in counted)
        mean = comparison.geometric_mean([ratios[method][name] for name in counted if name in ran] or [math.nan])
        refused = [name for name in scripts if name not in ran]
        cells = [method, f"{len(ran)} of {len(scripts)}", f"{below} of {len(ran)}", f"{level} of {len(counted)}", f"{mean:.2f}"]
        lines.append(comparison.row([*cells, ", ".join(refused) or "-"]))
    head = ["loss ratio to Adam", "s", "Adam's loss", *own]
    lines += ["", comparison.row(head), "|---" * len(head) + "|"]
    for name in scripts:
        adam = best[name]["Adam"]
        cells = [name, f"{adam[0].budget:g}", f"{_median(adam, -1):.4g}"]
        for method in own:
            stopped = next((run.diverged for run in best[name][method] if run.diverged), "")
            cells.append("-" if stopped else f"{ratios[method][name]:.3g}")
        lines.append(comparison.row(cells))
    reasons = dict.fromkeys(
        f"{method}, {name}: {run.diverged}" for name in scripts for method in own for run in best[name][method] if run.diverged
    )
    machines = sorted({run.environment for methods in best.values() for each in methods.values() for run in each})
    return "\n".join([*lines, "", *(f"- {reason}" for reason in reasons), "", f"Measured on: {'; '.join(machines)}."])


def _median(runs: list[Run], position: int) -> float:
    return statistics.median(run.loss[position] for run in runs)
