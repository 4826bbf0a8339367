"""One way of doing an experiment: every method on every problem for the same seconds, stored run by run.

Seconds are CPU seconds of one thread (`time.process_time`), of the optimizer's steps alone: what else the machine does hardly
enters. A method with a grid runs all of it with the first seed, and its best setting, by the training loss at the end, with the
others. A finished run is a line of the results file; what is there already is not run again.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import secondorder as so
from bench.data import Dataset
from bench.timing import cpu_name

EVALUATIONS = 16  # of a run
EVALUATED = 2000  # instances at most, of the training and of the test set

Setting = dict[str, float]


@dataclass(frozen=True, eq=False)
class Problem:
    """A data set, a net, a criterion."""

    name: str
    description: str
    data: Callable[[Path | None], Dataset]
    model: Callable[[], nn.Module]
    criterion: Callable[[], nn.Module]
    batch: int
    seconds: float  # of training, for each run
    score: Callable[[Tensor, Tensor], float]  # of outputs and targets of the test set
    score_name: str
    log_loss: bool = True  # axes of pictures
    log_score: bool = False
    summed: bool = False  # the criterion sums over instances: the loss is its value per instance
    epochs: float = math.inf  # a run ends after so many, if the seconds last

    def loss(self, criterion: nn.Module, output: Tensor, target: Tensor) -> Tensor:
        """What is trained and shown."""
        value = criterion(output, target)
        return value / len(output) if self.summed else value


@dataclass(frozen=True, eq=False)
class Method:
    """An optimizer and the settings to choose from.

    `halve` in a setting is not the optimizer's: the learning rate is halved whenever this fraction of the seconds has passed.
    """

    name: str
    make: Callable[..., torch.optim.Optimizer]  # of the model, the criterion and a setting
    grid: tuple[Setting, ...] = ({},)


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
        if self.loss and self.loss[0] <= loss:
            return self.seconds[0]
        for (t0, t1), (l0, l1) in zip(pairwise(self.seconds), pairwise(self.loss), strict=True):
            if l1 <= loss:
                return t0 + (t1 - t0) * (l0 - loss) / (l0 - l1)
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


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def environment() -> str:
    """What the seconds were measured on."""
    return f"{cpu_name()}, {so.build_info()['vectors']} vectors, 1 thread, torch {torch.__version__}"


@lru_cache(maxsize=2)
def _data(problem: Problem, data_dir: Path | None) -> Dataset:
    return problem.data(data_dir)


def train(problem: Problem, method: Method, setting: Setting, seed: int, budget: float, data_dir: Path | None) -> Run:
    """Trains for `budget` CPU seconds."""
    data = _data(problem, data_dir)
    _warm_up(problem, method, data_dir)
    torch.manual_seed(seed)
    model, criterion = problem.model(), problem.criterion()
    run = Run(problem.name, method.name, setting, seed, budget, data.name, environment())
    order = torch.Generator().manual_seed(seed)
    steps, elapsed = 0, 0.0

    @torch.no_grad()
    def evaluate() -> None:
        loss = float(problem.loss(criterion, _outputs(model, data.train_x), data.train_y[:EVALUATED]))
        output = _outputs(model, data.test_x)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the training loss is {loss}")
        run.steps.append(steps)
        run.epochs.append(_rounded(steps * problem.batch / len(data.train_x)))
        run.seconds.append(_rounded(elapsed))
        run.loss.append(_rounded(loss))
        run.score.append(_rounded(problem.score(output, data.test_y[:EVALUATED])))

    def batches() -> Iterator[Tensor]:
        while True:
            shuffled = torch.randperm(len(data.train_x), generator=order)
            yield from (rows for rows in shuffled.split(problem.batch) if len(rows) == min(problem.batch, len(shuffled)))

    evaluate()
    setting = dict(setting)
    halve = setting.pop("halve", math.inf) * budget
    try:
        start = time.process_time()
        optimizer = method.make(model, criterion, **setting)
        if isinstance(optimizer, so.KBFGS):
            optimizer.initialize(data.train_x.split(problem.batch))
        elapsed += time.process_time() - start
        rates = [group["lr"] for group in optimizer.param_groups]
        for rows in batches():
            x, y = data.train_x[rows], data.train_y[rows]
            start = time.process_time()
            _step(problem, model, criterion, optimizer, x, y)
            elapsed += time.process_time() - start
            steps += 1
            if elapsed >= halve:
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * 0.5 ** (elapsed // halve)
            done = elapsed >= budget or steps * problem.batch >= problem.epochs * len(data.train_x)
            if done or elapsed >= len(run.seconds) * budget / EVALUATIONS:
                evaluate()
            if done:
                break
    except (FloatingPointError, so.NonFiniteError) as error:
        run.diverged = f"after {steps} steps: {error}"
    return run


def _step(
    problem: Problem, model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss(criterion, model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)


@lru_cache
def _warm_up(problem: Problem, method: Method, data_dir: Path | None) -> None:
    """Two steps that are not counted: what happens once in a process, as imports do, is no part of a run."""
    data, model, criterion = _data(problem, data_dir), problem.model(), problem.criterion()
    setting = {key: value for key, value in min(method.grid, key=lambda s: s.get("lr", 0)).items() if key != "halve"}
    optimizer = method.make(model, criterion, **setting)
    with suppress(so.NonFiniteError):  # it diverges: that is for the runs to tell
        for _ in range(2):
            _step(problem, model, criterion, optimizer, data.train_x[: problem.batch], data.train_y[: problem.batch])


@torch.no_grad()
def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    output = model(x[:EVALUATED])
    model.train()
    return output


def study(
    problems: list[Problem], methods: list[Method], seeds: list[int], store: Store, data_dir: Path | None, share: float = 1.0
) -> list[Run]:
    """Does what is not stored yet; every run of these problems and methods.

    Args:
        problems: see the module.
        methods: likewise.
        seeds: the first one chooses each method's setting.
        store: where runs are kept.
        data_dir: see `bench.data`.
        share: of each problem's seconds.
    """
    torch.set_num_threads(1)
    done = {run.key: run for run in store.runs()}
    total = len(problems) * sum(len(method.grid) + len(seeds) - 1 for method in methods)
    wanted = []
    with tqdm(total=total, mininterval=2) as bar:
        for problem, method in product(problems, methods):

            def once(setting: Setting, seed: int, problem: Problem = problem, method: Method = method) -> Run:
                budget = problem.seconds * share
                key = Run(problem.name, method.name, setting, seed, budget, "", "").key
                bar.set_description(f"{problem.name}, {method.name}, {setting or 'defaults'}, seed {seed}")
                if key not in done:
                    done[key] = train(problem, method, setting, seed, budget, data_dir)
                    store.add(done[key])
                wanted.append(done[key])
                bar.update()
                return done[key]

            best = min((once(setting, seeds[0]) for setting in method.grid), key=lambda run: run.final)
            for seed in seeds[1:]:
                once(best.setting, seed)
    return wanted


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
