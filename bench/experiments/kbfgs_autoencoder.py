"""The published MNIST autoencoder run of K-BFGS (Goldfarb, Ren & Bahamou, 2020), over several seeds, beside KFAC and Adam.

    python -m bench.experiments.kbfgs_autoencoder --data-dir DIR

`bench/data.py` says what DIR holds. Net 784-1000-500-250-30 and back, ReLU but for the code and the output, BCE with logits
summed over pixels, batch 1000, lr 0.3, damping 0.3, L2 1e-5: the setting whose training losses after epochs 1, 2, 3 the
authors' notebook gives as 169.0, 109.6, 85.2. Seconds are CPU seconds of training alone, all threads together: what else
the machine does enters less than into wall time. Adam trains three times the epochs.
"""

import argparse
import json
import math
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secondorder as so
from bench.data import mnist
from bench.experiments.problems import network
from bench.timing import RESULTS, cpu_name

SIZES = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
BATCH = 1000
PUBLISHED = {1: 169.018, 2: 109.642, 3: 85.177, 10: 59.808}  # the authors' Demo.ipynb, training loss
BCE = nn.BCEWithLogitsLoss(reduction="sum")
PAPERS: dict[str, Any] = {"scale": None, "max_step": None}  # its own units, steps of any length
OPTIMIZERS = {
    "K-BFGS": lambda model: so.KBFGS(model, criterion, lr=0.3, damping=0.3, weight_decay=1e-5, **PAPERS),
    "K-BFGS(L)": lambda model: so.KBFGSL(model, criterion, lr=0.3, damping=0.3, weight_decay=1e-5, memory=100, **PAPERS),
    "KFAC": lambda model: so.KFAC(model, BCE),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5),
}
CHEAPER = {"Adam": 3}  # so many epochs cost what one of K-BFGS does


def criterion(output: Tensor, target: Tensor) -> Tensor:
    """BCE with logits, summed over pixels, mean over instances."""
    return BCE(output, target) / len(target)


def autoencoder(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return network(SIZES, nn.ReLU, linear_code=True)


@torch.no_grad()
def mean_loss(model: nn.Module, x: Tensor) -> float:
    return sum(criterion(model(batch), batch).item() * len(batch) for batch in x.split(BATCH)) / len(x)


def train(name: str, seed: int, x: Tensor, epochs: int) -> dict:
    """Trains once; the loss and the CPU seconds of training after every epoch."""
    model = autoencoder(seed)
    optimizer = OPTIMIZERS[name](model)
    order = torch.Generator().manual_seed(seed)
    losses, seconds, elapsed = [], [], 0.0
    for epoch in range(epochs):
        start = time.process_time()
        if epoch == 0 and isinstance(optimizer, so.KBFGS):
            optimizer.initialize(x.split(BATCH))
        for indices in torch.randperm(len(x), generator=order).split(BATCH):
            batch = x[indices]

            def closure(batch: Tensor = batch) -> Tensor:
                optimizer.zero_grad()
                loss = criterion(model(batch), batch)
                loss.backward()
                return loss

            optimizer.step(closure)
        elapsed += time.process_time() - start
        losses.append(mean_loss(model, x))
        seconds.append(elapsed)
        print(f"{name:10} seed {seed} epoch {epoch + 1}: loss {losses[-1]:8.3f} after {elapsed:6.1f} s", flush=True)
    result = {"optimizer": name, "seed": seed, "losses": losses, "seconds": seconds}
    if isinstance(optimizer, so.KBFGS):
        counts = optimizer.diagnostics()
        result["diagnostics"] = counts
        print(f"{name:10} seed {seed}: {next(iter(counts.values()))['halvings']} halvings of the step", flush=True)
    return result


def tables(runs: list[dict], epochs: int) -> str:
    """Markdown: loss by epoch (median, range, every seed), and loss by second (medians, linearly interpolated)."""
    by_name: dict[str, list[dict]] = {}
    for run in runs:
        by_name.setdefault(run["optimizer"], []).append(run)
    lines = ["| optimizer | epoch | median loss | range | seeds | median CPU seconds |", "|---|---|---|---|---|---|"]
    for name, group in by_name.items():
        for epoch in range(min(len(run["losses"]) for run in group)):
            losses = [run["losses"][epoch] for run in group]
            median_seconds = statistics.median(run["seconds"][epoch] for run in group)
            lines.append(
                f"| {name} | {epoch + 1} | {statistics.median(losses):.1f} | {min(losses):.1f} to {max(losses):.1f} | "
                f"{', '.join(f'{loss:.1f}' for loss in losses)} | {median_seconds:.1f} |"
            )
    published = ", ".join(f"{loss:.1f} after {epoch}" for epoch, loss in PUBLISHED.items() if epoch <= max(epochs, 3))
    lines += ["", f"Published for K-BFGS (one seed): {published}.", ""]
    longest = min(run["seconds"][-1] for run in runs if run["optimizer"] not in CHEAPER or len(by_name) == 1)
    marks = [longest * share for share in (0.25, 0.5, 0.75, 1.0)]
    lines += [
        "| optimizer | " + " | ".join(f"{mark:.0f} s" for mark in marks) + " |",
        "|---|" + "---|" * len(marks),
    ]
    for name, group in by_name.items():
        cells = [[loss_at(run, mark) for run in group] for mark in marks]
        medians = ["" if any(map(math.isnan, cell)) else f"{statistics.median(cell):.1f}" for cell in cells]
        lines.append(f"| {name} | " + " | ".join(medians) + " |")
    return "\n".join(lines)


def loss_at(run: dict, second: float) -> float:
    """The loss at a time within a run, between the epochs' ends; NaN before the first and after the last."""
    seconds, losses = run["seconds"], run["losses"]
    if second < seconds[0]:
        return float("nan")
    for (t0, t1), (l0, l1) in zip(pairwise(seconds), pairwise(losses), strict=True):
        if second <= t1:
            return l0 + (l1 - l0) * (second - t0) / (t1 - t0)
    return float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS / "kbfgs_autoencoder")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    x = mnist(arguments.data_dir).train_x
    runs = []
    for seed in arguments.seeds:
        for name in arguments.optimizers:
            runs.append(train(name, seed, x, arguments.epochs * CHEAPER.get(name, 1)))
            save(runs, arguments)
    print(arguments.out.with_suffix(".md").read_text())


def save(runs: list[dict], arguments: argparse.Namespace) -> None:
    """Writes what there is so far."""
    names = " ".join(repr(name) if "(" in name else name for name in arguments.optimizers)
    command = (
        f"python -m bench.experiments.kbfgs_autoencoder --data-dir DIR --seeds {' '.join(map(str, arguments.seeds))} "
        f"--epochs {arguments.epochs} --optimizers {names} --threads {arguments.threads}"
    )
    text = (
        f"# K-BFGS on the MNIST autoencoder\n\n    {command}\n\n"
        f"torch {torch.__version__}, {arguments.threads} threads, {cpu_name()}, {so.build_info()['vectors']} vectors. "
        f"Training loss per image; CPU seconds of training alone.\n\n{tables(runs, arguments.epochs)}\n"
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".json").write_text(json.dumps({"command": command, "runs": runs}, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
