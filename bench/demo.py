"""Trains a deep sigmoid network on digits by SGD, Adam, EigenAdam and EA-CG; prints a table and draws loss and accuracy.

Learning rates are tuned for every optimizer over a grid of three, by the training loss at the end.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Annotated

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import secondorder as so
from bench.data import Dataset, load
from bench.literal import LiteralEACG
from bench.timing import interleaved

WIDTHS = [784, 256, 128, 64, 32, 10]
ALPHA, CG, EPS = 0.01, 20, 1e-10  # of the paper's EA-CG: points of its grid
Step = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Curve:
    """One training run: a value per epoch, the initial one included."""

    name: str
    setting: str
    losses: list[float]
    accuracies: list[float]


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for n_in, n_out in zip(WIDTHS, WIDTHS[1:]):
        linear = nn.Linear(n_in, n_out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Sigmoid()]
    return nn.Sequential(*layers[:-1])


def ordinary_loop(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: nn.Module) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def sgd(model: nn.Sequential, lr: float) -> Step:
    return ordinary_loop(model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), nn.CrossEntropyLoss())


def adam(model: nn.Sequential, lr: float) -> Step:
    return ordinary_loop(model, torch.optim.Adam(model.parameters(), lr=lr, fused=True), nn.CrossEntropyLoss())


def eigen_adam(model: nn.Sequential, lr: None) -> Step:
    return ordinary_loop(model, so.EigenAdam(model), nn.CrossEntropyLoss())


def eacg_literal(model: nn.Sequential, lr: float) -> Step:
    return LiteralEACG(model, lr, ALPHA, CG, EPS).step


def eacg_paper(model: nn.Sequential, lr: float) -> Step:
    criterion = nn.CrossEntropyLoss()
    optimizer = so.EACG(
        model, criterion, lr, alpha=ALPHA, max_cg=CG, eps_cg=EPS, solver="ea-cg-truncated", momentum=0, factor_decay=0,
        max_step=None,
    )  # fmt: skip
    return ordinary_loop(model, optimizer, criterion)


def layerwise_newton(model: nn.Sequential, lr: None) -> Step:
    criterion = nn.CrossEntropyLoss()
    return ordinary_loop(model, so.LayerwiseNewton(model, criterion), criterion)


def eacg(model: nn.Sequential, lr: float | None) -> Step:
    criterion = nn.CrossEntropyLoss()
    return ordinary_loop(model, so.EACG(model, criterion, lr=0.02), criterion)


def train(name: str, make: Callable[..., Step], lr: float | None, data: Dataset, epochs: int, batch: int, bar: tqdm) -> Curve:
    model = network(seed=0)
    step = make(model, lr)
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


def draw(curves: list[Curve], epoch_seconds: dict[str, float], title: str, path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharey="row", layout="constrained")
    styles = {
        "EA-CG, plain PyTorch": ("C4", "--"),
        "EA-CG, fused": ("C3", "-"),
        "LayerwiseNewton": ("C2", "-"),
        "EACG": ("C5", "-"),
        "EigenAdam": ("C6", "-"),
    }
    for i, curve in enumerate(curves):
        color, line = styles.get(curve.name, (f"C{i}", "-"))
        label = curve.name if curve.setting == "defaults" else f"{curve.name} ({curve.setting})"
        epochs = range(len(curve.losses))
        for column, xs in enumerate(([epoch_seconds[curve.name] * e for e in epochs], epochs)):
            axes[0, column].semilogy(xs, curve.losses, line, color=color, label=label)
            axes[1, column].plot(xs, [100 * a for a in curve.accuracies], line, color=color)
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("test accuracy, %")
    for column, label in enumerate(("seconds of training", "epochs")):
        axes[1, column].set_xlabel(label)
    # The plain-PyTorch run is many times longer than the others: show their span, and leave it cut off.
    longest = max(epoch_seconds[c.name] * (len(c.losses) - 1) for c in curves if c.name != "EA-CG, plain PyTorch")
    for axis in axes[:, 0]:
        axis.set_xlim(-0.02 * longest, 1.05 * longest)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def main(
    out: Annotated[Path, typer.Option(help="folder for demo.png and demo.json")] = Path("build/demo"),
    data_dir: Annotated[Path | None, typer.Option(help="folder with the four IDX files of MNIST or Fashion-MNIST")] = None,
    epochs: int = 20,
    batch: int = 250,
) -> None:
    """The demo of the README."""
    data = load(data_dir)
    threads = torch.get_num_threads()
    print(
        f"{data.name}: {len(data.train_x)} to train on, {len(data.test_x)} to test; "
        f"network {'-'.join(map(str, WIDTHS))}, sigmoid, Xavier; batch {batch}, {epochs} epochs, {threads} threads"
    )
    grids: list[tuple[str, Callable[..., Step], list[float]]] = [
        ("SGD, momentum 0.9", sgd, [0.1, 0.3, 1.0]),
        ("Adam", adam, [1e-3, 3e-3, 1e-2]),
        ("EA-CG, fused", eacg_paper, [0.05, 0.1, 0.2]),
    ]
    curves = []
    with tqdm(total=(sum(len(g) for _, _, g in grids) + 4) * (epochs + 1), mininterval=2) as bar:
        for name, make, grid in grids:
            runs = [train(name, make, lr, data, epochs, batch, bar) for lr in grid]
            best = min(
                range(len(grid)), key=lambda i, runs=runs: math.inf if math.isnan(runs[i].losses[-1]) else runs[i].losses[-1]
            )
            curves.append(runs[best])
            if make is eacg_paper:
                # The same mathematics, so the same learning rate.
                curves.append(train("EA-CG, plain PyTorch", eacg_literal, grid[best], data, epochs, batch, bar))
        curves.append(train("EACG", eacg, None, data, epochs, batch, bar))
        curves.append(train("LayerwiseNewton", layerwise_newton, None, data, epochs, batch, bar))
        curves.append(train("EigenAdam", eigen_adam, None, data, epochs, batch, bar))

    makers = {"SGD, momentum 0.9": sgd, "Adam": adam, "EA-CG, fused": eacg_paper, "EA-CG, plain PyTorch": eacg_literal}
    steps = {name: make(network(0), 1e-3) for name, make in makers.items()} | {
        "EACG": eacg(network(0), None),
        "LayerwiseNewton": layerwise_newton(network(0), None),
        "EigenAdam": eigen_adam(network(0), None),
    }
    # On ever new batches: one that is learnt by heart has steps of its own cost.
    batches = {name: cycle(zip(data.train_x.split(batch), data.train_y.split(batch))) for name in steps}
    turns = {name: lambda step=step, each=batches[name]: step(*next(each)) for name, step in steps.items()}
    cost = interleaved(turns, "SGD, momentum 0.9", periods={"LayerwiseNewton": 5, "EigenAdam": 5})
    print(f"\n{'optimizer':22}{'setting':>10}{'loss':>9}{'accuracy':>10}{'ms/step':>9}{'x SGD':>7}")
    for c in curves:
        print(
            f"{c.name:22}{c.setting:>10}{c.losses[-1]:9.4f}{c.accuracies[-1]:10.3f}{cost[c.name]['ms']:9.2f}{cost[c.name]['ratio']:7.2f}"
        )
    print(
        f"EA-CG: PCH-1, alpha {ALPHA}, {CG} CG iterations, momentum 0, as in the paper. "
        "LayerwiseNewton: step, momentum and damping from the quadratic model; EACG, lr=0.02: momentum and factor averages.\n"
        "EigenAdam: finds its step length, takes no learning rate.\n"
        "Settings: the best of three learning rates by final training loss; the defaults are not tuned.\n"
        "Steps are timed interleaved, medians; seconds in the picture are steps times that."
    )
    out.mkdir(parents=True, exist_ok=True)
    steps_per_epoch = -(-len(data.train_x) // batch)
    draw(
        curves,
        {name: steps_per_epoch * row["ms"] / 1000 for name, row in cost.items()},
        f"{data.name}, deep sigmoid network {'-'.join(map(str, WIDTHS))}, batch {batch}, {threads} CPU threads",
        out / "demo.png",
    )
    (out / "demo.json").write_text(json.dumps({"curves": [asdict(c) for c in curves], "step": cost}, indent=1))
    print(f"wrote {out / 'demo.png'} and {out / 'demo.json'}")


if __name__ == "__main__":
    typer.run(main)
