"""One factor update of K-BFGS (double damping and BFGS) against plain PyTorch, and a whole step against SGD's.

    python bench/bench_bfgs.py

Every variant runs once per round, in turn, and the medians over the rounds are compared: what disturbs the machine
disturbs all of them.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from kbfgs_autoencoder import BATCH, OPTIMIZERS, SIZES, autoencoder, criterion
from torch import Tensor

import secondorder as so
from secondorder import ops, reference

MU1, MU2 = 0.2, 0.3**0.5


def three_products_(h: Tensor, s: Tensor, y: Tensor) -> None:
    """Algorithm 3, then Eq. 6 as the paper writes it."""
    s, y = reference.double_damping(s, y, h, MU1, MU2)
    rho = 1 / (s @ y)
    v = torch.eye(len(s)) - rho * torch.outer(y, s)
    h.copy_(v.T @ h @ v + rho * torch.outer(s, s))


def in_place_(h: Tensor, s: Tensor, y: Tensor) -> None:
    """The least that plain PyTorch can do: two products with H and rank-one updates in place."""
    s, y = reference.double_damping(s, y, h, MU1, MU2)
    q, rho = h @ y, 1 / (s @ y)
    w = (0.5 * rho * (1 + rho * (y @ q))) * s - rho * q
    h.addr_(s, w).addr_(w, s)


def interleaved(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds + 3):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if i >= 3:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def factor_updates(n: int, rounds: int) -> None:
    """One layer of n, both dampings at work in about half of the updates."""
    torch.manual_seed(0)
    pairs = [torch.randn(2, n) for _ in range(8)]
    pairs = [(s, y if i % 2 else y + s) for i, (s, y) in enumerate(pairs)]
    updates: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
        "secondorder.ops.damped_bfgs_update_": lambda h, s, y: ops.damped_bfgs_update_([h], [s], [y], MU1, MU2),
        "secondorder.reference (the twin)": lambda h, s, y: reference.damped_bfgs_update_([h], [s], [y], MU1, MU2),
        "plain PyTorch, in place": in_place_,
        "plain PyTorch, three products": three_products_,
    }
    variants, counters = {}, {}
    for name, update in updates.items():
        h, counters[name] = torch.eye(n), iter(range(10**9))
        variants[name] = lambda h=h, update=update, name=name: update(h, *pairs[next(counters[name]) % len(pairs)])
    medians = interleaved(variants, rounds)
    size, own = h.numel() * h.element_size(), next(iter(medians.values()))
    print(
        f"\nFactor update, n = {n}, float32, {torch.get_num_threads()} threads; H read, then read and written: "
        f"{3 * size / 1e6:.1f} MB; two products and a rank-two update: {8 * n * n / 1e6:.1f} MFLOP; median of {rounds}"
    )
    for name, median in medians.items():
        rates = f"{3e-9 * size / median:6.1f} GB/s  {8e-9 * n * n / median:6.1f} GFLOP/s"
        print(f"  {name:38} {1e3 * median:8.3f} ms  {median / own:6.1f} x  {rates}")


def steps(rounds: int) -> None:
    """Whole steps on the MNIST autoencoder's shapes."""
    torch.manual_seed(0)
    x = (torch.rand(BATCH, SIZES[0]) < 0.13).float()
    optimizers = {"SGD": lambda model: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9), **OPTIMIZERS}
    variants = {}
    for name, make in optimizers.items():
        model = autoencoder(0)
        optimizer = make(model)

        def step(model=model, optimizer=optimizer):  # type: ignore[no-untyped-def]
            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = criterion(model(x), x)
                loss.backward()
                return loss

            optimizer.step(closure)

        variants[name] = step
        if isinstance(optimizer, so.KBFGS):
            optimizer.param_groups[0]["lr"] = 0.01  # no step is halved: each is two passes
    medians = interleaved(variants, rounds)
    print(
        f"\nWhole step, autoencoder {'-'.join(map(str, SIZES))}, batch {BATCH}, {torch.get_num_threads()} threads; "
        f"median of {rounds}"
    )
    for name, median in medians.items():
        print(f"  {name:12} {1e3 * median:8.1f} ms  {median / medians['SGD']:5.2f} x SGD")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[100, 1000, 2000])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--step-rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {so.build_info()['vectors']} vectors")
    for n in arguments.sizes:
        factor_updates(n, arguments.rounds)
    if arguments.step_rounds:
        steps(arguments.step_rounds)


if __name__ == "__main__":
    main()
