"""LevenbergMarquardt and EigenAdam untuned against peers at their best settings: errors of solutions, and seconds to errors.

A run's error is the relative L2 error |u - solution| / |solution|, on points of its own. A peer's setting is the one
of the lowest training loss with the first seed, as everywhere in `bench.experiments`.
"""

import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import secondorder as so
from bench import peers
from bench.experiments.comparison import Best, row
from bench.experiments.harness import Method, Run, Store, best_runs, grid
from bench.experiments.physics import PROBLEMS
from bench.experiments.physics.problem import Physics
from bench.experiments.pictures import panels
from bench.experiments.training import study

NAME = "physics"
RESULTS = "pinn_errors.jsonl"
ERRORS = (1e-3, 1e-4, 1e-5, 1e-6)
SHOWN = ("Poisson 2-D", "heat", "Kovasznay flow", "Burgers")


def _lbfgs(model: nn.Module, _: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(
        model.parameters(), history_size=100, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )


def _adam(model: nn.Module, _: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr, fused=True)


def _kbfgs(model: nn.Module, criterion: nn.Module, lr: float, damping: float) -> torch.optim.Optimizer:
    return so.KBFGS(model, criterion, lr, damping=damping, scale=None, max_step=None)


FALLING = grid(lr=[1e-3, 3e-3, 1e-2, 3e-2], linear=[1.0])
METHODS = [
    Method("LevenbergMarquardt", lambda model, _: so.LevenbergMarquardt(model.parameters())),
    Method("L-BFGS", _lbfgs),
    Method("Adam", _adam, FALLING),
    Method("SOAP", lambda model, _, lr: peers.soap(model, lr), FALLING),
    Method("EigenAdam", lambda model, _: so.EigenAdam(model)),
    Method("K-BFGS", _kbfgs, grid(lr=[0.1, 0.3], damping=[0.3, 1.0])),
]
REGRESSION = "torch-levenberg-marquardt"  # which takes examples and targets alone


def methods_for(problem: Physics) -> list[Method]:
    """All, and where examples are fitted torch-levenberg-marquardt, if it is installed."""
    examples = problem.equation().examples
    if examples is None or not peers.has_torch_levenberg_marquardt():
        return METHODS
    return [*METHODS, Method(REGRESSION, lambda model, _: peers.TorchLevenbergMarquardt(model, *examples))]


def chosen_problems(names: list[str] | None) -> list[Physics]:
    """Those with these names, or all; ValueError where there is none with one of them."""
    if unknown := set(names or []) - {problem.name for problem in PROBLEMS}:
        raise ValueError(f"expected problems of {[problem.name for problem in PROBLEMS]}, got {sorted(unknown)}")
    return [problem for problem in PROBLEMS if not names or problem.name in names]


def compare(
    results: Path,
    seeds: list[int],
    share: float = 1.0,
    only: list[str] | None = None,
    again: bool = False,
    chosen: list[str] | None = None,
) -> str:
    """Trains what is not stored yet, problem by problem; returns the tables, which `only` leaves out.

    Args:
        results: the folder of the stored runs.
        seeds: the first one chooses settings.
        share: of each problem's seconds.
        only: these methods alone.
        again: forget their stored runs first.
        chosen: these problems alone.

    Raises:
        ValueError: one of the chosen problems is none of this experiment's.
    """
    problems, store, runs = chosen_problems(chosen), Store(results / RESULTS), []
    for problem in problems:
        methods = [method for method in methods_for(problem) if not only or method.name in only]
        if again:
            names = {method.name for method in methods}
            store.forget(lambda run, name=problem.name, names=names: run.problem == name and run.method in names)
        runs += study([problem], methods, seeds, store, None, share)
    return "" if only else tables(problems, best_runs(runs))


def stored(results: Path, share: float = 1.0, chosen: list[str] | None = None) -> str:
    """The tables of what is stored of the chosen problems for these seconds, without training."""
    seconds = {problem.name: problem.seconds * share for problem in chosen_problems(chosen)}
    order = [method.name for method in METHODS] + [REGRESSION]
    runs = [run for run in Store(results / RESULTS).runs() if run.budget == seconds.get(run.problem)]
    runs.sort(key=lambda run: (run.seed, order.index(run.method)))
    best = best_runs(runs)
    return tables([problem for problem in PROBLEMS if problem.name in best], best)


def picture(results: Path, path: Path) -> None:
    """Draws the errors of stored runs of some problems against seconds."""
    best = best_runs([run for run in Store(results / RESULTS).runs() if run.problem in SHOWN])
    panels({name: best[name] for name in SHOWN if name in best}, path, 4, "relative L2 error", lambda run: run.score)


def _final_error(run: Run) -> float:
    return math.inf if run.diverged else run.score[-1]


def _table(
    title: str, budgets: dict[str, float], problems: list[Physics], methods: list[str], cell: Callable[[Physics, str], str]
) -> str:
    """A line per problem, with its seconds, and a column per method."""
    lines = [row([title, "s", *methods]), "|---" * (len(methods) + 2) + "|"]
    lines += [row([p.name, f"{budgets[p.name]:g}", *(cell(p, method) for method in methods)]) for p in problems]
    return "\n".join(lines)


def tables(problems: list[Physics], best: dict[str, Best]) -> str:
    """Markdown: errors, seconds to errors, coefficients, training losses and steps; then what was trained, and where."""
    methods = list(dict.fromkeys(method for problem in problems for method in best[problem.name]))

    def of_runs(show: Callable[[list[Run]], str]) -> Callable[[Physics, str], str]:
        return lambda problem, method: show(runs) if (runs := best[problem.name].get(method)) else ""

    def error(problem: Physics, method: str) -> str:
        medians = {name: statistics.median(map(_final_error, runs)) for name, runs in best[problem.name].items()}
        if method not in medians:
            return ""
        text = significant(list(map(_final_error, best[problem.name][method])))
        return f"**{text}**" if medians[method] == min(medians.values()) < math.inf else text

    def seconds(runs: list[Run]) -> str:
        reached = [statistics.median(run.seconds_to_score(goal) for run in runs) for goal in ERRORS]
        return " / ".join("-" if time == math.inf else f"{time:.2g}" for time in reached)

    def loss_and_steps(runs: list[Run]) -> str:
        setting = ", ".join("falling" if key == "linear" else f"{key} {value:g}" for key, value in runs[0].setting.items())
        parts = [significant([run.final for run in runs]), f"{statistics.median(run.steps[-1] for run in runs):.0f}", setting]
        return "; ".join(filter(None, parts))

    first = {problem.name: next(iter(best[problem.name].values()))[0] for problem in problems}
    goals = " / ".join(f"1e{round(math.log10(goal))}" for goal in ERRORS)
    budgets = {name: run.budget for name, run in first.items()}
    parts = [
        _table("relative L2 error", budgets, problems, methods, error),
        _table(f"seconds to errors of {goals}", budgets, problems, methods, of_runs(seconds)),
        _table("training loss; steps; setting", budgets, problems, methods, of_runs(loss_and_steps)),
    ]
    unknown = [p for p in problems if any(run.more for runs in best[p.name].values() for run in runs)]
    if unknown:
        coefficient = of_runs(lambda runs: significant([run.more["coefficient"][-1] for run in runs]))
        parts.insert(1, _table("relative error of the coefficient", budgets, unknown, methods, coefficient))
    parts.append("\n".join(f"- {problem.name}: {problem.description}; {first[problem.name].data}." for problem in problems))
    machines = sorted({run.environment for runs in best.values() for each in runs.values() for run in each})
    return "\n\n".join([*parts, f"Measured on: {'; '.join(machines)}."])


def significant(values: list[float]) -> str:
    """Median and range, two digits each."""
    shown = [f"{v:.1e}" if math.isfinite(v) else "diverged" for v in (statistics.median(values), min(values), max(values))]
    return shown[0] if len(values) == 1 else f"{shown[0]} ({shown[1]} to {shown[2]})"
