"""A whole training step, zero_grad to step, on the paper's CIFAR net: EACG against torch's optimizers."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import secondorder as so
from bench.literal import LiteralEACG
from bench.timing import CIFAR_NET, interleaved, report


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for n_in, n_out in zip(CIFAR_NET, CIFAR_NET[1:]):
        layers += [nn.Linear(n_in, n_out), nn.Sigmoid()]
    return nn.Sequential(*layers[:-1])


def stepper(
    x: torch.Tensor, y: torch.Tensor, make: Callable[[nn.Module, nn.Module], torch.optim.Optimizer]
) -> Callable[[], None]:
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = make(model, criterion)

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()

    return step


def main() -> None:
    for batch in (1000, 100):
        x, y = torch.randn(batch, CIFAR_NET[0]), torch.randint(CIFAR_NET[-1], (batch,))
        literal = LiteralEACG(network(), 1e-3, 0.01, 20, 0.0)
        rows = interleaved(
            {
                "SGD, momentum": stepper(x, y, lambda m, c: torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9)),
                "Adam, fused": stepper(x, y, lambda m, c: torch.optim.Adam(m.parameters(), lr=1e-4, fused=True)),
                "EACG": stepper(x, y, lambda m, c: so.EACG(m, c, 1e-3)),
                "EACG, the paper's settings": stepper(
                    x,
                    y,
                    lambda m, c: so.EACG(m, c, 1e-3, solver="ea-cg-truncated", max_cg=20, eps_cg=0, momentum=0, factor_decay=0),
                ),
                "EACG, curvature_every=10": stepper(x, y, lambda m, c: so.EACG(m, c, 1e-3, curvature_every=10)),
                "the paper's EA-CG, plain PyTorch": partial(literal.step, x, y),
            },
            "SGD, momentum",
            rounds=21 if batch == 1000 else 41,
        )
        report(
            f"step_batch_{batch}",
            f"Training step, {'-'.join(map(str, CIFAR_NET))}, sigmoid, batch {batch}, float32, {torch.get_num_threads()} threads",
            rows,
            "Ratio: to SGD with momentum, median over rounds.",
        )


if __name__ == "__main__":
    main()
