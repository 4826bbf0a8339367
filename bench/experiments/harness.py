"""One way of doing an experiment: every method on every problem for the same seconds, stored run by run.

A method with a grid runs all of it with the first seed, and its best setting, by the training loss at the end, with the others.
A finished run is a line of the results file; what is there already is not run again. `training` does the runs.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from functools import lru_cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.data import Dataset

EVALUATED = 2000  # instances at most, of the training and of the test set

Setting = dict[str, float]


@dataclass
class Task:
    """What one run trains, and how it is measured."""

    data: str  # the name
    model: nn.Module
    batches: Iterator[Any]  # without end
    loss: Callable[[Any], Tensor]  # of a batch
    evaluate: Callable[[], tuple[float, float]]  # training loss and score
    steps_per_epoch: float
    criterion: nn.Module | None = None  # for optimizers that ask for it
    inputs: Callable[[], Sequence[Tensor]] = tuple  # the training set's, in batches
    more: Callable[[], dict[str, float]] = dict  # further scores by their names


@dataclass(frozen=True, eq=False)
class Problem:
    """What methods are compared on."""

    name: str
    description: str
    _: KW_ONLY
    seconds: float  # of training, for each run
    score_name: str
    higher: bool = False  # scores are the better ones; otherwise they are errors
    signed: bool = False  # losses may be below zero
    epochs: float = math.inf  # a run ends after so many, if the seconds last
    evaluations: int = 16  # of a run

    def begin(self, data_dir: Path | None, seed: int) -> Task:
        """Makes what a run trains; torch's generator has been seeded."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Supervised(Problem):
    """A data set, a net, a criterion."""

    data: Callable[[Path | None], Dataset]
    model: Callable[[], nn.Module]
    criterion: Callable[[], nn.Module]
    batch: int
    score: Callable[[Tensor, Tensor], float]  # of outputs and targets of the test set
    _: KW_ONLY
    log_loss: bool = True  # axes of pictures
    log_score: bool = False
    summed: bool = False  # the criterion sums over instances: the loss is its value per instance

    def begin(self, data_dir: Path | None, seed: int) -> Task:
        data, model, criterion = _loaded(self.data, data_dir), self.model(), self.criterion()

        def loss_of(output: Tensor, target: Tensor) -> Tensor:
            value = criterion(output, target)
            return value / len(output) if self.summed else value

        @torch.no_grad()
        def evaluate() -> tuple[float, float]:
            model.eval()
            x, y = data.train_x[:EVALUATED], data.train_y[:EVALUATED]
            loss = loss_of(model(x), y).item()
            score = self.score(model(data.test_x[:EVALUATED]), data.test_y[:EVALUATED])
            model.train()
            return loss, score

        return Task(
            data.name,
            model,
            batches((data.train_x, data.train_y), self.batch, seed),
            lambda batch: loss_of(model(batch[0]), batch[1]),
            evaluate,
            len(data.train_x) / self.batch,
            criterion,
            lambda: data.train_x.split(self.batch),
        )


@lru_cache(maxsize=2)
def _loaded(load: Callable[[Path | None], Dataset], data_dir: Path | None) -> Dataset:
    return load(data_dir)


def batches(tensors: tuple[Tensor, ...], size: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Shuffled batches without end; what is too little for a batch at an epoch's end is left out."""
    order = torch.Generator().manual_seed(seed)
    n = len(tensors[0])
    while True:
        for rows in torch.randperm(n, generator=order).split(size):
            if len(rows) == min(size, n):
                yield tuple(tensor[rows] for tensor in tensors)


@dataclass(frozen=True, eq=False)
class Method:
    """An optimizer and the settings to choose from.

    Two keys of a setting are not the optimizer's: with `halve` the learning rate is halved whenever this fraction of the seconds
    has passed, with `linear` it falls linearly to zero at their end.
    """

    name: str
    make: Callable[..., torch.optim.Optimizer]  # of the model, the criterion and a setting
    grid: tuple[Setting, ...] = ({},)
    guest: bool = False  # on problems that were not made for it: has a closure to call, and what it refuses ends its run


@dataclass
class Run:
    """One training run, with a value per evaluation."""

    problem: str
    method: str
    setting: Setting
    seed: int
    budget: float
    data: str
    environment: str
    diverged: str = ""  # the error's message
    steps: list[int] = field(default_factory=list)
    epochs: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    more: dict[str, list[float]] = field(default_factory=dict)  # further scores by their names

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it this run."""
        return self.problem, self.method, tuple(sorted(self.setting.items())), self.seed, self.budget

    @property
    def final(self) -> float:
        """The last training loss; infinite where the run diverged."""
        return math.inf if self.diverged else self.loss[-1]

    def seconds_to(self, loss: float) -> float:
        """When the training loss first was at most this, linearly between evaluations; infinite if never."""
        return _time_of(loss, self.seconds, self.loss)

    def seconds_to_score(self, score: float) -> float:
        """Likewise for scores that are errors."""
        return _time_of(score, self.seconds, self.score)


def _time_of(goal: float, seconds: list[float], values: list[float]) -> float:
    if values and values[0] <= goal:
        return seconds[0]
    for (t0, t1), (v0, v1) in zip(pairwise(seconds), pairwise(values), strict=True):
        if v1 <= goal:
            return t0 + (t1 - t0) * (v0 - goal) / (v0 - v1)
    return math.inf


def grid(**values: list[float]) -> tuple[Setting, ...]:
    """All combinations."""
    return tuple(dict(zip(values, combination)) for combination in product(*values.values()))


class Store:
    """A JSON Lines file of runs; appended to line by line, so several processes may write to it."""

    def __init__(self, path: Path):
        self.path = path

    def runs(self) -> list[Run]:
        """What is stored; of runs with the same key the last."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return list({run.key: run for run in (Run(**json.loads(line)) for line in lines)}.values())

    def add(self, run: Run) -> None:
        """Appends one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(run)) + "\n")

    def forget(self, chosen: Callable[[Run], bool]) -> None:
        """Deletes the chosen runs."""
        kept = [run for run in self.runs() if not chosen(run)]
        self.path.write_text("".join(json.dumps(asdict(run)) + "\n" for run in kept))


def best_runs(runs: list[Run]) -> dict[str, dict[str, list[Run]]]:
    """{problem: {method: its best setting's runs, one per seed}}."""
    chosen: dict[str, dict[str, list[Run]]] = {}
    for problem, method in dict.fromkeys((run.problem, run.method) for run in runs):
        group = [run for run in runs if (run.problem, run.method) == (problem, method)]
        first = [run for run in group if run.seed == group[0].seed]
        setting = min(first, key=lambda run: run.final).setting
        chosen.setdefault(problem, {})[method] = [run for run in group if run.setting == setting]
    return chosen


def table(problem: Problem, methods: dict[str, list[Run]]) -> str:
    """Markdown: a line per method; medians over seeds, with their range.

    The last column is the time to the first method's final loss over that method's time, both medians.
    """
    reference = next(iter(methods))
    goal = statistics.median(run.final for run in methods[reference])
    lines = [
        f"| {problem.name} | setting | training loss | {problem.score_name} | steps | time to {reference}'s loss |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in methods.items():
        reached = statistics.median(run.seconds_to(goal) for run in runs) / runs[0].budget
        cells = [
            name,
            ", ".join(f"{key} {value:.3g}" for key, value in runs[0].setting.items()) or "defaults",
            spread([run.final for run in runs]),
            spread([run.score[-1] for run in runs]),
            f"{statistics.median(run.steps[-1] for run in runs):.0f}",
            "-" if name == reference else f"{reached:.2f}" if reached <= 1 else "not reached",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def overview(problems: list[Problem], best: dict[str, dict[str, list[Run]]], method: str) -> str:
    """Markdown: a line per problem for one method."""
    lines = ["| problem | training loss, start | end | score | diverged |", "|---|---|---|---|---|"]
    for problem in problems:
        runs = best[problem.name][method]
        cells = [
            problem.name,
            f"{statistics.median(run.loss[0] for run in runs):.4g}",
            spread([run.final for run in runs]),
            f"{problem.score_name}: {spread([run.score[-1] for run in runs])}",
            f"{sum(bool(run.diverged) for run in runs)} of {len(runs)}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def matrices(problem: Problem, best: dict[str, list[Run]]) -> str:
    """Markdown: for methods named "COLUMN, ROW", a table each of final loss, score and seconds; medians over seeds."""
    columns, rows = (list(dict.fromkeys(name.split(", ")[i] for name in best)) for i in (0, 1))
    values: dict[str, Callable[[Run], float]] = {
        "training loss": lambda run: run.final,
        problem.score_name: lambda run: run.score[-1],
        "CPU seconds": lambda run: run.seconds[-1],
    }
    tables = []
    for title, value in values.items():
        lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for row in rows:
            runs = [best[f"{column}, {row}"] for column in columns]
            cells = [
                "diverged" if any(run.diverged for run in own) else f"{statistics.median(map(value, own)):.3g}" for own in runs
            ]
            lines.append(f"| {row} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def spread(values: list[float]) -> str:
    """Median and range."""
    finite = [f"{v:.4g}" if math.isfinite(v) else "diverged" for v in (statistics.median(values), min(values), max(values))]
    alone = len(values) == 1 or not any(map(math.isfinite, values))
    return finite[0] if alone else f"{finite[0]} ({finite[1]} to {finite[2]})"
