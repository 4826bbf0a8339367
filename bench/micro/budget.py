"""Where a step's time goes: what every phase of EACG's step must compute and move, the floor that sets, and its time.

The floors are those of this machine, measured in the same run: the faster rate of torch's matrix product and this package's
kernel, and the rate of copying memory.
"""

from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import Tensor

import secondorder as so
from bench.micro.nets import NETS
from bench.timing import interleaved, report
from secondorder import ops
from secondorder._tape import KnownActivation

SMALL = {"cifar": [100, 1000], "pinn": [128], "tabular": [128]}
LARGE = {"imagenet": [100], "autoencoder": [1000]}
ALPHA, ITERATIONS, FLOAT = 0.01, 50, 4


def milliseconds(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    return {name: row["ms"] for name, row in interleaved(functions, next(iter(functions)), rounds).items()}


def rates(rounds: int) -> tuple[float, float]:
    """FLOP and bytes per millisecond."""
    a, one, big = torch.randn(1024, 1024), torch.ones(1, 1), torch.zeros(2**25)
    target, row = torch.empty_like(big), torch.ones(1, 1024)
    times = milliseconds(
        {
            "product": lambda: a @ a,
            "half product": lambda: ops.bias_hessian(one, row, a, None, None, 0.0),
            "copy": lambda: target.copy_(big),
        },
        rounds,
    )
    return 1024**3 * max(2 / times["product"], 1 / times["half product"]), 2 * FLOAT * len(big) / times["copy"]


def budget(name: str, batch: int, rounds: int) -> None:
    """The table of one net."""
    net = NETS[name]
    pairs = list(zip(net.sizes, net.sizes[1:]))
    weights = sum(n * k for n, k in pairs)
    flop_rate, byte_rate = rates(rounds)

    x, y = net.batch(batch)
    model, criterion, plain = net.model(), net.criterion(), net.model()
    optimizer = so.EACG(model, criterion, 1e-6, alpha=ALPHA)
    sgd = torch.optim.SGD(plain.parameters(), lr=1e-6, momentum=0.9)

    def passes(which: torch.nn.Module, of: torch.optim.Optimizer) -> None:
        of.zero_grad()
        criterion(which(x), y).backward()

    def step(which: torch.nn.Module, of: torch.optim.Optimizer) -> None:
        passes(which, of)
        of.step()

    # The tensors that the operators work on, from a step's own records.
    passes(model, optimizer)
    records = optimizer._tape.records()
    hessians = so.curvature.PCH(-1.0).bias_hessians(records)
    links = []
    for record in records:
        between = record.map() if record.next is not None else None
        if isinstance(between, KnownActivation) and record.next is not None:
            above = record.next.layer
            grad = record.grad_activation()
            links.append((hessians[above], above.weight.detach(), between.saved, between.activation, between.parameter, grad))
    layers = [record.layer for record in records]
    inputs = [record.input() for record in records]
    own = [hessians[layer] for layer in layers]
    grads = [layer.weight.grad.clone() for layer in layers]
    bias_grads = [layer.bias.grad.clone() for layer in layers]
    w, b = [layer.weight.detach().clone() for layer in layers], [layer.bias.detach().clone() for layer in layers]
    momenta = [torch.zeros_like(t) for t in w], [torch.zeros_like(t) for t in b]
    means = [h.mean(0) for h in inputs]
    one = [1e-9] * len(layers), [ALPHA] * len(layers), [0.9] * len(layers), [0.0] * len(layers)

    def update(iterations: int) -> Tensor:
        return ops.eacg_update_(own, means, grads, bias_grads, w, b, *momenta, *one, iterations, 1e-4, False)

    iterations = [max(1, int(i)) for i in update(ITERATIONS)]
    averages = [*own, *means], [t.clone() for t in [*own, *means]]
    times = milliseconds(
        {
            "SGD": lambda: step(plain, sgd),
            "SGD's passes": lambda: passes(plain, sgd),
            "EACG's passes": lambda: passes(model, optimizer),
            "EACG": lambda: step(model, optimizer),
            "derivatives": lambda: [ops.activation_derivatives(s, n, p) for _, _, s, n, p, _ in links],
            "recursion": lambda: ops.bias_hessian_chain(links[0][0], *map(list, list(zip(*links))[1:]), -1.0),
            "statistics": lambda: (ops.mean_inputs(inputs), ops.average_(*averages, 0.0)),
            "update": lambda: update(1),
            "solve and update": lambda: update(ITERATIONS),
        },
        rounds,
    )
    elements = sum(s.numel() for _, _, s, *_ in links)
    squares = sum(n * n for _, n in pairs)
    curved = any(link[-1] is not None for link in links)
    # (FLOP, elements moved, ms)
    phases = {
        "forward and backward pass": (
            2 * batch * (3 * weights - pairs[0][0] * pairs[0][1]), 3 * weights, times["SGD's passes"]
        ),
        "record: hooks, criterion's Hessian": (0, 0, times["EACG's passes"] - times["SGD's passes"]),
        "recursion, activation derivatives inside": (
            sum(2 * k * k * n + (k + batch) * n * n for n, k in pairs[1:]),
            (1 + curved) * elements + squares,
            times["recursion"],
        ),
        "mean inputs, averages": (0, sum(h.numel() for h in inputs) + 3 * squares, times["statistics"]),
        "solve, further iterations": (
            4 * sum(i * n * n for i, (_, n) in zip(iterations, pairs[::-1])),
            0,
            times["solve and update"] - times["update"],
        ),
        "update, with one iteration": (0, 6 * weights + squares, times["update"]),
    }  # fmt: skip
    rest = times["EACG"] - times["EACG's passes"] - sum(ms for _, _, ms in list(phases.values())[2:])
    phases["Python and dispatch of the step"] = (0, 0, rest)
    rows: dict[str, dict[str, float]] = {}
    for phase, (flop, moved, ms) in phases.items():
        rows[phase] = {"MFLOP": flop / 1e6, "MB": FLOAT * moved / 1e6}
        rows[phase] |= {"floor ms": max(flop / flop_rate, FLOAT * moved / byte_rate), "ms": ms}
    rows["EACG step"] = {key: sum(row[key] for row in rows.values()) for key in ("MFLOP", "MB", "floor ms")} | {
        "ms": times["EACG"]
    }
    rows["SGD step, momentum"] = {"ms": times["SGD"]}
    rows["activation derivatives, alone"] = {
        "MB": 3e-6 * FLOAT * elements, "floor ms": 3 * FLOAT * elements / byte_rate, "ms": times["derivatives"]
    }  # fmt: skip
    report(
        f"budget_{name}_{batch}",
        f"Budget of EACG's step, {net}, batch {batch}, float32, {torch.get_num_threads()} threads",
        rows,
        f"Floors at {flop_rate / 1e6:.0f} GFLOP/s (1024^3 product, the faster of torch's and this package's) or "
        f"{byte_rate / 1e6:.1f} GB/s (copy), whichever takes longer.",
    )


def main(
    large: Annotated[bool, typer.Option(help="The ImageNet-10 net and the autoencoder, too.")] = False,
    rounds: Annotated[int, typer.Option(help="Turns that each phase takes.")] = 9,
) -> None:
    """Measures the budgets and stores bench/results/budget_NET_BATCH.json."""
    for name, batch in [(n, b) for shapes in ([SMALL, LARGE] if large else [SMALL]) for n, each in shapes.items() for b in each]:
        budget(name, batch, rounds)


if __name__ == "__main__":
    typer.run(main)
