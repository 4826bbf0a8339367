"""The CUDA kernels without a GPU: compiled by nvcc for every architecture, and their source run on the CPU."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "cuda_on_cpu"), str(ROOT)]

import case_tools  # noqa: E402
import cases  # noqa: E402
import cases_bfgs  # noqa: E402
import cases_eacg  # noqa: E402
import cases_eigen  # noqa: E402
import cases_large  # noqa: E402
import harness  # noqa: E402
from bugs import BUGS  # noqa: E402

from bench.tools import cuda_resources  # noqa: E402

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
emulated = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None,
    reason="running kernels on the CPU needs g++ on x86-64",
)


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return harness.build(tmp_path_factory.mktemp("kernels"), list(BUGS.values()))


def outcomes_of(mode: str, library: Path, jobs: list[dict]) -> list[dict]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if mode == "address":
        # Python itself is not instrumented, so that the sanitizer must be loaded before it, and with it what throws C++'s
        # exceptions: the sanitizer looks for that once, at the start, and triton, which a CUDA build of torch has, throws.
        preloaded = [
            subprocess.run(["g++", f"-print-file-name={library}"], capture_output=True, text=True, check=True).stdout.strip()
            for library in ("libasan.so", "libstdc++.so")
        ]
        environment |= {"LD_PRELOAD": " ".join(preloaded), "ASAN_OPTIONS": "detect_leaks=0"}
    script = ROOT / "tests" / "cuda_on_cpu" / "cases.py"
    result = subprocess.run(
        [sys.executable, script, library], input=json.dumps(jobs), env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="session")
def outcomes(libraries: dict[str, Path]) -> dict[tuple[str, str, str, int], dict]:
    """What became of every case under every check, and of every bug, by (mode, case, order, bug); -1: no bug.

    The shuffled order has all that a case has; what the other two may show does not depend on the dtype.
    """
    jobs = {mode: [] for mode in harness.MODES}
    for name in cases.CASES:
        jobs["values"] += [{"case": name, "order": order, "planted": -1, "few": order != "shuffled"} for order in harness.ORDERS]
        jobs["address"].append({"case": name, "order": "shuffled", "planted": -1, "few": False})
        if name not in cases_large.WITHOUT_RACE_CHECK:
            jobs["races"].append({"case": name, "order": "shuffled", "planted": -1, "few": True})
    for number, bug in enumerate(BUGS.values()):
        jobs[bug.mode].append({"case": bug.case, "order": "shuffled", "planted": number, "few": bug.mode != "values"})
    found = {}
    for mode, library in libraries.items():
        for outcome in outcomes_of(mode, library, jobs[mode]):
            found[mode, outcome["case"], outcome["order"], outcome["planted"]] = outcome
    return found


@emulated
@pytest.mark.parametrize("order", harness.ORDERS)
@pytest.mark.parametrize("name", cases.CASES)
def test_values(outcomes: dict, name: str, order: str) -> None:
    assert outcomes["values", name, order, -1]["error"] is None


@emulated
@pytest.mark.parametrize("name", cases.CASES)
def test_no_access_beyond_an_array(outcomes: dict, name: str) -> None:
    assert outcomes["address", name, "shuffled", -1]["error"] is None


@emulated
@pytest.mark.parametrize("name", [name for name in cases.CASES if name not in cases_large.WITHOUT_RACE_CHECK])
def test_no_races(outcomes: dict, name: str) -> None:
    outcome = outcomes["races", name, "shuffled", -1]
    assert (outcome["error"], outcome["races"]) == (None, [])


@emulated
@pytest.mark.parametrize("number", range(len(BUGS)), ids=BUGS)
def test_planted_bug_is_caught(outcomes: dict, number: int) -> None:
    bug = list(BUGS.values())[number]
    outcome = outcomes[bug.mode, bug.case, "shuffled", number]
    if bug.mode == "address":
        assert "AddressSanitizer: heap-buffer-overflow" in outcome["error"]
    elif bug.mode == "races":  # a race may show in the values too
        assert outcome["races"] or "not aligned" in (outcome["error"] or "")
    else:
        assert outcome["error"].startswith(("AssertionError", "RuntimeError"))


@emulated
def test_emulated_tensor_core(libraries: dict[str, Path]) -> None:
    """Against the product of matrices that are laid out by the PTX manual's tables."""
    rng = np.random.default_rng(0)
    a, b, d = (rng.integers(-8, 8, shape).astype(np.float32) for shape in ((16, 8), (8, 8), (16, 8)))
    expected = d + a @ b  # exact
    harness.Kernels(libraries["values"]).mma(a, b, d)
    np.testing.assert_array_equal(d, expected)


def mma_operands(folder: Path, header: str) -> list[int]:
    """Of which element of (d, a, b) each operand of the PTX instruction is, that nvcc makes of mma_m16n8k8 in this header."""
    (folder / "tensor_cores.cuh").write_text(header)
    (folder / "mma.cu").write_text("""
#include "tensor_cores.cuh"
__global__ void mma(float* p) {
  float d[4], a[4], b[2];
  for (int i = 0; i < 4; ++i) { d[i] = p[i]; a[i] = p[4 + i]; }
  for (int i = 0; i < 2; ++i) b[i] = p[8 + i];
  secondorder::cuda::mma_m16n8k8(d, a, b);
  for (int i = 0; i < 4; ++i) p[i] = d[i];
}""")
    command = ["nvcc", "-std=c++17", "-arch=sm_80", "-ptx", f"-I{folder}", f"-I{harness.KERNELS}", "mma.cu", "-o", "mma.ptx"]
    subprocess.run(command, cwd=folder, check=True)
    text = (folder / "mma.ptx").read_text()
    sources = {}
    for register, offset in re.findall(r"ld\.global\.[fbu]32\s+(%\w+), \[%\w+(?:\+(\d+))?\]", text):
        sources[register] = int(offset or 0) // 4
    for register, source in re.findall(r"mov\.b32\s+(%\w+), (%\w+);", text):
        sources[register] = sources[source]
    instruction = re.search(r"mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.tf32\.tf32\.f32([^;]*);", text)
    stores = re.findall(r"st\.global\.[fbu]32\s+\[%\w+(?:\+(\d+))?\], (%\w+);", text)
    results = {register: int(offset or 0) // 4 for offset, register in stores}
    operands = re.findall(r"%\w+", instruction[1])
    return [results[register] for register in operands[:4]] + [sources[register] for register in operands[4:]]


@needs_nvcc
def test_operands_of_the_tensor_core_instruction(tmp_path: Path) -> None:
    """d, a, b and c of mma.sync are the arrays' elements in order, which the emulation takes for granted."""
    header = (harness.KERNELS / "tensor_cores.cuh").read_text()
    assert mma_operands(tmp_path, header) == [*range(4), *range(4, 8), 8, 9, *range(4)]
    swapped = header.replace("{%4, %5, %6, %7}", "{%4, %6, %5, %7}")
    assert swapped != header
    assert mma_operands(tmp_path, swapped) == [*range(4), 4, 6, 5, 7, 8, 9, *range(4)]


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
        "begin_renewal_kernel", "products_kernel", "curvature_kernel", "parts_kernel", "products_kernel", "candidates_kernel",
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
        layers = cases_eacg.eacg_layers(rng, np.float32, cases_eacg.NET, None)
        kernels.eacg(layers, 20, 0.0, False, True, harness.Device(multiprocessors=132))
    elif launcher == "eigen_sketch":
        sketch, inputs, shift = (rng.standard_normal(shape) for shape in ((4, 9), (7, 9), (9,)))
        kernels.eigen_sketch(sketch, inputs, cases_eigen.orthonormal(rng, 3, 9, np.float64), shift, 132)
    elif launcher.startswith("eigen"):
        net, settings = cases_eigen.eigen_net(rng, np.float32, cases_eigen.EIGEN_NET), (cases_eigen.eigen_control(), 132)
        if launcher == "eigen_renew":
            kernels.eigen_renew(net, *settings)
        else:
            kernels.eigen_step(net, *settings, *cases_eigen.EIGEN_RULE, False)
    else:
        memories = [cases_bfgs.memory(rng, 2, 0, n, np.float32) for n in (3, 17, 9)]
        kernels.bfgs(launcher, [
            harness.BfgsLayer(
                case_tools.spd(rng, pairs.shape[1], np.float32), pairs[0], pairs[0], hy=pairs[0].copy(), s_pairs=pairs,
                y_pairs=other, matrix=case_tools.spd(rng, pairs.shape[1], np.float32),
            )
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
def test_the_driver_compiles_for_a_gpu(tmp_path: Path) -> None:
    """It links with the kernels, and Python finds there what it calls."""
    kernels = harness.Kernels(harness.build_for_gpu(tmp_path, "sm_90"))
    entries = re.findall(r"int (\w+)_##suffix", (harness.HERE / "driver.cpp").read_text())
    assert len(entries) >= 8
    for entry in entries:
        assert getattr(kernels.library, f"{entry}_float32")


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
