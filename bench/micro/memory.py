"""Peak memory of training steps, and the optimizers' states, each in a process of its own, on the paper's ImageNet-10 net."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secondorder as so
from bench.micro.nets import NETS, Net
from bench.timing import report

OPTIMIZERS = {
    "SGD": lambda model, criterion: torch.optim.SGD(model.parameters(), lr=1e-3),
    "SGD, momentum": lambda model, criterion: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9),
    "Adam": lambda model, criterion: torch.optim.Adam(model.parameters(), lr=1e-3),
    "EACG, the paper's settings": lambda model, criterion: so.EACG(
        model, criterion, 1e-3, solver="ea-cg-truncated", max_cg=20, eps_cg=0, momentum=0, factor_decay=0, max_step=None
    ),
    "EACG, momentum=0": lambda model, criterion: so.EACG(model, criterion, 1e-3, momentum=0),
    "EACG": lambda model, criterion: so.EACG(model, criterion, 1e-3),
    "EigenAdam": lambda model, criterion: so.EigenAdam(model, lr=0.1),
}


def measured(optimizer: str, sizes: list[int], batch: int, steps: int = 3) -> dict[str, float]:
    """What a process that trains a sigmoid net of these sizes holds, in MB: at most, and in the optimizer's state after steps."""
    arguments = json.dumps([optimizer, sizes, batch, steps])
    run = [sys.executable, "-c", f"from bench.micro import memory; memory.train(*{arguments})"]
    return json.loads(subprocess.run(run, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]).stdout)


def peak(optimizer: str, sizes: list[int], batch: int, steps: int = 3) -> float:
    """The largest resident memory, in MB; Linux alone knows it."""
    return measured(optimizer, sizes, batch, steps)["MB"]


def tensor_bytes(state: Any) -> int:
    """Of all tensors in nested containers."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    children = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(map(tensor_bytes, children))


def train(name: str, sizes: list[int], batch: int, steps: int) -> None:
    """Steps of one optimizer; prints what it holds."""
    net = Net(sizes, nn.Sigmoid, nn.CrossEntropyLoss)
    model, criterion, (x, y) = net.model(), net.criterion(), net.batch(batch)
    optimizer = OPTIMIZERS[name](model, criterion)
    for _ in range(steps):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    with open("/proc/self/status") as status:  # of this program alone, where getrusage counts what it was forked from
        highest = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    print(json.dumps({"MB": highest, "state MB": tensor_bytes(optimizer.state_dict()["state"]) / 2**20}))


def main(batch: int = 100) -> None:
    sizes = NETS["imagenet"].sizes
    rows = {name: measured(name, sizes, batch) for name in OPTIMIZERS}
    for row in rows.values():
        row["ratio"] = row["MB"] / rows["SGD, momentum"]["MB"]
    weights = sum(n * k for n, k in zip(sizes, sizes[1:]))
    hessians = sum(k * k for k in sizes[1:])
    report(
        "memory",
        f"Peak memory of a training process, {'-'.join(map(str, sizes))}, batch {batch}, float32",
        rows,
        f"The weights take {4e-6 * weights:.0f} MB, and so do their gradients and a momentum buffer; all bias Hessians "
        f"{4e-6 * hessians:.1f} MB. Ratio: to SGD with momentum.",
    )


if __name__ == "__main__":
    main()
