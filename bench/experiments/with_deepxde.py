"""The equation of examples/deepxde_poisson.py by DeepXDE, with only the optimizer exchanged: errors by CPU seconds."""

import contextlib
import io
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import secondorder as so
from bench.experiments.comparison import row
from bench.experiments.training import environment

NAME = "deepxde"
SECONDS = 6.0
GOALS = (1e-2, 1e-3, 1e-4, 1e-5)
# What `model.compile` is given, and the learning rate beside it.
OPTIMIZERS: dict[str, tuple[Callable[[nn.Module], Any], float | None]] = {
    "LevenbergMarquardt": (lambda net: so.LevenbergMarquardt(net.parameters()), None),
    "EigenAdam": (lambda net: so.EigenAdam(net), None),
    "L-BFGS": (lambda _: "L-BFGS", None),
    **{f"Adam, lr {lr:g}": (lambda _: "adam", lr) for lr in (1e-3, 3e-3, 1e-2)},
}


def experiment(path: Path, seeds: list[int], share: float = 1.0, again: bool = False) -> str:
    """Trains what is not stored yet; returns the table.

    Args:
        path: of the stored runs.
        seeds: of DeepXDE's and torch's generators.
        share: of the seconds.
        again: forget the stored runs first.
    """
    torch.set_num_threads(1)
    budget = round(SECONDS * share, 3)
    runs = json.loads(path.read_text()) if path.exists() and not again else []
    for seed in tqdm(seeds, mininterval=2):
        for name in OPTIMIZERS:
            key = {"optimizer": name, "seed": seed, "budget": budget}
            if not any(key.items() <= run.items() for run in runs):
                runs.append({**key, "environment": environment(), **_train(name, seed, budget)})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(json.loads(json.dumps(runs), parse_float=lambda v: float(f"{float(v):.4g}"))) + "\n")
    chosen = [run for run in runs if run["seed"] in seeds and run["budget"] == budget]
    return _table(chosen)


def _train(name: str, seed: int, budget: float) -> dict[str, Any]:
    """Seconds of training alone, and the solution's relative L2 errors after them."""
    os.environ["DDE_BACKEND"] = "pytorch"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        import deepxde as dde

        from examples.deepxde_poisson import equation, solution

        class Clock(dde.callbacks.Callback):
            """Evaluates now and then, stops at the end; its own time does not count."""

            def init(self) -> None:
                self.seconds, self.errors, self.spent, self.steps = [], [], 0.0, 0
                self.points = square.random_points(2000)
                self.truth = solution(self.points)
                self.begun = time.process_time()

            def on_epoch_end(self) -> None:
                now = time.process_time()
                self.spent += now - self.begun
                self.steps += 1
                if self.spent >= budget / 20 * (1 + len(self.seconds)) or self.spent >= budget:
                    error = self.model.predict(self.points) - self.truth
                    self.seconds.append(self.spent)
                    self.errors.append(float((error**2).sum() ** 0.5 / (self.truth**2).sum() ** 0.5))
                    self.model.stop_training = self.spent >= budget
                self.begun = time.process_time()

        dde.config.set_default_float("float64")
        dde.config.set_random_seed(seed)
        square = dde.geometry.Rectangle([0, 0], [1, 1])
        edge = dde.icbc.DirichletBC(square, solution, lambda _, on_edge: on_edge)
        data = dde.data.PDE(square, equation, edge, num_domain=600, num_boundary=160, solution=solution, num_test=10)
        net = dde.nn.FNN([2, 32, 32, 32, 1], "tanh", "Glorot normal")
        model, clock = dde.Model(data, net), Clock()
        dde.optimizers.set_LBFGS_options(maxiter=10**6, ftol=0, gtol=0)
        dde.optimizers.config.LBFGS_options["iter_per_step"] = 10  # so often its callbacks are called
        make, lr = OPTIMIZERS[name]
        model.compile(make(net), lr=lr, loss_weights=[1, 100])
        try:
            model.train(iterations=10**6, display_every=10**7, callbacks=[clock])
        finally:
            dde.config.set_default_float("float32")
    return {"seconds": clock.seconds, "errors": clock.errors, "steps": clock.steps}


def _table(runs: list[dict[str, Any]]) -> str:
    """Markdown: the median error at the end with its range, and the median of the seconds to each goal."""
    head = ["", "relative L2 error", *(f"s to {goal:g}" for goal in GOALS)]
    lines = [row(head), "|---" * len(head) + "|"]
    for name in OPTIMIZERS:
        own = [run for run in runs if run["optimizer"] == name]
        final = [run["errors"][-1] for run in own]
        cells = [f"{statistics.median(final):.1e} ({min(final):.1e} to {max(final):.1e})"]
        for goal in GOALS:
            reached = [
                next((s for s, e in zip(run["seconds"], run["errors"], strict=True) if e <= goal), math.inf) for run in own
            ]
            found = statistics.median(reached)
            cells.append("-" if found == math.inf else f"{found:.1f}")
        lines.append(row([name, *cells]))
    machines = "; ".join(sorted({run["environment"] for run in runs}))
    return "\n".join(
        [*lines, "", f"{runs[0]['budget']:g} CPU seconds, {len({run['seed'] for run in runs})} seeds. Measured on: {machines}."]
    )
