"""Training runs that take turns, each from one evaluation to its next, on one thread.

All runs of a problem with one seed are under way at once, so that whatever else the machine does meets every method alike. What
counts are CPU seconds (`time.process_time`) of the optimizer's steps: zero_grad, forward, loss, backward, step. Batches and
evaluations do not count.
"""

import math
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import secondorder as so
from bench.experiments.harness import Method, Problem, Run, Setting, Store, Task
from bench.peers import ClosedOptimizer
from bench.timing import cpu_name

CLOSURES = torch.optim.LBFGS | so.KBFGS | so.LevenbergMarquardt | ClosedOptimizer  # steps that evaluate the loss themselves
SCHEDULES = ("halve", "linear")
# What a method may fail with that is its own doing: not a fault of the experiment.
DIVERGED = (FloatingPointError, so.NonFiniteError, torch.linalg.LinAlgError)
REFUSED = (*DIVERGED, TypeError, ValueError, RuntimeError)  # a guest's


def environment() -> str:
    """What the seconds were measured on."""
    built = so.build_info()
    kernels = f"{built['vectors']} vectors" if built["extension"] else "without the extension"
    return f"{cpu_name()}, {kernels}, 1 thread, torch {torch.__version__}"


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _step(task: Task, optimizer: torch.optim.Optimizer, batch: Any, closure: bool = False) -> None:
    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = task.loss(batch)
        loss.backward()
        return loss

    if closure or isinstance(optimizer, CLOSURES):
        optimizer.step(evaluate)
    else:
        evaluate()
        optimizer.step()


def _failures(method: Method) -> tuple[type[Exception], ...]:
    """What ends a run of a method, and is kept with it."""
    return REFUSED if method.guest else DIVERGED


@contextmanager
def _hush(guest: bool) -> Iterator[None]:
    """Within it a guest's warnings, of what is not as it expects, are not shown."""
    with warnings.catch_warnings():
        if guest:
            warnings.simplefilter("ignore")
        yield


@contextmanager
def _averaged(optimizer: Any) -> Iterator[None]:
    """Within it the model has the parameters that are to be evaluated, which Schedule-Free has to be asked for."""
    switches = hasattr(optimizer, "eval")
    if switches:
        optimizer.eval()
    yield
    if switches:
        optimizer.train()


@lru_cache
def _warm_up(problem: Problem, method: Method, data_dir: Path | None) -> None:
    """Two steps that are not counted: what happens once in a process, as imports do, is no part of a run."""
    task = problem.begin(data_dir, 0)
    setting = {key: value for key, value in min(method.grid, key=lambda s: s.get("lr", 0)).items() if key not in SCHEDULES}
    with suppress(*_failures(method)), _hush(method.guest):  # that is for the runs to tell
        optimizer = method.make(task.model, task.criterion, **setting)
        for _ in range(2):
            _step(task, optimizer, next(task.batches), method.guest)


class Training:
    """A run under way, with a state of the random generator of its own."""

    def __init__(
        self, problem: Problem, method: Method, setting: Setting, seed: int, budget: float, data_dir: Path | None
    ) -> None:
        _warm_up(problem, method, data_dir)
        torch.manual_seed(seed)
        self.problem, self.guest = problem, method.guest
        self.failures = _failures(method)
        self.task = problem.begin(data_dir, seed)
        self.run = Run(problem.name, method.name, setting, seed, budget, self.task.data, environment())
        self.last_step = problem.epochs * self.task.steps_per_epoch
        self.steps, self.elapsed, self.done = 0, 0.0, False
        self.optimizer: torch.optim.Optimizer | None = None
        self._evaluate()
        options = {key: value for key, value in setting.items() if key not in SCHEDULES}
        start = time.process_time()
        try:
            self.optimizer = method.make(self.task.model, self.task.criterion, **options)
        except self.failures as error:
            self.run.diverged, self.done = str(error), True
            return
        if isinstance(self.optimizer, so.KBFGS) and not self.guest:
            self.optimizer.initialize(self.task.inputs())
        self.elapsed += time.process_time() - start
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.random = torch.get_rng_state()

    def advance(self) -> None:
        """Trains up to the next evaluation."""
        torch.set_rng_state(self.random)
        try:
            until = len(self.run.seconds) * self.run.budget / self.problem.evaluations
            with _hush(self.guest):
                while not self.done:
                    batch = next(self.task.batches)
                    start = time.process_time()
                    _step(self.task, self.optimizer, batch, self.guest)
                    self.elapsed += time.process_time() - start
                    self.steps += 1
                    self._schedule()
                    self.done = self.elapsed >= self.run.budget or self.steps >= self.last_step
                    if self.elapsed >= until:
                        break
            self._evaluate()
        except self.failures as error:
            self.run.diverged, self.done = f"after {self.steps} steps: {error}", True
        self.random = torch.get_rng_state()

    def _schedule(self) -> None:
        """Sets the learning rate where the setting says how it falls, by the seconds gone."""
        gone = self.elapsed / self.run.budget
        if "halve" in self.run.setting:
            factor = 0.5 ** (gone // self.run.setting["halve"])
        elif "linear" in self.run.setting:
            factor = max(0.0, 1 - gone)
        else:
            return
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = factor * rate

    def _evaluate(self) -> None:
        with torch.random.fork_rng(devices=[]), _averaged(self.optimizer):
            loss, score = self.task.evaluate()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the training loss is {loss}")
        self.run.steps.append(self.steps)
        self.run.epochs.append(_rounded(self.steps / self.task.steps_per_epoch))
        self.run.seconds.append(_rounded(self.elapsed))
        self.run.loss.append(_rounded(loss))
        self.run.score.append(_rounded(score))
        for name, value in self.task.more().items():
            self.run.more.setdefault(name, []).append(_rounded(value))


def take_turns(trainings: list[Training]) -> list[Run]:
    """Lets each go on to its next evaluation, in turn, until all have ended."""
    while under_way := [training for training in trainings if not training.done]:
        for training in under_way:
            training.advance()
    return [training.run for training in trainings]


def study(
    problems: list[Problem],
    methods: list[Method],
    seeds: list[int],
    store: Store,
    data_dir: Path | None,
    share: float = 1.0,
    pilot: float = 1.0,
) -> list[Run]:
    """Does what is not stored yet; every run of these problems and methods that is not a pilot.

    Args:
        problems: see `bench.experiments.harness`.
        methods: likewise.
        seeds: the first one chooses each method's setting, by the training loss at the end.
        store: where runs are kept.
        data_dir: see `bench.data`.
        share: of each problem's seconds.
        pilot: below 1, settings are chosen by runs of this share of those seconds, of the methods that have several.
    """
    torch.set_num_threads(1)
    done = {run.key: run for run in store.runs()}
    wanted: list[Run] = []

    def trained(problem: Problem, seed: int, budget: float, settings: dict[Method, tuple[Setting, ...]]) -> list[Run]:
        pairs = [(method, setting) for method, chosen in settings.items() for setting in chosen]
        planned = [(Run(problem.name, pair[0].name, pair[1], seed, budget, "", "").key, pair) for pair in pairs]
        missing = [pair for key, pair in planned if key not in done]
        for run in take_turns([Training(problem, *pair, seed, budget, data_dir) for pair in missing]):
            done[run.key] = run
            store.add(run)
        return [done[key] for key, _ in planned]

    with tqdm(total=len(problems) * sum(len(method.grid) + len(seeds) - 1 for method in methods), mininterval=2) as bar:
        for problem in problems:
            budget = problem.seconds * share
            settings = {method: method.grid for method in methods}
            for seed in seeds:
                bar.set_description(f"{problem.name}, seed {seed}")
                if seed == seeds[0] and pilot < 1:
                    several = {method: chosen for method, chosen in settings.items() if len(chosen) > 1}
                    settings |= _best(trained(problem, seed, pilot * budget, several), several)
                group = trained(problem, seed, budget, settings)
                settings = _best(group, settings)
                wanted += group
                bar.update(len(group))
    return wanted


def _best(runs: list[Run], methods: Iterable[Method]) -> dict[Method, tuple[Setting, ...]]:
    """The setting of each method's best run."""
    own = {method: [run for run in runs if run.method == method.name] for method in methods}
    return {method: (min(group, key=lambda run: run.final).setting,) for method, group in own.items()}
