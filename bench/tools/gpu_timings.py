"""Times the operators, the recursion by size and whole training steps on a GPU; writes a JSON list of rows as it goes.

`python -m bench.tools.gpu_timings operators|recursion|training --out rows.json`
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import secondorder as so
from bench.timing import CIFAR_NET
from secondorder import ops, reference

Row = dict[str, object]
# (k, n, m)
RECURSION_SIZES = (
    (64, 128, 1000),
    (256, 512, 1000),
    (1024, 1024, 1000),
    (2048, 2048, 1000),
    (10, 4096, 1000),
    (4096, 4096, 1000),
)
BATCH, ITERATIONS, ALPHA, GAMMA, MU1, MU2 = 1000, 20, 0.1, -1.0, 0.2, 0.001


def milliseconds(function: Callable[[], object], repeats: int = 30) -> float:
    """Median time of one call by CUDA events; the L2 cache is overwritten before each."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[repeats // 2]


def graphed(function: Callable[[], object], warm_up: int = 1) -> Callable[[], None]:
    """The function as a CUDA graph, after so many calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def ceilings() -> tuple[float, float]:
    """Bytes/s of a copy and FLOP/s of a float32 matrix product at the precision that is set, as measured here."""
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    x = torch.randn(8192, 8192, device="cuda")
    copy = 2 * source.numel() * 4 / milliseconds(lambda: target.copy_(source)) * 1e3
    return copy, 2 * 8192**3 / milliseconds(lambda: x @ x) * 1e3


@dataclass
class Comparison:
    """An operator's call for every layer of CIFAR_NET, and its equal in plain PyTorch; both return what they have computed."""

    name: str
    ours: Callable[[], list[torch.Tensor]]
    plain: Callable[[], list[torch.Tensor]]
    bytes: float  # every array counted once
    flops: float


def comparisons(device: str) -> list[Comparison]:
    """The operators of a step; those that update have tensors of their own, apart from the plain ones'."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    def psd(n: int) -> torch.Tensor:
        root = normal(n, n) / n**0.5
        return root @ root.T

    pairs = list(zip(CIFAR_NET, CIFAR_NET[1:]))
    hessian = [psd(o) for _, o in pairs]
    weight, bias = [normal(o, i) / i**0.5 for i, o in pairs], [normal(o) for _, o in pairs]
    mean = [normal(i).abs() for i, _ in pairs]
    gradient, bias_gradient = [normal(o, i) for i, o in pairs], [normal(o) for _, o in pairs]
    saved, grad_input = [normal(BATCH, i).sigmoid() for i, _ in pairs], [normal(BATCH, i) for i, _ in pairs]
    s, y = [normal(o) for _, o in pairs], [normal(o) for _, o in pairs]
    count = len(pairs)
    settings = ([1e-6] * count, [ALPHA] * count, [0.0] * count, [0.0] * count)

    def recursion() -> list[torch.Tensor]:
        return [
            ops.bias_hessian_activation(hessian[k], weight[k], saved[k], "sigmoid", 1.0, grad_input[k], GAMMA)
            for k in range(1, count)
        ]

    def plain_recursion() -> list[torch.Tensor]:
        out = []
        for k in range(1, count):
            d1 = saved[k] * (1 - saved[k])
            d2 = d1 * (1 - 2 * saved[k])
            out.append(reference.bias_hessian(hessian[k], weight[k], d1, d2, grad_input[k], GAMMA))
        return out

    ours = [p.clone() for p in weight], [p.clone() for p in bias]

    def update() -> list[torch.Tensor]:
        ops.eacg_update_(hessian, mean, gradient, bias_gradient, *ours, [], [], *settings, ITERATIONS, 0.0, False)
        return [*ours[0], *ours[1]]

    def system(h: torch.Tensor, shift: float, scale: torch.Tensor | float, rhs: torch.Tensor) -> torch.Tensor:
        """Conjugate gradients without a look at the residual, which would wait for the device."""
        x, r, p = torch.zeros_like(rhs), rhs, rhs
        rr = r @ r
        for _ in range(ITERATIONS):
            ap = scale * (h @ p) + shift * p
            step = rr / (p @ ap)
            x, r = x + step * p, r - step * ap
            rr, previous = r @ r, rr
            p = r + rr / previous * p
        return x

    def plain_update() -> list[torch.Tensor]:
        for h, a, b, g, w, c in zip(hessian, mean, gradient, bias_gradient, weight, bias, strict=True):
            s, u = a @ a, b @ a
            z = (u - ALPHA * system(h, ALPHA, (1 - ALPHA) * s, u)) / s
            w.add_(b - torch.outer(z, a), alpha=-1e-6 / ALPHA)
            c.add_(system(h, ALPHA, 1 - ALPHA, -g), alpha=1e-6)
        return [*weight, *bias]

    inverse = [torch.eye(o, device=device) for _, o in pairs]
    plain_inverse = [h.clone() for h in inverse]

    def bfgs() -> list[torch.Tensor]:
        ops.damped_bfgs_update_(inverse, s, y, MU1, MU2)
        return inverse

    def plain_bfgs() -> list[torch.Tensor]:
        for h, s_l, y_l in zip(plain_inverse, s, y, strict=True):
            hy, sy = h @ y_l, s_l @ y_l
            yhy = y_l @ hy
            theta = torch.where(sy < MU1 * yhy, (1 - MU1) * yhy / (yhy - sy), 1)
            s_l = theta * s_l + (1 - theta) * hy
            sy, ss = s_l @ y_l, s_l @ s_l
            theta = torch.where(sy < MU2 * ss, (1 - MU2) * ss / (ss - sy), 1)
            y_l = theta * y_l + (1 - theta) * s_l
            q, rho = h @ y_l, 1 / (s_l @ y_l)
            cross = torch.outer(s_l, q)
            h.add_(rho * (1 + rho * (y_l @ q)) * torch.outer(s_l, s_l) - rho * (cross + cross.T))
        return plain_inverse

    hidden = pairs[1:]
    squares, weights = sum(o * o for _, o in pairs), sum(i * o for i, o in pairs)
    return [
        Comparison(
            "bias_hessian", recursion, plain_recursion,
            4.0 * sum(o * o + 3 * o * i + 2 * BATCH * i + i * i for i, o in hidden),
            float(sum(2 * o * o * i + (o + BATCH) * i * (i + 1) for i, o in hidden)),
        ),
        Comparison(
            "eacg_update_", update, plain_update,
            4.0 * (4 * weights + squares), 7.0 * weights + 4 * ITERATIONS * squares,
        ),
        Comparison("damped_bfgs_update_", bfgs, plain_bfgs, 12.0 * squares, 8.0 * squares),
    ]  # fmt: skip


# What a function is turned into before it is timed.
FORMS: dict[str, Callable[[Callable], Callable[[], object]]] = {
    "eager": lambda function: function,
    "torch.compile": torch.compile,
    "CUDA graph": graphed,
}
OURS = ("eager", "CUDA graph")


def timed(name: str, make: Callable[[], Callable[[], object]], clock: Callable[[Callable], float]) -> float | str:
    """Milliseconds; or what went wrong, so that one form that fails does not cost the report of the others."""
    try:
        return clock(make())
    except RuntimeError as error:
        print(f"{name}: {error}")
        return f"failed: {str(error).splitlines()[0]}"


def operators(
    device: str = "cuda",
    forms: dict[str, Callable[[Callable], Callable[[], object]]] = FORMS,
    clock: Callable[[Callable], float] = milliseconds,
    limits: Callable[[], tuple[float, float]] = ceilings,
) -> Iterator[Row]:
    """Every operator in every form, at both precisions, and what share of the machine's ceilings its fastest form reaches."""
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        bandwidth, product = limits()
        for comparison in comparisons(device):
            row: Row = {"operator": comparison.name, "float32 matmul precision": precision}
            for name, form in forms.items():
                row[f"plain, {name}, ms"] = timed(name, lambda f=form, c=comparison: f(c.plain), clock)
            times = {name: timed(name, lambda f=forms[name], c=comparison: f(c.ours), clock) for name in OURS if name in forms}
            row |= {f"secondorder, {name}, ms": time for name, time in times.items()}
            seconds = [time * 1e-3 for time in times.values() if not isinstance(time, str)]
            if seconds:
                row["of copy bandwidth"] = comparison.bytes / min(seconds) / bandwidth
                row["of matrix product"] = comparison.flops / min(seconds) / product
            row |= {"copy, GB/s": bandwidth / 1e9, "matrix product, TFLOP/s": product / 1e12}
            yield row
    torch.set_float32_matmul_precision("highest")


def recursion(
    device: str = "cuda",
    sizes: tuple[tuple[int, int, int], ...] = RECURSION_SIZES,
    clock: Callable[[Callable], float] = milliseconds,
) -> Iterator[Row]:
    """`bias_hessian` of one Sigmoid layer by size, beside cuBLAS and elementwise passes, and beside the products alone."""
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        for k, n, m in sizes:
            root, weight = torch.randn(k, k, device=device), torch.randn(k, n, device=device)
            hessian = root @ root.T / k
            saved, grad_input = torch.rand(m, n, device=device), torch.randn(m, n, device=device)

            def ours(h=hessian, w=weight, s=saved, g=grad_input) -> torch.Tensor:
                return ops.bias_hessian_activation(h, w, s, "sigmoid", 1.0, g, GAMMA)

            def plain(h=hessian, w=weight, s=saved, g=grad_input) -> torch.Tensor:
                d1 = s * (1 - s)
                return reference.bias_hessian(h, w, d1, d1 * (1 - 2 * s), g, GAMMA)

            def products(h=hessian, w=weight, s=saved) -> tuple[torch.Tensor, torch.Tensor]:
                return s.T @ s, w.T @ (h @ w)

            yield {
                "k": k,
                "n": n,
                "m": m,
                "float32 matmul precision": precision,
                "secondorder, ms": clock(ours),
                "cuBLAS and elementwise, ms": clock(plain),
                "three cuBLAS products alone, ms": clock(products),
            }
    torch.set_float32_matmul_precision("highest")


Make = Callable[[nn.Module, nn.Module], torch.optim.Optimizer]
# name: (the optimizer, whether its step needs a closure).
OPTIMIZERS: dict[str, tuple[Make, bool]] = {
    "SGD, momentum, fused": (lambda m, c: torch.optim.SGD(m.parameters(), 0.01, momentum=0.9, fused=True), False),
    "Adam, fused": (lambda m, c: torch.optim.Adam(m.parameters(), 1e-3, fused=True), False),
    "Adam, fused, CUDA graph": (lambda m, c: torch.optim.Adam(m.parameters(), 1e-3, fused=True, capturable=True), False),
    "EigenAdam": (lambda m, c: so.EigenAdam(m), False),
    "EigenAdam, CUDA graph": (lambda m, c: so.EigenAdam(m, capturable=True), False),
    "EACG": (lambda m, c: so.EACG(m, c, lr=0.02), False),
    "EACG, CUDA graph": (lambda m, c: so.EACG(m, c, lr=0.02, capturable=True), False),
    "EACG, curvature_every=5": (lambda m, c: so.EACG(m, c, lr=0.02, curvature_every=5), False),
    "LayerwiseNewton": (lambda m, c: so.LayerwiseNewton(m, c), False),
    "KFAC": (lambda m, c: so.KFAC(m, c), False),
    "KBFGS": (lambda m, c: so.KBFGS(m, c, lr=0.1), True),
    "KBFGSL": (lambda m, c: so.KBFGSL(m, c, lr=0.1), True),
}
FIRST_STEPS = 6  # before one is captured
NETS = {"3072-1024-512-256-128-64-32-16-10": 1000, "784-4096-4096-10": 1024, "784-256-128-64-32-10": 100}  # the batch
PERIOD = 20  # steps: a multiple of every period of renewal, and as many as KFAC renews its inverses at first


def training_step(sizes: list[int], batch: int, make: Make, closure_needed: bool, device: str) -> Callable[[], object]:
    """One step of a net with Tanh on noise."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, o in zip(sizes, sizes[1:]):
        layers += [nn.Linear(i, o), nn.Tanh()]
    model, criterion = nn.Sequential(*layers[:-1]).to(device), nn.CrossEntropyLoss()
    x, y = torch.randn(batch, sizes[0], device=device), torch.randint(sizes[-1], (batch,), device=device)
    optimizer = make(model, criterion)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        return loss

    def step() -> object:
        if closure_needed:
            return optimizer.step(closure)
        closure()
        return optimizer.step()

    return step


def step_times(step: Callable[[], object], wait: Callable[[], object]) -> Row:
    """Milliseconds on the host's clock, after a period: of single steps waited for, and on average of a queue of them."""
    for _ in range(PERIOD):
        step()
    wait()
    times = []
    for _ in range(2 * PERIOD):
        begin = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    for _ in range(2 * PERIOD):
        step()
    wait()
    mean = (time.perf_counter() - begin) / (2 * PERIOD)
    return {"median ms, each step waited for": statistics.median(times) * 1e3, "mean ms, steps queued": mean * 1e3}


def step_counts(step: Callable[[], object]) -> Row:
    """On average over a period: host waits that PyTorch knows of; kernels, copies and fills launched, and their time."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(PERIOD):
            step()
    torch.cuda.set_sync_debug_mode("default")
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        for _ in range(PERIOD):
            step()
        torch.cuda.synchronize()
    launched = [
        event
        for event in profiled.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        # The optimizer's own range spans kernels that are there themselves.
        and not (getattr(event, "is_user_annotation", False) or event.name.startswith("Optimizer."))
    ]
    return {
        "kernel ms": sum(event.device_time for event in launched) / PERIOD / 1e3,
        "launches": len(launched) / PERIOD,
        "host waits": sum("synchroniz" in str(warning.message) for warning in seen) / PERIOD,
    }


def training(device: str = "cuda", nets: dict[str, int] = NETS) -> Iterator[Row]:
    """A training step by net and optimizer at "high"; what goes wrong with one does not cost the others."""
    torch.set_float32_matmul_precision("high")
    for net, batch in nets.items():
        for name, (make, closure_needed) in OPTIMIZERS.items():
            row: Row = {"net": net, "batch": batch, "optimizer": name, "float32 matmul precision": "high"}
            try:
                step = training_step([int(size) for size in net.split("-")], batch, make, closure_needed, device)
                if name.endswith("CUDA graph") and device == "cuda":
                    step = graphed(step, FIRST_STEPS)
                row |= step_times(step, torch.cuda.synchronize if device == "cuda" else lambda: None)
                row |= step_counts(step) if device == "cuda" else {}
            except Exception as error:  # whatever it is, the next optimizer can still be timed
                row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
            yield row
    torch.set_float32_matmul_precision("highest")


MEASUREMENTS: dict[str, Callable[[], Iterator[Row]]] = {"recursion": recursion, "training": training, "operators": operators}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measurement", choices=MEASUREMENTS)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = []
    for row in MEASUREMENTS[arguments.measurement]():
        rows.append(row)
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
        print(row, flush=True)


if __name__ == "__main__":
    main()
