"""EACG at its defaults on every scale of loss and inputs, against Adam(1e-3) after as many steps.

    python -m bench.experiments.scales [--steps 150] [--seed 0] [--width 32] [--every 1]

Nets of two hidden layers on digits (scikit-learn's 8 x 8) and on the logarithms of diamonds' prices (1,000 of them), batch 100,
one thread: {ReLU, tanh, sigmoid, GELU, SiLU} x {mean, summed} x {cross-entropy, MSE, BCE} (diamonds: MSE) x inputs of mean 0 and
5 times their deviation, at scales of 0.01, 1 and 100. "Share" is the reduction of the training loss over that of Adam. A run has
diverged where its loss ends above 1.2 times the first, and is low where its share is below a half.
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from tqdm import tqdm

import secondorder as so
from bench.shipped import diamonds, small_digits
from bench.timing import RESULTS

BATCH = 100
ACTIVATIONS = {"ReLU": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "GELU": nn.GELU, "SiLU": nn.SiLU}
LOSSES = {"cross-entropy": nn.CrossEntropyLoss, "MSE": nn.MSELoss, "BCE": nn.BCEWithLogitsLoss}
TASKS = [*itertools.product(["digits"], LOSSES), ("diamonds", "MSE")]
MEANS, SCALES = (0, 5), (0.01, 1, 100)
Make = Callable[[nn.Module, nn.Module], torch.optim.Optimizer]
OURS: dict[str, Make] = {
    "`EACG(model, criterion)`": lambda m, c: so.EACG(m, c),
    "`EACG(model, criterion, max_step=None)`": lambda m, c: so.EACG(m, c, max_step=None),
}


def inputs_and_targets(data: str, loss: str) -> tuple[Tensor, Tensor]:
    """Standardised inputs [m, n], and class indices [m], or numbers [m, K]."""
    found = small_digits() if data == "digits" else diamonds()
    rows = slice(None) if data == "digits" else slice(1000)
    x, y = found.train_x[rows].flatten(1), found.train_y[rows]
    x = (x - x.mean(0)) / (x.std(0) + 0.01)
    if data == "diamonds":
        return x, y.reshape(-1, 1)
    return x, y if loss == "cross-entropy" else F.one_hot(y, 10).float()


def losses(
    make: Make,
    data: str,
    loss: str,
    activation: str,
    reduction: str,
    mean: float,
    scale: float,
    seed: int,
    steps: int,
    width: int,
) -> tuple[float, float]:
    """The mean training loss before and after the steps; infinity where it is not finite or a step is refused."""
    torch.manual_seed(seed)
    x, y = inputs_and_targets(data, loss)
    x = (x + mean) * scale
    act, outputs = ACTIVATIONS[activation], 1 if data == "diamonds" else 10
    layers = [nn.Linear(x.shape[1], width), act(), nn.Linear(width, width), act(), nn.Linear(width, outputs)]
    model, criterion, measure = nn.Sequential(*layers), LOSSES[loss](reduction=reduction), LOSSES[loss]()
    optimizer = make(model, criterion)
    with torch.no_grad():
        first = measure(model(x), y).item()
    batches = itertools.chain.from_iterable(torch.randperm(len(x)).split(BATCH)[: len(x) // BATCH] for _ in itertools.count())
    try:
        for rows in itertools.islice(batches, steps):
            optimizer.zero_grad()
            criterion(model(x[rows]), y[rows]).backward()
            optimizer.step()
    except so.NonFiniteError:
        return first, math.inf
    with torch.no_grad():
        last = measure(model(x), y).item()
    return first, last if math.isfinite(last) else math.inf


def main(
    steps: int = 150,
    seed: int = 0,
    width: int = 32,
    every: Annotated[int, typer.Option(help="every so many combinations alone")] = 1,
    out: Annotated[Path, typer.Option()] = RESULTS / "scales.md",
) -> None:
    """Trains everything and writes the table."""
    torch.set_num_threads(1)
    combinations = [
        (data, loss, activation, reduction, mean, scale)
        for (data, loss), activation, reduction, mean, scale in itertools.product(
            TASKS, ACTIVATIONS, ("mean", "sum"), MEANS, SCALES
        )
    ][::every]
    shares: dict[str, dict[tuple, float]] = {name: {} for name in OURS}
    diverged = dict.fromkeys(OURS, 0)
    for each in tqdm(combinations, mininterval=5):
        first, reached = losses(lambda m, _: torch.optim.Adam(m.parameters(), 1e-3), *each, seed, steps, width)
        for name, make in OURS.items():
            _, last = losses(make, *each, seed, steps, width)
            shares[name][each] = (first - last) / (first - reached)
            diverged[name] += not last < 1.2 * first
    lines = [
        f"# EACG's defaults on every scale\n\n    python -m bench.experiments.scales --steps {steps} --seed {seed} "
        f"--width {width} --every {every}\n",
        (__doc__ or "").split("\n\n")[2],
        "| | runs | diverged | low | least share | median share | at least Adam's |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, own in shares.items():
        values = list(own.values())
        low = sum(v < 0.5 for v in values) - diverged[name]
        cells = (len(values), diverged[name], low, f"{min(values):.2f}", f"{median(values):.2f}", sum(v >= 1 for v in values))
        lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    worst = sorted(shares["`EACG(model, criterion)`"].items(), key=lambda item: item[1])[:5]
    lines += [
        "",
        "The five least shares of the first: " + "; ".join(f"{', '.join(map(str, k))}: {v:.2f}" for k, v in worst) + ".",
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
