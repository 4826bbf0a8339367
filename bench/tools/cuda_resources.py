"""Prints what ptxas reports of every kernel, the occupancy that follows, and roofline floors, as Markdown.

`python -m bench.tools.cuda_resources` needs nvcc and no GPU. Every time in these tables is computed.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench.timing import CIFAR_NET

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
BATCH, ITERATIONS, PAIRS = 1000, 20, 100
DIRECTIONS, FULL = 16, 33  # of a side in EigenAdam at this batch, and the sides that take all
COMBINED = 4096  # the net's layers are too small for cuBLAS and combine_kernel


@dataclass
class Kernel:
    """One kernel as ptxas compiled it for one architecture."""

    name: str
    architecture: str
    stack: int = 0
    spills: int = 0
    registers: int = 0
    shared: int = 0


def compile_kernels(source: Path, architectures: tuple[str, ...]) -> list[Kernel]:
    """Compiles one kernel file, warnings being errors, for each architecture and as PTX of the last."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    targets.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", "--threads=2", "--Werror", "all-warnings", "-Xcompiler", "-Wall",
                   "-Xptxas", "-v,-warn-spills,-warn-lmem-usage,-Werror", *targets, "-c", str(source),
                   "-o", f"{folder}/kernel.o"]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return parse(result.stdout + result.stderr)


def parse(report: str) -> list[Kernel]:
    """The kernels in ptxas' report."""
    kernels: list[Kernel] = []
    names = demangle(re.findall(r"Compiling entry function '(\w+)'", report))
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            kernels.append(Kernel(names[match[1]], match[2]))
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernels[-1].stack, kernels[-1].spills = int(match[1]), int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            kernels[-1].registers = int(match[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[-1].shared = int(shared[1]) if shared else 0
    return kernels


def demangle(symbols: list[str]) -> dict[str, str]:
    """Symbols to short names such as `recursion_kernel<Simt<float, 64>>`."""
    lines = subprocess.run(["c++filt", *symbols], capture_output=True, text=True, check=True).stdout.splitlines()
    names = {}
    for symbol, line in zip(symbols, lines, strict=True):
        line = re.sub(r"secondorder::cuda::|\(anonymous namespace\)::|^void ", "", line)
        line = re.sub(r"\(\w+\)(?=\d)", "", line).replace("> >", ">>")  # an enumerator's type
        names[symbol] = re.sub(r"<((?:Simt|TensorCores)<.*?>), \w+>", r"<\1>", line.split("(", 1)[0])
    return names


THREADS = {"directions_kernel": 512, "orthonormal_kernel": 512}  # others: 256
TILED = {"products_kernel", "residual_kernel", "update_kernel"}  # of eigen_*.cu


def occupancy(source: str, kernel: Kernel) -> int:
    """Resident warps of a multiprocessor of compute capability 9.0 (64 warps, 64 Ki registers, 228 KiB shared memory)."""
    name = kernel.name.split("<")[0]
    warps = THREADS.get(name, 256) // 32
    if source.startswith("eigen") and name in TILED:
        warps = 4
    registers = -(-kernel.registers // 8) * 8 * 32 * warps
    shared = kernel.shared + 1024  # what the system keeps of each block's
    return min(64 // warps, 65536 // registers, 228 * 1024 // shared) * warps


# An H200 SXM's, by its data sheet: bytes/s, and FLOP/s of multiply-adds and of dense products on tensor cores.
BANDWIDTH, FLOAT32, FLOAT64, TF32 = 4.8e12, 67e12, 34e12, 495e12


def floors() -> list[tuple[str, float, float, float]]:
    """(kernel, bytes, FLOPs, FLOP/s) in float32, summed over the layers of CIFAR_NET, every array counted once."""
    pairs = list(zip(CIFAR_NET, CIFAR_NET[1:]))
    hidden = pairs[1:]  # the recursion reaches the first layer's output
    outputs = sum(o for _, o in pairs)
    squares = sum(o * o for _, o in pairs)
    input_squares = sum((i + 1) ** 2 for i, _ in pairs)
    weights = sum(i * o for i, o in pairs)
    columns = sum(i + 1 for i, _ in pairs)
    elements = BATCH * sum(i for i, _ in hidden)
    products = (  # H W, and the lower triangle of d1^T d1
        sum(4 * (o * o + 2 * o * i + 2 * BATCH * i + i * (i + 1) // 2) for i, o in hidden),
        sum(2 * o * o * i + BATCH * i * (i + 1) for i, o in hidden),
    )
    recursion = (
        sum(4 * (2 * o * i + i * (i + 1) // 2 + i * i) for i, o in hidden),
        sum(o * i * (i + 1) for i, o in hidden),
    )
    sides = [tuple(n if n <= FULL else DIRECTIONS for n in pair) for pair in pairs]
    skinny = sum(2 * i * o * (ki + ko) for (i, o), (ki, ko) in zip(pairs, sides, strict=True))  # one pass of products
    with_residual = [(i * o, 2 * i * o * (ki + ko)) for (i, o), (ki, ko) in zip(pairs, sides, strict=True) if ki < i and ko < o]
    return [
        ("derivatives_kernel, sigmoid", 12 * elements, 5 * elements, FLOAT32),
        *(
            (f"{name}, {arithmetic}", size, times * work, rate)
            for name, (size, work) in (("products_kernel (bias_hessian)", products), ("recursion_kernel", recursion))
            for arithmetic, times, rate in (("float32", 1, FLOAT32), ("split TF32", 3, TF32), ("TF32", 1, TF32))
        ),
        (f"combine_kernel, n = {COMBINED}", 8 * COMBINED**2, 2 * COMBINED**2, FLOAT32),
        ("products_kernel (EA-CG)", 4 * weights, 2 * weights, FLOAT32),
        (f"directions_kernel, {ITERATIONS} iterations", 4 * squares, 4 * squares * ITERATIONS, FLOAT32),
        ("update_kernel (EA-CG), no momentum", 12 * weights, 5 * weights, FLOAT32),
        ("products_kernel (K-BFGS), H y and H s", 4 * squares, 4 * squares, FLOAT32),
        ("products_kernel (K-BFGS), one of Hessian action", 4 * input_squares, 2 * input_squares, FLOAT32),
        ("damping_kernel", 20 * outputs, 16 * outputs, FLOAT64),
        ("factors_kernel", 28 * outputs, 16 * outputs, FLOAT64),
        ("update_kernel (K-BFGS)", 8 * squares, 4 * squares, FLOAT32),
        (
            f"middle_kernel, {PAIRS} pairs",
            16 * PAIRS**2 * len(pairs) + 16 * PAIRS * columns,
            4 * PAIRS**2 * columns,
            FLOAT64,
        ),
        (f"push_kernel, {PAIRS} pairs", 16 * PAIRS * outputs, 0, FLOAT32),
        ("products_kernel (EigenAdam)", 4 * weights, skinny, FLOAT32),
        ("residual_kernel", 24 * sum(size for size, _ in with_residual), 2 * sum(work for _, work in with_residual), FLOAT32),
        ("update_kernel (EigenAdam)", 16 * weights, skinny, FLOAT32),
    ]


def tables() -> str:
    """The Markdown of both tables."""
    lines = ["| kernel | registers | static shared memory, bytes | resident warps of 64 |", "|---|---|---|---|"]
    for source in SOURCES:
        for kernel in compile_kernels(source, ("90",)):
            lines.append(
                f"| {source.stem}: `{kernel.name}` | {kernel.registers} | {kernel.shared} | {occupancy(source.stem, kernel)} |"
            )
    lines += ["", "| kernel | MB | GFLOP | floor on an H200, µs (computed) | bound by |", "|---|---|---|---|---|"]
    for name, size, work, rate in floors():
        memory, arithmetic = size / BANDWIDTH, work / rate
        bound = "memory" if memory > arithmetic else "arithmetic"
        lines.append(f"| {name} | {size / 1e6:.2f} | {work / 1e9:.3f} | {max(memory, arithmetic) * 1e6:.2f} | {bound} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
