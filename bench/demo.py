"""Trains a deep sigmoid network on digits, and a net that solves Poisson's equation; prints two tables, draws one picture.

On digits EigenAdam as it is stands beside SGD, Adam and Muon at their best learning rates, by the training loss at the end, and
beside EACG and LayerwiseNewton as they are. For the equation LevenbergMarquardt stands beside L-BFGS and Adam, by the error of
the solution.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import typer
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import secondorder as so
from bench import peers
from bench.data import Dataset, load
from bench.experiments.physics.problem import net, relative_error
from bench.experiments.physics.stationary import poisson_2
from bench.timing import interleaved

WIDTHS = [784, 256, 128, 64, 32, 10]
NET = [2, 32, 32, 32, 1]
Step = Callable[[Tensor, Tensor], Tensor]
STYLES: dict[str, dict[str, Any]] = {
    "SGD, momentum 0.9": {"color": "#7F7F7F"},
    "Adam": {"color": "#0072B2"},
    "Muon": {"color": "#D55E00", "linestyle": "--"},
    "EACG": {"color": "#009E73", "linestyle": "-."},
    "LayerwiseNewton": {"color": "#CC79A7"},
    "EigenAdam": {"color": "#000000", "linewidth": 2.4},
    "L-BFGS": {"color": "#E69F00"},
    "LevenbergMarquardt": {"color": "#000000", "linewidth": 2.4},
}


@dataclass
class Curve:
    """One training run on digits: a value per epoch, the initial one included."""

    name: str
    setting: str
    losses: list[float]
    accuracies: list[float]


@dataclass
class Solution:
    """One net for the equation: its error after so many CPU seconds."""

    name: str
    seconds: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for n_in, n_out in zip(WIDTHS, WIDTHS[1:]):
        linear = nn.Linear(n_in, n_out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Sigmoid()]
    return nn.Sequential(*layers[:-1])


def loop(make: Callable[..., torch.optim.Optimizer]) -> Callable[[nn.Module, float | None], Step]:
    """The ordinary training step of a model, by an optimizer that is made of model, criterion and learning rate."""

    def steps(model: nn.Module, lr: float | None) -> Step:
        criterion = nn.CrossEntropyLoss()
        optimizer = make(model, criterion, lr)

        def step(x: Tensor, y: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    return steps


# name -> (its steps, its learning rates; None: its defaults)
CONTESTANTS: dict[str, tuple[Callable[[nn.Module, float | None], Step], list[float | None]]] = {
    "SGD, momentum 0.9": (loop(lambda m, _, lr: torch.optim.SGD(m.parameters(), lr=lr, momentum=0.9)), [0.1, 0.3, 1.0]),
    "Adam": (loop(lambda m, _, lr: torch.optim.Adam(m.parameters(), lr=lr, fused=True)), [1e-3, 3e-3, 1e-2]),
    "Muon": (loop(lambda m, _, lr: peers.muon(m, lr)), [1e-2, 3e-2]),
    "EACG": (loop(lambda m, criterion, _: so.EACG(m, criterion, lr=0.02)), [None]),
    "LayerwiseNewton": (loop(lambda m, criterion, _: so.LayerwiseNewton(m, criterion)), [None]),
    "EigenAdam": (loop(lambda m, _, __: so.EigenAdam(m)), [None]),
}


def train(name: str, lr: float | None, data: Dataset, epochs: int, batch: int, bar: tqdm) -> Curve:
    model = network(seed=0)
    step = CONTESTANTS[name][0](model, lr)
    order = torch.Generator().manual_seed(1)
    curve = Curve(name, "defaults" if lr is None else f"lr {lr:g}", [], [])
    for epoch in range(epochs + 1):
        if epoch > 0:
            for chosen in torch.randperm(len(data.train_x), generator=order).split(batch):
                step(data.train_x[chosen], data.train_y[chosen])
        with torch.no_grad():
            curve.losses.append(F.cross_entropy(model(data.train_x), data.train_y).item())
            curve.accuracies.append((model(data.test_x).argmax(1) == data.test_y).float().mean().item())
        bar.set_postfix_str(f"{name}, {curve.setting}: loss {curve.losses[-1]:.3f}", refresh=False)
        bar.update()
    return curve


def solve(name: str, make: Callable[[nn.Module], torch.optim.Optimizer], seconds: float) -> tuple[Solution, nn.Module]:
    """Trains a net on the equation for so many CPU seconds."""
    torch.manual_seed(0)
    model, equation, run = net(*NET).double(), poisson_2(), Solution(name)
    optimizer = make(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = equation.loss(model)
        loss.backward()
        return loss

    spent = 0.0
    while True:
        with torch.no_grad():
            run.seconds.append(spent)
            run.errors.append(relative_error(model(equation.points), equation.solution))
        if spent >= seconds:
            return run, model
        begin = time.process_time()
        for _ in range(20 if name == "Adam" else 1):
            optimizer.step(closure)
        spent += time.process_time() - begin


def draw(
    curves: list[Curve], epoch_seconds: dict[str, float], runs: list[Solution], solved: nn.Module, titles: list[str], path: Path
) -> None:
    figure = plt.figure(figsize=(12, 7.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1)
    upper.suptitle(titles[0])
    lower.suptitle(titles[1])
    loss, epochs, accuracy = upper.subplots(1, 3)
    for curve in curves:
        label = curve.name if curve.setting == "defaults" else f"{curve.name} ({curve.setting})"
        style, numbers = STYLES[curve.name], range(len(curve.losses))
        seconds = [epoch_seconds[curve.name] * epoch for epoch in numbers]
        loss.semilogy(seconds, curve.losses, **style, label=label)
        epochs.semilogy(numbers, curve.losses, **style)
        accuracy.plot(seconds, [100 * a for a in curve.accuracies], **style)
    labelled(loss, "seconds of training", "training loss")
    labelled(epochs, "epochs", "training loss")
    labelled(accuracy, "seconds of training", "test accuracy, %")
    upper.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8, frameon=False)

    error, solution, difference = lower.subplots(1, 3)
    for run in runs:
        error.semilogy(run.seconds, run.errors, **STYLES[run.name], label=run.name)
    labelled(error, "CPU seconds of training", "relative error of the solution")
    error.legend(fontsize=8, frameon=False)
    equation, side = poisson_2(), torch.linspace(0, 1, 101, dtype=torch.float64)
    points = torch.cartesian_prod(side, side)
    with torch.no_grad():
        value = solved(points)
        assert equation.exact is not None
        off = (value - equation.exact(points)).abs()
    for axis, image, title in (
        (solution, value, "the solution found by LevenbergMarquardt"),
        (difference, off, "its absolute error"),
    ):
        shown = axis.imshow(image.view(101, 101).T, origin="lower", extent=(0, 1, 0, 1))
        lower.colorbar(shown, ax=axis, shrink=0.85)
        axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=110)


def labelled(axis: Axes, x: str, y: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3)


def main(
    out: Annotated[Path, typer.Option(help="folder for demo.png and demo.json")] = Path("build/demo"),
    data_dir: Annotated[Path | None, typer.Option(help="folder with the four IDX files of MNIST or Fashion-MNIST")] = None,
    epochs: int = 20,
    batch: int = 250,
    seconds: Annotated[float, typer.Option(help="of CPU time for each solution of the equation")] = 6,
) -> None:
    """The demo of the README."""
    data = load(data_dir)
    threads = torch.get_num_threads()
    shape = "-".join(map(str, WIDTHS))
    print(
        f"{data.name}: {len(data.train_x)} to train on, {len(data.test_x)} to test; "
        f"network {shape}, sigmoid, Xavier; batch {batch}, {epochs} epochs, {threads} threads"
    )
    curves = []
    with tqdm(total=sum(len(rates) for _, rates in CONTESTANTS.values()) * (epochs + 1), mininterval=2) as bar:
        for name, (_, rates) in CONTESTANTS.items():
            tried = [train(name, lr, data, epochs, batch, bar) for lr in rates]
            curves.append(min(tried, key=lambda run: math.inf if math.isnan(run.losses[-1]) else run.losses[-1]))

    steps = {name: make(network(0), rates[0]) for name, (make, rates) in CONTESTANTS.items()}
    # On ever new batches: one that is learnt by heart has steps of its own cost.
    batches = {name: cycle(zip(data.train_x.split(batch), data.train_y.split(batch))) for name in steps}
    turns = {name: lambda step=step, each=batches[name]: step(*next(each)) for name, step in steps.items()}
    cost = interleaved(turns, "SGD, momentum 0.9", periods={"LayerwiseNewton": 5, "EigenAdam": 5})
    print(f"\n{'optimizer':22}{'setting':>10}{'loss':>11}{'accuracy':>10}{'ms/step':>9}{'x SGD':>7}")
    for c in curves:
        row = cost[c.name]
        print(f"{c.name:22}{c.setting:>10}{c.losses[-1]:11.2g}{c.accuracies[-1]:10.3f}{row['ms']:9.2f}{row['ratio']:7.2f}")
    print(
        "Settings: the best of three learning rates (of two for Muon) by final training loss; the defaults are not tuned.\n"
        "Steps are timed interleaved, medians; seconds in the picture are steps times that."
    )

    makers: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
        "Adam": lambda model: torch.optim.Adam(model.parameters(), 3e-3),
        "L-BFGS": lambda model: torch.optim.LBFGS(model.parameters(), max_iter=20, line_search_fn="strong_wolfe"),
        "LevenbergMarquardt": lambda model: so.LevenbergMarquardt(model.parameters()),
    }
    pairs = [solve(name, make, seconds) for name, make in makers.items()]
    print(f"\nPoisson's equation, u = sin(pi x) sin(2 pi y), by a net of {'-'.join(map(str, NET))}, tanh, float64; 800 points")
    print(f"{'optimizer':22}{'CPU s':>8}{'relative error':>16}")
    for run, _ in pairs:
        print(f"{run.name:22}{run.seconds[-1]:8.1f}{run.errors[-1]:16.2g}")

    out.mkdir(parents=True, exist_ok=True)
    steps_per_epoch = -(-len(data.train_x) // batch)
    draw(
        curves,
        {name: steps_per_epoch * row["ms"] / 1000 for name, row in cost.items()},
        [run for run, _ in pairs],
        pairs[-1][1],
        [
            f"{data.name}: a deep sigmoid network {shape}, batch {batch}, {threads} CPU threads",
            f"Poisson's equation by a net, {seconds:g} CPU seconds each",
        ],
        out / "demo.png",
    )
    stored = {"curves": [asdict(c) for c in curves], "step": cost, "solutions": [asdict(run) for run, _ in pairs]}
    (out / "demo.json").write_text(json.dumps(stored, indent=1))
    print(f"wrote {out / 'demo.png'} and {out / 'demo.json'}")


if __name__ == "__main__":
    typer.run(main)
