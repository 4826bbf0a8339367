"""One factor update of K-BFGS (double damping and BFGS) against plain PyTorch, and whole steps of K-BFGS against SGD's."""

from collections.abc import Callable
from itertools import cycle

import torch
from torch import Tensor

import secondorder as so
from bench.experiments.kbfgs_autoencoder import BATCH, OPTIMIZERS, SIZES, autoencoder, criterion
from bench.timing import interleaved, report
from secondorder import ops, reference

MU1, MU2 = 0.2, 0.3**0.5


def three_products_(h: Tensor, s: Tensor, y: Tensor) -> None:
    """Algorithm 3, then Eq. 6 as the paper writes it."""
    s, y = reference.double_damping(s, y, h, MU1, MU2)
    rho = 1 / (s @ y)
    v = torch.eye(len(s)) - rho * torch.outer(y, s)
    h.copy_(v.T @ h @ v + rho * torch.outer(s, s))


def in_place_(h: Tensor, s: Tensor, y: Tensor) -> None:
    """The least that plain PyTorch can do: two products with H and two rank-one updates in place, nothing checked."""
    s, y = reference.double_damping(s, y, h, MU1, MU2)
    q, rho = h @ y, 1 / (s @ y)
    w = (0.5 * rho * (1 + rho * (y @ q))) * s - rho * q
    h.addr_(s, w).addr_(w, s)


def factor_update(n: int) -> None:
    """One layer, with pairs that call for one damping, the other, both and none."""
    pairs = [torch.randn(2, n) for _ in range(8)]
    pairs = [(s, y if i % 2 else y + s) for i, (s, y) in enumerate(pairs)]
    updates: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
        "fused": lambda h, s, y: ops.damped_bfgs_update_([h], [s], [y], MU1, MU2),
        "plain PyTorch (reference.py)": lambda h, s, y: reference.damped_bfgs_update_([h], [s], [y], MU1, MU2),
        "plain PyTorch, in place": in_place_,
        "plain PyTorch, three products": three_products_,
    }

    def variant(update: Callable[[Tensor, Tensor, Tensor], object]) -> Callable[[], object]:
        h, turn = torch.eye(n), cycle(pairs)
        return lambda: update(h, *next(turn))

    rows = interleaved({name: variant(update) for name, update in updates.items()}, "plain PyTorch (reference.py)")
    traffic, work = 12 * n * n, 8 * n * n
    for row in rows.values():
        row |= {"GB/s": 1e-6 * traffic / row["ms"], "GFLOP/s": 1e-6 * work / row["ms"]}
    report(
        f"bfgs_{n}",
        f"One damped BFGS update, n = {n}, float32, {torch.get_num_threads()} threads",
        rows,
        f"H is read, then read and written: {traffic / 1e6:.1f} MB. Two products and a rank-two update: {work / 1e6:.1f} MFLOP. "
        "Ratio: to reference.py, median over rounds.",
    )


def steps() -> None:
    """Whole steps on the autoencoder of the paper."""
    x = (torch.rand(BATCH, SIZES[0]) < 0.13).float()

    def stepper(make: Callable[[torch.nn.Module], torch.optim.Optimizer]) -> Callable[[], None]:
        model = autoencoder(0)
        optimizer = make(model)
        if isinstance(optimizer, so.KBFGS):
            optimizer.param_groups[0]["lr"] = 0.01  # no step is halved: each is two passes

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = criterion(model(x), x)
            loss.backward()
            return loss

        return lambda: optimizer.step(closure)

    rows = interleaved(
        {
            "SGD, momentum": stepper(lambda model: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)),
            **{name: stepper(make) for name, make in OPTIMIZERS.items()},
        },
        "SGD, momentum",
    )
    report(
        "kbfgs_step",
        f"Training step, {'-'.join(map(str, SIZES))}, batch {BATCH}, float32, {torch.get_num_threads()} threads",
        rows,
        "Ratio: to SGD with momentum, median over rounds.",
    )


def main() -> None:
    torch.manual_seed(0)
    for n in (100, 1000):
        factor_update(n)
    steps()


if __name__ == "__main__":
    main()
