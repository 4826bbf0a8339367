"""Every operator over all layers of a net, against its twin in plain PyTorch, eager and under torch.compile."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from bench.micro.nets import NETS, Net
from bench.timing import interleaved, report
from secondorder import ops, reference

SMALL = {"cifar": [1000], "pinn": [128], "tabular": [128]}
LARGE = {"cifar": [100], "autoencoder": [100, 1000], "pinn": [1000], "tabular": [1000]}
ALPHA, ITERATIONS, MU1, MU2 = 0.01, 20, 0.2, 0.3**0.5

# activation -> its name for the operators, and sigma' and sigma'' from its output
DERIVATIVES: dict[Any, tuple[str, Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    nn.Sigmoid: ("sigmoid", lambda h: (h * (1 - h), h * (1 - h) * (1 - 2 * h))),
    nn.Tanh: ("tanh", lambda h: (1 - h * h, -2 * h * (1 - h * h))),
    nn.ReLU: ("relu", lambda h: ((h > 0).to(h.dtype), torch.zeros_like(h))),
}

# operator -> (the operator for all layers, its twin for one, the arguments of every layer)
Case = tuple[Callable[..., object], Callable[..., object], list[tuple[Any, ...]]]


def each(operator: Callable[..., object]) -> Callable[..., object]:
    """Calls an operator for one layer after the other."""
    return lambda layers: [operator(*arguments) for arguments in layers]


def whole(operator: Callable[..., object], *options: object) -> Callable[..., object]:
    """Calls an operator that takes lists once, with each argument's values of all layers."""
    return lambda layers: operator(*map(list, zip(*layers)), *options)


def cases(net: Net, batch: int) -> Iterator[tuple[str, Case]]:
    """All operators, on random numbers of the net's shapes."""
    torch.manual_seed(0)
    pairs = list(zip(net.sizes, net.sizes[1:]))
    roots = [torch.randn(n, n) / n for _, n in pairs]
    hessians = [root @ root.T for root in roots]
    weights = [torch.randn(n_out, n_in) / n_in**0.5 for n_in, n_out in pairs]
    yield from recursion(net, batch, hessians, weights)
    yield from eacg(hessians, weights)
    yield from averages(net, batch, hessians)
    yield from preconditioners(hessians, weights)
    yield from quasi_newton(hessians, weights)


def recursion(net: Net, batch: int, hessians: list[Tensor], weights: list[Tensor]) -> Iterator[tuple[str, Case]]:
    """The recursion of the bias Hessians, its derivatives, and its start."""
    name, formula = DERIVATIVES[net.activation]
    widths = net.sizes[1:-1]
    outputs = [net.activation()(torch.randn(batch, n)) for n in widths]  # of the activations
    grads = [torch.randn(batch, n) / batch for n in widths]
    above = list(zip(hessians[1:], weights[1:], outputs, grads, strict=True))

    yield "activation_derivatives", (
        each(lambda h: ops.activation_derivatives(h, name)), formula, [(h,) for h in outputs],
    )  # fmt: skip
    yield (
        "bias_hessian",
        (
            each(lambda *a: ops.bias_hessian(*a, -1.0)),
            lambda *a: reference.bias_hessian(*a, -1.0),
            [(h, w, *formula(s), g) for h, w, s, g in above],
        ),
    )
    yield (
        "bias_hessian_activation",
        (
            each(lambda h, w, s, g: ops.bias_hessian_activation(h, w, s, name, 1.0, g, -1.0)),
            lambda h, w, s, g: reference.bias_hessian(h, w, *formula(s), g, -1.0),
            above,
        ),
    )
    logits = [(torch.randn(batch, net.sizes[-1]), torch.randint(net.sizes[-1], (batch,)))]
    yield "cross_entropy_hessian", (each(ops.cross_entropy_hessian), reference.cross_entropy_hessian, logits)


def eacg(hessians: list[Tensor], weights: list[Tensor]) -> Iterator[tuple[str, Case]]:
    """EA-CG's solve, by itself and with the update."""
    count = len(weights)
    means, b = [torch.rand(w.shape[1]) for w in weights], [torch.randn_like(w) for w in weights]
    g = [torch.randn(len(w)) for w in weights]
    biases = [torch.zeros_like(x) for x in g]
    systems = list(zip(hessians, means, b, g, strict=True))
    for truncated in (False, True):
        yield (
            "eacg_solve" + ", truncated" * truncated,
            (
                whole(ops.eacg_solve, ALPHA, ITERATIONS, 0.0, truncated),
                lambda *s, t=truncated: reference.eacg_solve(*s, ALPHA, ITERATIONS, 0.0, t),
                systems,
            ),
        )

    def update(h: Tensor, a: Tensor, b: Tensor, g: Tensor, w: Tensor, x: Tensor) -> None:
        p, d, _ = reference.eacg_solve(h, a, b, g, ALPHA, ITERATIONS, 0.0, False)
        w.add_(p, alpha=1e-6)
        x.add_(d, alpha=1e-6)

    none = [0.0] * count
    yield (
        "eacg_update_",
        (
            whole(ops.eacg_update_, [], [], [1e-6] * count, [ALPHA] * count, none, none, ITERATIONS, 0.0, False),
            update,
            [(*system, w, x) for system, w, x in zip(systems, weights, biases, strict=True)],
        ),
    )


def averages(net: Net, batch: int, hessians: list[Tensor]) -> Iterator[tuple[str, Case]]:
    """Means of the inputs, and exponential averages."""
    inputs = [torch.rand(batch, n) for n in net.sizes[:-1]]
    yield "mean_inputs", (lambda layers: ops.mean_inputs([h for (h,) in layers]), lambda h: h.mean(0), [(h,) for h in inputs])
    averaged = [(h, h.clone()) for h in hessians]
    yield "average_", (whole(ops.average_, 0.0), lambda x, y: x.lerp_(y, 0.0), averaged)


def preconditioners(hessians: list[Tensor], weights: list[Tensor]) -> Iterator[tuple[str, Case]]:
    """The product of a gradient with a matrix on either side."""
    factors = [torch.randn(w.shape[1], w.shape[1]) / w.shape[1] for w in weights]
    sides = [(h, torch.randn_like(w), a @ a.T) for h, w, a in zip(hessians, weights, factors, strict=True)]
    yield "precondition", (each(ops.precondition), reference.precondition, sides)


def quasi_newton(hessians: list[Tensor], weights: list[Tensor]) -> Iterator[tuple[str, Case]]:
    """K-BFGS: dampings, updates, and limited memory."""
    widths = [len(w) for w in weights]
    inverses = [torch.eye(n) for n in widths]
    vectors = [torch.randn(2, n) for n in widths]
    pushed = [(h, s, y + s) for h, (s, y) in zip(inverses, vectors, strict=True)]
    yield (
        "double_damping",
        (
            lambda layers: ops.double_damping(
                [s for _, s, _ in layers], [y for _, _, y in layers], [h for h, _, _ in layers], MU1, MU2
            ),
            lambda h, s, y: reference.double_damping(s, y, h, MU1, MU2),
            pushed,
        ),
    )
    yield "bfgs_update_", (whole(ops.bfgs_update_), reference.bfgs_update_, pushed)
    yield (
        "damped_bfgs_update_",
        (
            whole(ops.damped_bfgs_update_, MU1, MU2),
            lambda h, s, y: reference.damped_bfgs_update_([h], [s], [y], MU1, MU2),
            pushed,
        ),
    )
    yield (
        "hessian_action_update_",
        (
            whole(ops.hessian_action_update_, 0.1),
            lambda h, a, v: reference.hessian_action_update_([h], [a], [v], 0.1),
            list(zip(inverses, hessians, [torch.randn(n) for n in widths], strict=True)),
        ),
    )
    memory = [(torch.randn(20, n), torch.randn(20, n)) for n in widths]
    memory = [(s, y * 0.1 + s) for s, y in memory]
    yield "lbfgs_product", (
        whole(ops.lbfgs_product), reference.lbfgs_product, [(s, y, w) for (s, y), w in zip(memory, weights, strict=True)],
    )  # fmt: skip


# The twins that torch.compile takes in one graph. Those of the others have loops that end when the numbers say so: it would
# compile them anew at every turn.
STRAIGHT = {
    "activation_derivatives",
    "bias_hessian",
    "bias_hessian_activation",
    "mean_inputs",
    "precondition",
    "double_damping",
}


def calls(twin: Callable[..., object], layers: list[tuple[Any, ...]]) -> Callable[[], object]:
    """The twin for one layer after the other."""
    return lambda: [twin(*arguments) for arguments in layers]


def main(
    large: Annotated[bool, typer.Option(help="The nets and batches that take long, too.")] = False,
    compile: Annotated[bool, typer.Option(help="Plain PyTorch under torch.compile, too.")] = True,
    rounds: Annotated[int, typer.Option(help="Turns that each function takes.")] = 9,
) -> None:
    """Measures operators and stores bench/results/operators_NET_BATCH.json."""
    for name, batch in [(n, b) for shapes in ([SMALL, LARGE] if large else [SMALL]) for n, m in shapes.items() for b in m]:
        rows = {}
        for operator, (fused, twin, layers) in cases(NETS[name], batch):
            functions = {"plain": calls(twin, layers), "fused": partial(fused, layers)}
            if compile and operator in STRAIGHT:
                functions["compiled"] = calls(torch.compile(twin, dynamic=True), layers)
            with torch.no_grad():
                measured = interleaved(functions, "plain", rounds)
            rows[operator] = {f"{each} ms": row["ms"] for each, row in measured.items()} | {"ratio": measured["fused"]["ratio"]}
        report(
            f"operators_{name}_{batch}",
            f"Operators over all layers, {NETS[name]}, batch {batch}, float32, {torch.get_num_threads()} threads",
            rows,
            "Ratio: fused to plain PyTorch, median over rounds.",
        )


if __name__ == "__main__":
    typer.run(main)
