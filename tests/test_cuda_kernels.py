"""The CUDA kernels without a GPU: compiled by nvcc for every architecture, and their source run on the CPU."""

import contextlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "cuda_on_cpu"), str(ROOT)]

import cases  # noqa: E402
import harness  # noqa: E402

from bench.tools import cuda_resources  # noqa: E402

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
emulated = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None,
    reason="running kernels on the CPU needs g++ on x86-64",
)


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kernels")
    return {mode: harness.build(mode, folder / mode) for mode in harness.MODES}


def run_with_address_sanitizer(library: Path, names: list[str]) -> subprocess.CompletedProcess[str]:
    """Python itself is not instrumented, so that the sanitizer must be loaded before it."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {**os.environ, "LD_PRELOAD": runtime.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    script = ROOT / "tests" / "cuda_on_cpu" / "cases.py"
    return subprocess.run([sys.executable, script, library, "shuffled", *names], env=environment, capture_output=True, text=True)


@emulated
@pytest.mark.parametrize("order", harness.ORDERS)
@pytest.mark.parametrize("name", cases.CASES)
def test_values(libraries: dict[str, Path], name: str, order: str) -> None:
    kernels = harness.Kernels(libraries["values"])
    kernels.configure(order, seed=1)
    cases.CASES[name](kernels)


@emulated
def test_no_access_beyond_an_array(libraries: dict[str, Path]) -> None:
    result = run_with_address_sanitizer(libraries["address"], list(cases.CASES))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[1::2] == list(cases.CASES)


def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Races do not depend on the values: one dtype and one activation or matrix of each kind are enough."""
    monkeypatch.setattr(cases, "DTYPES", (np.float32,))
    monkeypatch.setattr(cases, "ACTIVATIONS", ["tanh", "gelu"])
    monkeypatch.setattr(cases, "EIGEN_NET", [cases.EIGEN_NET[k] for k in (2, 5, 8)])
    monkeypatch.setattr(cases, "MANY", 3)


@emulated
@pytest.mark.parametrize("name", cases.CASES)
def test_no_races(libraries: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    kernels = harness.Kernels(libraries["races"])
    kernels.configure("shuffled", seed=2)
    cases.CASES[name](kernels)
    assert kernels.races() == []


# What is broken: (what must see it, the case, the kernel file compiled, the file changed, old, new).
BUGS = {
    "missing barrier after a chunk is stored": (
        "races", "bias_hessian_large_tile", "bias_hessian.cu", "bias_hessian.cu",
        "    store_chunk(k, stage);\n    __syncthreads();", "    store_chunk(k, stage);",
    ),
    "missing barrier between two uses of a sum's memory": (
        "races", "bfgs_update", "bfgs.cu", "reduce.cuh", "partial[c][lane] : 0.0);\n  __syncthreads();",
        "partial[c][lane] : 0.0);",
    ),
    "missing fence in the barrier of a group": (
        "races", "eacg_every_plan", "eacg.cu", "eacg.cu", "    __threadfence();\n    atomicAdd", "    atomicAdd",
    ),
    "one buffer where two alternate": (
        "values", "eacg_every_plan", "eacg.cu", "eacg.cu", "(iteration & 1) * kSystems * n", "0",
    ),
    "off-by-one guard of a row": (
        "address", "bfgs_update", "bfgs.cu", "bfgs.cu", "if (row >= n) return;", "if (row > n) return;",
    ),
    "off-by-one guard of a tile": (
        "address", "bias_hessian_large_tile", "bias_hessian.cu", "bias_hessian.cu",
        "row >= n || col > row) return", "row > n || col > row) return",
    ),
    "vector loads without a look at the alignment": (
        "values", "activation_derivatives", "activation.cu", "activation.cu", "if (aligned(n, saved, d1, d2))",
        "if (true)",
    ),
    "wrong mask of a shuffle": (
        "values", "bfgs_update", "bfgs.cu", "reduce.cuh", "v += __shfl_xor_sync(0xffffffffu", "v += __shfl_xor_sync(0x0000ffffu",
    ),
    "missing mirror image": (
        "values", "bias_hessian_large_tile", "bias_hessian.cu", "bias_hessian.cu", "    out[col * n + row] = g[i];\n", "",
    ),
    "missing barrier between two rows of a substitution": (
        "races", "lbfgs_product", "bfgs.cu", "bfgs.cu", "diagonal(i);\n    }\n    __syncthreads();", "diagonal(i);\n    }",
    ),
    "last part of a batch as long as the others": (
        "address", "bias_hessian_parts", "bias_hessian.cu", "bias_hessian.cu",
        "return (part + 1) * rows < m ? (part + 1) * rows : m;", "return (part + 1) * rows;",
    ),
    "one part of the sums read for all": (
        "values", "bias_hessian_parts", "bias_hessian.cu", "bias_hessian.cu", "sum += work.sums[part * work.side",
        "sum += work.sums[0 * work.side",
    ),
    "missing barrier before the sums of the rows' threads": (
        "races", "bias_hessian_parts", "bias_hessian.cu", "bias_hessian.cu", "= sum[e];\n  __syncthreads();", "= sum[e];",
    ),
    "off-by-one row of a memory": (
        "address", "damped_lbfgs", "bfgs.cu", "bfgs.cu", "row + 1 < in.pairs", "row < in.pairs",
    ),
    "wrong element of a fragment": (
        "values", "bias_hessian_tf32", "bias_hessian.cu", "bias_hessian.cu",
        "x[d + member + e / 2 * 4][row + i * 16 + e % 2 * 8]", "x[d + member + e % 2 * 4][row + i * 16 + e / 2 * 8]",
    ),
    "split without one of its products": (
        "values", "bias_hessian_split_tf32", "bias_hessian.cu", "bias_hessian.cu",
        "            mma_m16n8k8(sum, a.large, b[j].small);\n", "",
    ),
    "bound that lets an overflow through": (
        "values", "eacg_overflow", "eacg.cu", "eacg.cu", "bound * reach <= kLargest<T> / 8", "bound <= kLargest<T>",
    ),
    "bound of a direction without what lies across the mean input": (
        "values", "eacg_bounded", "eacg.cu", "eacg.cu", "sqrt(c * c * across * across + squares[0])", "sqrt(squares[0])",
    ),
    "missing barrier between two groups of vectors": (
        "races", "eigen_step", "eigen_step.cu", "eigen.cuh", "    __syncthreads();  // what was there has been used\n", "",
    ),
    "missing barrier between two uses of a slice": (
        "races", "eigen_step", "eigen_step.cu", "eigen_step.cu", "corner_sums);\n    __syncthreads();\n    if (residual)",
        "corner_sums);\n    if (residual)",
    ),
    "off-by-one guard of a strip": (
        "address", "eigen_step", "eigen_step.cu", "eigen.cuh", "inside = column < this->p;", "inside = column <= this->p;",
    ),
    "sums of a chunk's last tile alone": (
        "values", "eigen_step", "eigen_step.cu", "eigen.cuh", "at.first ? sum[e] : *target + sum[e]", "sum[e]",
    ),
    "one sampled row for all": ("values", "eigen_step", "eigen_step.cu", "eigen_step.cu", "          ++sample;\n", ""),
    "elements without a gradient that move": (
        "values", "eigen_step", "eigen_step.cu", "eigen_step.cu", "g[b] == T(0) ? T(0) : tile.own(row + b)", "tile.own(row + b)",
    ),
    "a renewal's mean taken out once": (
        "values", "eigen_renew", "eigen_renew.cu", "eigen_renew.cu", " - along * move + rows", " + rows",
    ),
    "a bias Hessian's last row left out": (
        "values", "eigen_renew", "eigen_renew.cu", "eigen_renew.cu", "  if (i >= n) return;\n  const T *const row",
        "  if (i >= n - 1) return;\n  const T *const row",
    ),
    "off-by-one guard of a bias Hessian's rows": (
        "address", "eigen_renew", "eigen_renew.cu", "eigen_renew.cu", "  if (i >= n) return;\n  const T *const row",
        "  if (i > n) return;\n  const T *const row",
    ),
    "a bias Hessian that is not looked at": (
        "values", "eigen_refused", "eigen_renew.cu", "eigen_renew.cu", "  if (!finite) atomicOr(refused, 1);\n}", "}",
    ),
    "first moments turned the other way": (
        "values", "eigen_renew", "eigen_renew.cu", "eigen_renew.cu", "row[w] * b[w * kv + v]", "row[w] * b[v * kv + w]",
    ),
    "one Gram-Schmidt pass": (
        "values", "eigen_lost_directions", "eigen_renew.cu", "eigen_renew.cu", "if (pass == 1) break;", "break;",
    ),
    "a bias whose gradient is not looked at": (
        "values", "eigen_refused", "eigen_step.cu", "eigen_passes.cuh", " && squares[1] < kLargest<T> / 4", "",
    ),
    "barrier that not every thread reaches": (
        "values", "bfgs_update", "bfgs.cu", "reduce.cuh", "partial[c][warp] = v[c];\n  }\n  __syncthreads();",
        "partial[c][warp] = v[c];\n  }\n  if (warp > 0) __syncthreads();",
    ),
}  # fmt: skip


@emulated
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(libraries: dict[str, Path], bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    mode, name, *change = BUGS[bug]
    library = harness.build_with_bug(mode, libraries[mode], tmp_path / "bug", *change)
    if mode == "address":
        result = run_with_address_sanitizer(library, [name])
        assert result.returncode != 0
        assert "AddressSanitizer: heap-buffer-overflow" in result.stderr
        return
    kernels = harness.Kernels(library)
    kernels.configure("shuffled", seed=3)
    if mode == "races":
        with np.errstate(all="ignore"), contextlib.suppress(AssertionError):  # a race may show in the values too
            cases.CASES[name](kernels)
        assert kernels.races() != []
    else:
        with pytest.raises((AssertionError, RuntimeError)):
            cases.CASES[name](kernels)


# Of a net, however many layers it has. The emulated run-time library has nothing that waits for the device: what is
# listed here is all that an operator does.
LAUNCHES = {
    "eacg": ["memset", "products_kernel", "directions_kernel", "update_kernel"],
    "double_damping": ["products_kernel", "damping_kernel"],
    "bfgs_update": ["products_kernel", "factors_kernel", "update_kernel"],
    "damped_bfgs_update": ["products_kernel", "damping_kernel", "products_kernel", "factors_kernel", "update_kernel"],
    "hessian_action_update": ["products_kernel"] * 3 + ["factors_kernel", "update_kernel"],
    "damped_lbfgs_update": ["damping_kernel", "push_kernel"],
    "eigen_sketch": ["products_kernel", "parts_kernel", "products_kernel", "sketch_kernel"],
    "eigen_renew": [
        "memset", "products_kernel", "parts_kernel", "curvature_kernel", "products_kernel", "candidates_kernel",
        "orthonormal_kernel", "overlaps_kernel", "turns_kernel", "moments_kernel", "finish_renewal_kernel",
    ],
    "eigen_step": [
        "memset", "products_kernel", "parts_kernel", "corner_kernel", "sides_kernel", "residual_kernel",
        "whole_parts_kernel", "corner_kernel", "sides_kernel", "update_kernel", "finish_step_kernel",
    ],
}  # fmt: skip


@emulated
@pytest.mark.parametrize("launcher", LAUNCHES)
def test_launches_of_a_net(libraries: dict[str, Path], launcher: str) -> None:
    kernels, rng = harness.Kernels(libraries["values"]), np.random.default_rng(0)
    if launcher == "eacg":
        layers = cases.eacg_layers(rng, np.float32, cases.NET, None)
        kernels.eacg(layers, 20, 0.0, False, True, harness.Device(multiprocessors=132))
    elif launcher == "eigen_sketch":
        sketch, inputs, shift = (rng.standard_normal(shape) for shape in ((4, 9), (7, 9), (9,)))
        kernels.eigen_sketch(sketch, inputs, cases.orthonormal(rng, 3, 9, np.float64), shift, 132)
    elif launcher.startswith("eigen"):
        net, settings = cases.eigen_net(rng, np.float32, cases.EIGEN_NET), (cases.eigen_control(), 132)
        if launcher == "eigen_renew":
            kernels.eigen_renew(net, *settings)
        else:
            kernels.eigen_step(net, *settings, *cases.EIGEN_RULE, False)
    else:
        memories = [cases.memory(rng, 2, 0, n, np.float32) for n in (3, 17, 9)]
        kernels.bfgs(launcher, [
            harness.BfgsLayer(cases.spd(rng, pairs.shape[1], np.float32), pairs[0], pairs[0], hy=pairs[0].copy(), s_pairs=pairs,
                              y_pairs=other, matrix=cases.spd(rng, pairs.shape[1], np.float32))
            for pairs, other in memories
        ])  # fmt: skip
    assert [launch.split("<")[0].strip("(") for launch in kernels.launches()] == LAUNCHES[launcher]


@needs_nvcc
@pytest.mark.parametrize("source", cuda_resources.SOURCES, ids=lambda source: source.stem)
def test_compiles_without_spills(source: Path) -> None:
    kernels = cuda_resources.compile_kernels(source, cuda_resources.ARCHITECTURES)
    assert {kernel.architecture for kernel in kernels} == set(cuda_resources.ARCHITECTURES)
    for kernel in kernels:
        assert 0 < kernel.registers <= 255, kernel
        assert kernel.spills == 0, kernel
        assert kernel.stack == 0, kernel  # a stack frame is local memory
        assert kernel.shared <= 48 << 10, kernel


@needs_nvcc
@pytest.mark.parametrize("glue", sorted((ROOT / "csrc" / "cuda").glob("*_cuda.cpp")), ids=lambda path: path.stem)
def test_glue_compiles_against_a_cpu_torch(glue: Path, tmp_path: Path) -> None:
    """The classic c10 headers need one stub there: the file in which a CUDA build of torch records its configuration."""
    stub = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    stub.parent.mkdir(parents=True)
    stub.touch()
    toolkit = Path(subprocess.run(
        ["nvcc", "--dryrun", "-v", "x.cu"], capture_output=True, text=True
    ).stderr.split("TOP=", 1)[1].split("\n", 1)[0])  # fmt: skip
    include = Path(torch.__file__).parent / "include"
    result = subprocess.run(
        ["g++", "-std=c++20", "-fsyntax-only", "-Wall", "-Werror", f"-isystem{tmp_path}", f"-isystem{include}",
         f"-isystem{include}/torch/csrc/api/include", f"-isystem{toolkit}/include", glue],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
