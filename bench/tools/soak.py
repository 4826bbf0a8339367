"""Very many small steps of every way to step: whether memory stays flat. Fails where it does not."""

import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import secondorder as so

OPTIMIZERS: dict[str, Callable[[nn.Module, nn.Module], torch.optim.Optimizer]] = {
    "EACG, lr=0.002": lambda m, c: so.EACG(m, c, lr=0.002),
    "LayerwiseNewton": lambda m, c: so.LayerwiseNewton(m, c),
    "K-BFGS": lambda m, c: so.KBFGS(m, c),
}
WARM, ALLOWED = 1000, 4.0  # steps before memory must be flat; MiB that it may then grow by


def resident() -> float:
    """MiB of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def soak(make: Callable[[nn.Module, nn.Module], torch.optim.Optimizer], steps: int) -> tuple[float, int, float]:
    """Trains a small net; returns the growth of memory in MiB and of the tensors alive after WARM steps, and the last loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    criterion = nn.CrossEntropyLoss()
    optimizer = make(model, criterion)
    x = torch.randn(4096, 6)
    y = (x[:, :3] * x[:, 3:]).argmax(1)

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = criterion(model(x[rows]), y[rows])
        loss.backward()
        return loss

    for step in range(steps):
        rows = torch.randint(4096, (32,))
        loss = optimizer.step(evaluate)
        if step in (WARM, steps - 1):
            gc.collect()
            alive = sum(isinstance(each, Tensor) for each in gc.get_objects())
            if step == WARM:
                before = resident(), alive
    return resident() - before[0], alive - before[1], loss.item()


def main(
    steps: Annotated[int, typer.Option(help="Steps of each optimizer.")] = 100_000,
    only: Annotated[str, typer.Option(help="Those optimizers whose name contains this.")] = "",
) -> None:
    """Prints what grew."""
    torch.set_num_threads(1)
    flat = True
    for name, make in OPTIMIZERS.items():
        if only in name:
            start = time.perf_counter()
            growth, tensors, loss = soak(make, steps)
            flat &= growth <= ALLOWED and tensors == 0
            seconds = time.perf_counter() - start
            print(
                f"{name:14} {steps} steps, {seconds:.0f} s: {growth:+.2f} MiB, {tensors:+d} tensors, loss {loss:.3f}", flush=True
            )
    if not flat:
        sys.exit(f"memory is not flat: expected at most {ALLOWED} MiB and no tensor more")


if __name__ == "__main__":
    typer.run(main)
