"""Builds with CUDA, tests and measures on a GPU, and writes REPORT.md and REPORT.json. Needs a GPU and the CUDA toolkit.

`python -m bench.tools.gpu_report [--out build/gpu-report]`
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
BATCH, ITERATIONS, ALPHA, GAMMA, MU1, MU2 = 1000, 20, 0.1, -1.0, 0.2, 0.001


def run(name: str, command: list[str], **environment: str) -> dict[str, object]:
    """One step's exit status and the end of its output."""
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    print(f"{name}: exit status {result.returncode}")
    return {"step": name, "command": " ".join(command), "status": result.returncode,
            "tail": (result.stdout + result.stderr)[-2000:]}  # fmt: skip


def checks() -> list[dict[str, object]]:
    """The build, the GPU tests, and the same tests under compute-sanitizer's tools."""
    tests = [sys.executable, "-m", "pytest", "tests/test_gpu.py"]
    steps = [
        run("build", [sys.executable, "-m", "pip", "install", "--no-build-isolation", "-e", "."], SECONDORDER_CUDA="1"),
        run("tests", tests),
    ]
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        if shutil.which("compute-sanitizer") is None:
            steps.append({"step": tool, "command": "compute-sanitizer", "status": "not on PATH", "tail": ""})
            continue
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *tests, "-k", "not graph and not trains"]
        steps.append(run(tool, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))
    return steps


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


def graphed(function: Callable[[], object]) -> Callable[[], None]:
    """The function as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
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
    from bench.timing import CIFAR_NET  # not before the build: this imports secondorder
    from secondorder import ops, reference

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


def measurements(
    device: str = "cuda",
    forms: dict[str, Callable[[Callable], Callable[[], object]]] = FORMS,
    clock: Callable[[Callable], float] = milliseconds,
    limits: Callable[[], tuple[float, float]] = ceilings,
) -> list[dict[str, object]]:
    """Every operator in every form, at both precisions, and what share of the machine's ceilings its fastest form reaches."""
    rows: list[dict[str, object]] = []
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        bandwidth, product = limits()
        for comparison in comparisons(device):
            row: dict[str, object] = {"operator": comparison.name, "float32 matmul precision": precision}
            for name, form in forms.items():
                row[f"plain, {name}, ms"] = timed(name, lambda f=form, c=comparison: f(c.plain), clock)
            times = {name: timed(name, lambda f=forms[name], c=comparison: f(c.ours), clock) for name in OURS if name in forms}
            row |= {f"secondorder, {name}, ms": time for name, time in times.items()}
            seconds = [time * 1e-3 for time in times.values() if not isinstance(time, str)]
            if seconds:
                row["of copy bandwidth"] = comparison.bytes / min(seconds) / bandwidth
                row["of matrix product"] = comparison.flops / min(seconds) / product
            row |= {"copy, GB/s": bandwidth / 1e9, "matrix product, TFLOP/s": product / 1e12}
            rows.append(row)
    torch.set_float32_matmul_precision("highest")
    return rows


def markdown(report: dict) -> str:
    """The report as a page."""
    lines = ["# secondorder on a GPU", "", "Command: `python -m bench.tools.gpu_report`", ""]
    lines += [f"- {key}: {report[key]}" for key in ("GPU", "torch", "CUDA")]
    lines += [f"- {step['step']}: exit status {step['status']} (`{step['command']}`)" for step in report["steps"]] + [""]
    columns = list(dict.fromkeys(key for row in report["rows"] for key in row))
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in report["rows"]:
        cells = [row.get(column, "") for column in columns]
        lines.append("| " + " | ".join(cell if isinstance(cell, str) else f"{cell:.3f}" for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu-report"))
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        sys.exit("gpu_report: no GPU is visible to torch; it can neither test nor measure")
    report = {"GPU": torch.cuda.get_device_name(), "torch": torch.__version__, "CUDA": torch.version.cuda,
              "steps": checks(), "rows": measurements()}  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "REPORT.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "REPORT.md").write_text(markdown(report))
    print(markdown(report))
    sys.exit(any(step["status"] != 0 for step in report["steps"]))


if __name__ == "__main__":
    main()
