"""Builds with CUDA, tests and measures on a GPU, and writes REPORT.md and REPORT.json. Needs a GPU and the CUDA toolkit.

`python -m bench.gpu_report [--out build/gpu-report]`
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
BATCH, ITERATIONS, ALPHA, GAMMA = 1000, 20, 0.1, -1.0


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
    if shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *tests, "-k", "not graph"]
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
    """Bytes/s of a copy and FLOP/s of a float32 matrix product, as measured here."""
    torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    x = torch.randn(8192, 8192, device="cuda")
    copy = 2 * source.numel() * 4 / milliseconds(lambda: target.copy_(source)) * 1e3
    return copy, 2 * 8192**3 / milliseconds(lambda: x @ x) * 1e3


def operators() -> list[tuple[str, Callable[[], object], Callable[[], object], float, float]]:
    """(name, ours, plain PyTorch, bytes, FLOPs) for the layers of CIFAR_NET, every array counted once."""
    from bench.timing import CIFAR_NET  # not before the build: this imports secondorder
    from secondorder import ops, reference

    def psd(n: int) -> torch.Tensor:
        root = torch.randn(n, n, device="cuda") / n**0.5
        return root @ root.T

    pairs = list(zip(CIFAR_NET, CIFAR_NET[1:]))
    hessian = [psd(o) for _, o in pairs]
    weight = [torch.randn(o, i, device="cuda") / i**0.5 for i, o in pairs]
    bias = [torch.zeros(o, device="cuda") for _, o in pairs]
    mean = [torch.rand(i, device="cuda") for i, _ in pairs]
    gradient, bias_gradient = [torch.randn_like(w) for w in weight], [torch.randn_like(b) for b in bias]
    saved = [torch.rand(BATCH, i, device="cuda") for i, _ in pairs]
    grad_input = [torch.randn_like(s) for s in saved]
    count = len(pairs)
    settings = ([1e-6] * count, [ALPHA] * count, [0.0] * count, [0.0] * count)

    def recursion() -> None:
        for k in range(1, count):
            ops.bias_hessian_activation(hessian[k], weight[k], saved[k], "sigmoid", 1.0, grad_input[k], GAMMA)

    def plain_recursion() -> None:
        for k in range(1, count):
            d1 = saved[k] * (1 - saved[k])
            d2 = d1 * (1 - 2 * saved[k])
            reference.bias_hessian(hessian[k], weight[k], d1, d2, grad_input[k], GAMMA)

    def update() -> None:
        ops.eacg_update_(hessian, mean, gradient, bias_gradient, weight, bias, [], [], *settings, ITERATIONS, 0.0, False)

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

    def plain_update() -> None:
        for h, a, b, g, w, c in zip(hessian, mean, gradient, bias_gradient, weight, bias, strict=True):
            s, u = a @ a, b @ a
            z = (u - ALPHA * system(h, ALPHA, (1 - ALPHA) * s, u)) / s
            w.add_(b - torch.outer(z, a), alpha=-1e-6 / ALPHA)
            c.add_(system(h, ALPHA, 1 - ALPHA, -g), alpha=1e-6)

    hidden = pairs[1:]
    squares, weights = sum(o * o for _, o in pairs), sum(i * o for i, o in pairs)
    return [
        ("bias_hessian, all layers", recursion, plain_recursion,
         4.0 * sum(o * o + 3 * o * i + 2 * BATCH * i + i * i for i, o in hidden),
         float(sum(2 * o * o * i + (o + BATCH) * i * (i + 1) for i, o in hidden))),
        ("eacg_update_, all layers", update, plain_update,
         4.0 * (4 * weights + squares), 7.0 * weights + 4 * ITERATIONS * squares),
    ]  # fmt: skip


def measurements() -> dict[str, object]:
    """Times of every operator in every form, and what share of the machine's ceilings its fastest form reaches."""
    bandwidth, product = ceilings()
    rows = []
    for name, ours, plain, size, work in operators():
        row: dict[str, object] = {
            "operator": name,
            "plain, eager, ms": milliseconds(plain),
            "plain, torch.compile, ms": milliseconds(torch.compile(plain)),
            "plain, CUDA graph, ms": milliseconds(graphed(plain)),
            "secondorder, eager, ms": milliseconds(ours),
            "secondorder, CUDA graph, ms": (best := milliseconds(graphed(ours))),
            "of copy bandwidth": size / (best * 1e-3) / bandwidth,
            "of matrix product": work / (best * 1e-3) / product,
        }
        rows.append(row)
    return {"GPU": torch.cuda.get_device_name(), "torch": torch.__version__, "copy, GB/s": bandwidth / 1e9,
            "float32 matrix product, TFLOP/s": product / 1e12, "rows": rows}  # fmt: skip


def markdown(report: dict) -> str:
    """The report as a page."""
    measured = report["measured"]
    lines = ["# secondorder on a GPU", "", "Command: `python -m bench.gpu_report`", ""]
    lines += [f"- {step['step']}: exit status {step['status']} (`{step['command']}`)" for step in report["steps"]]
    lines += [f"- {key}: {value}" for key, value in measured.items() if key != "rows"] + [""]
    columns = list(measured["rows"][0])
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in measured["rows"]:
        lines.append("| " + " | ".join(v if isinstance(v, str) else f"{v:.3f}" for v in row.values()) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu-report"))
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        sys.exit("gpu_report: no GPU is visible to torch; it can neither test nor measure")
    report = {"steps": checks(), "measured": measurements()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "REPORT.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "REPORT.md").write_text(markdown(report))
    print(markdown(report))
    sys.exit(any(step["status"] for step in report["steps"]))


if __name__ == "__main__":
    main()
