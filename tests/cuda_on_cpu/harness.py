"""Compiles the CUDA kernels for the CPU (cuda_on_cpu.h) and calls their launchers on numpy arrays."""

import ctypes
import math
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "csrc" / "cuda"
SOURCES = sorted(KERNELS.glob("*.cu"))
EMULATION = [HERE / name for name in ("cuda_on_cpu.cpp", "driver.cpp", "races.cpp")]
ACTIVATIONS = ["identity", "sigmoid", "tanh", "relu", "leaky_relu", "elu", "softplus", "silu", "gelu", "gelu_tanh"]
ARITHMETIC = ["plain", "split_tf32", "tf32"]
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}


@dataclass(frozen=True)
class Bug:
    """A bug to plant: what must see it (a mode) in which case, and (file, old, new), where PLANTED is whether it is on."""

    mode: str
    case: str
    changes: tuple[tuple[str, str, str], ...]


# What kernel files are compiled for, and what is linked in.
MODES = {
    "values": (["-O2"], []),
    "address": (["-O1", "-g1", "-fsanitize=address"], ["-fsanitize=address"]),
    "races": (["-O1", "-g1", "-fsanitize=thread", "-DCUDA_ON_CPU_RACES"], ["-ldl"]),
}
# Without gnu-unique symbols, each library has state of its own though several are loaded.
FLAGS = ["-x", "c++", "-std=c++17", "-fPIC", "-fno-gnu-unique", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]


def build(out: Path, bugs: Sequence[Bug]) -> dict[str, Path]:
    """A shared library of all kernels and the driver for each mode, in `out`, with bugs to be switched on in them."""
    sources = out / "csrc"
    shutil.copytree(KERNELS.parent, sources, ignore=shutil.ignore_patterns("cpu", "ops"))
    plant(sources / "cuda", bugs)
    jobs = [(source, out / f"{source.stem}.o", ["-O2"]) for source in EMULATION]
    for mode, (flags, _) in MODES.items():
        (out / mode).mkdir()
        jobs += [(sources / "cuda" / source.name, out / mode / f"{source.stem}.o", flags) for source in SOURCES]
    jobs.sort(key=lambda job: "address" not in job[1].parts)  # the longest first

    def run(job: tuple[Path, Path, list[str]]) -> None:
        source, target, flags = job
        subprocess.run(["g++", *FLAGS, f"-I{HERE}", f"-I{sources / 'cuda'}", *flags, "-c", source, "-o", target], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, jobs))
    libraries = {}
    for mode, (_, link) in MODES.items():
        emulation = [out / f"{source.stem}.o" for source in EMULATION if mode == "races" or source.stem != "races"]
        libraries[mode] = out / mode / "kernels.so"
        subprocess.run(["g++", "-shared", *emulation, *(out / mode).glob("*.o"), *link, "-o", libraries[mode]], check=True)
    return libraries


def build_for_gpu(out: Path, architecture: str) -> Path:
    """A shared library of all kernels and the driver by nvcc, in `out`, which runs them on a GPU ("native": of this machine)."""
    command = ["nvcc", "-std=c++17", "-O3", f"-arch={architecture}", "-Xcompiler", "-fPIC", f"-I{KERNELS}"]

    def run(source: Path) -> Path:
        target = out / f"{source.stem}.o"
        subprocess.run([*command, "-x", "cu", "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(run, [*SOURCES, HERE / "driver.cpp"]))
    library = out / "kernels.so"
    subprocess.run(["nvcc", "-shared", f"-arch={architecture}", *objects, "-o", library], check=True)
    return library


def plant(kernels: Path, bugs: Sequence[Bug]) -> None:
    """Changes the kernels' source so that each bug is there where the emulation's `planted` has its number."""
    for number, bug in enumerate(bugs):
        for file, old, new in bug.changes:
            text = (kernels / file).read_text()
            assert text.count(old) == 1, f"{old!r} must stand in {file} once"
            assert "PLANTED" in new
            (kernels / file).write_text(text.replace(old, re.sub(r"\bPLANTED\b(?!\()", f"PLANTED({number})", new)))


def static_shared(library: Path) -> dict[int, int]:
    """Bytes of static shared memory of each kernel that has any, by the kernel's distance from `configure`."""
    table = subprocess.run(["nm", "-S", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    functions, variables = {}, []
    for line in table.splitlines():
        match line.split():
            case [address, _, "t" | "T" | "w" | "W", name]:
                functions[name] = int(address, 16)
            case [_, size, "b" | "d", name] if name.startswith("_ZZ"):
                variables.append((name, int(size, 16)))
    found: dict[int, int] = {}
    for name, size in variables:  # _ZZ <function> E <variable>
        owner = next((f for f in functions if f.startswith("_Z") and name[2:].startswith(f[1:] + "E")), None)
        if owner is not None and "_kernel" in owner:
            distance = functions[owner] - functions["configure"]
            found[distance] = found.get(distance, 0) + size
    return found


@dataclass
class EacgLayer:
    """One layer of an EA-CG call; `weight` and `bias` receive the result."""

    bias_hessian: np.ndarray
    mean_input: np.ndarray
    grad_weight: np.ndarray
    grad_bias: np.ndarray | None
    weight: np.ndarray
    bias: np.ndarray | None
    weight_momentum: np.ndarray | None = None
    bias_momentum: np.ndarray | None = None
    alpha: float = 0.1
    lr: float = 0.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    max_norm: float = math.inf


@dataclass
class BfgsLayer:
    """One layer of a K-BFGS call."""

    inverse_hessian: np.ndarray | None
    s: np.ndarray
    y: np.ndarray | None
    damped_s: np.ndarray | None = None
    damped_y: np.ndarray | None = None
    matrix: np.ndarray | None = None
    hy: np.ndarray | None = None
    hs: np.ndarray | None = None
    hhy: np.ndarray | None = None
    s_pairs: np.ndarray | None = None
    y_pairs: np.ndarray | None = None


@dataclass
class EigenMatrix:
    """One matrix in the operators of EigenAdam, arrays by the names that they have there; no bias is an array [0]."""

    grad_weight: np.ndarray
    grad_bias: np.ndarray
    mean: np.ndarray
    basis_out: np.ndarray
    basis_in: np.ndarray
    first: np.ndarray
    second: np.ndarray
    last: np.ndarray
    size: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    scale_out: np.ndarray
    scale_in: np.ndarray
    sketch: np.ndarray
    bias_hessian: np.ndarray
    rows: int = 0
    share: float = 0.3
    lr: float = 1.0
    lr_bias: float = 1.0
    decay: float = 0.0
    decay_bias: float = 0.0
    step: int = 0

    @property
    def sampled(self) -> int:
        """The rows of E that `last` holds."""
        (n, p), ku, kv, bias = self.grad_weight.shape, len(self.basis_out), len(self.basis_in), self.grad_bias.size > 0
        rest = (ku + (n if ku < n else 0)) * (kv + bias) + (ku * p if kv < p else 0)
        return (self.last.size - rest) // p


@dataclass
class Device:
    """What the launchers ask of a device."""

    multiprocessors: int = 4
    shared_bytes: int = 64 << 10


def pointer(array: np.ndarray | None) -> ctypes.c_void_p:
    """An array's address; None is null."""
    if array is None:
        return ctypes.c_void_p(None)
    if array.size == 0:
        return ctypes.c_void_p(None)
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def pointers(arrays: Sequence[np.ndarray | None]) -> ctypes.Array:
    return (ctypes.c_void_p * len(arrays))(*(pointer(a).value for a in arrays))


def doubles(values: Sequence[float]) -> ctypes.Array:
    return (ctypes.c_double * len(values))(*values)


def longs(values: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


@dataclass
class Kernels:
    """The launchers of one library, by the names of the operators. Outputs start as NaN."""

    path: Path
    library: ctypes.CDLL = field(init=False)

    def __post_init__(self) -> None:
        self.library = ctypes.CDLL(str(self.path))
        for name in ("message", "launches", *(["races"] if "races" in self.path.parts else [])):
            getattr(self.library, name).restype = ctypes.c_char_p
        for distance, size in static_shared(self.path).items() if hasattr(self.library, "set_static_shared") else ():
            self.library.set_static_shared(ctypes.c_int64(distance), ctypes.c_size_t(size))
        self.configure("forward")

    def configure(self, order: str, seed: int = 0, planted: int = -1) -> None:
        """Sets the order in which fibers and blocks run and the bug that is there, and forgets the launches."""
        self.library.configure(ORDERS[order], ctypes.c_uint64(seed), planted)

    def run_last_blocks(self, count: int) -> None:
        """Of every launch only so many blocks run, its last; workspaces start as zeros."""
        self.library.run_last_blocks(ctypes.c_size_t(count))

    def mma(self, a: np.ndarray, b: np.ndarray, d: np.ndarray) -> None:
        """d [16, 8] += a [16, 8] b [8, 8] by the emulated tensor core."""
        if self.library.mma(pointer(a), pointer(b), pointer(d)):
            raise RuntimeError(self.library.message().decode())

    def launches(self) -> list[str]:
        return self.library.launches().decode().splitlines()

    def races(self) -> list[str]:
        """Those found so far, where the library checks for them; forgets them."""
        return self.library.races().decode().splitlines() if "races" in self.path.parts else []

    def _call(self, name: str, dtype: np.dtype, *arguments: object) -> None:
        if getattr(self.library, f"{name}_{dtype}")(*arguments):
            raise RuntimeError(self.library.message().decode())

    def activation_derivatives(
        self, saved: np.ndarray, activation: str, parameter: float, out: tuple[np.ndarray, np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        d1, d2 = out or (np.full_like(saved, np.nan), np.full_like(saved, np.nan))
        self._call(
            "activation_derivatives", saved.dtype, ctypes.c_int64(saved.size), pointer(saved),
            ACTIVATIONS.index(activation), ctypes.c_double(parameter), pointer(d1), pointer(d2),
        )  # fmt: skip
        return d1, d2

    def bias_hessian(
        self,
        hessian: np.ndarray,
        weight: np.ndarray,
        first: np.ndarray,
        second: np.ndarray | None,
        grad_input: np.ndarray | None,
        gamma: float,
        activation: str | None = None,
        parameter: float = 1.0,
        arithmetic: str = "plain",
        multiprocessors: int = 1 << 20,
    ) -> np.ndarray:
        """`first` is d1, or what the activation saved; many multiprocessors mean the small tile."""
        (k, n), m = weight.shape, len(first)
        out = np.full((n, n), np.nan, weight.dtype)
        self._call(
            "bias_hessian", weight.dtype, ctypes.c_int64(k), ctypes.c_int64(n), ctypes.c_int64(m), pointer(hessian),
            pointer(weight), pointer(first), pointer(second), pointer(grad_input),
            -1 if activation is None else ACTIVATIONS.index(activation), ctypes.c_double(parameter),
            ctypes.c_double(gamma), ARITHMETIC.index(arithmetic), multiprocessors, pointer(out),
        )  # fmt: skip
        return out

    def bias_hessian_of_products(
        self, m: int, curvature: np.ndarray, moment: np.ndarray, sums: np.ndarray | None, gamma: float
    ) -> np.ndarray:
        out = np.full_like(curvature, np.nan)
        self._call(
            "bias_hessian_of_products", curvature.dtype, ctypes.c_int64(len(curvature)), ctypes.c_int64(m),
            pointer(curvature), pointer(moment), pointer(sums), ctypes.c_double(gamma), pointer(out),
        )  # fmt: skip
        return out

    def eacg(
        self, layers: Sequence[EacgLayer], max_iter: int, tol: float, truncated: bool, update: bool, device: Device
    ) -> list[int]:
        """Writes the directions, or updates the parameters; returns the iterations."""
        iterations = np.full(len(layers), -7, np.int64)
        names = ("bias_hessian", "mean_input", "grad_weight", "grad_bias",
                 "weight", "bias", "weight_momentum", "bias_momentum")  # fmt: skip
        self._call(
            "eacg", layers[0].weight.dtype, len(layers), longs([x.grad_weight.shape[0] for x in layers]),
            longs([x.grad_weight.shape[1] for x in layers]),
            *(pointers([getattr(x, name) for x in layers]) for name in names),
            *(doubles([getattr(x, name) for x in layers]) for name in ("alpha", "lr", "momentum", "weight_decay", "max_norm")),
            max_iter, ctypes.c_double(tol), truncated, update, device.multiprocessors, device.shared_bytes,
            pointer(iterations),
        )  # fmt: skip
        return iterations.tolist()

    def bfgs(
        self, launcher: str, layers: Sequence[BfgsLayer], mu1: float = 0.2, mu2: float = 0.001, damping: float = 0.0,
        *, damped: bool = True, bounded: bool = False,
    ) -> list[int]:  # fmt: skip
        """`launcher`: as in kernels.h; returns the statuses of the updates."""
        status = np.full(len(layers), -7, np.int64)
        launchers = ("double_damping", "bfgs_update", "damped_bfgs_update", "hessian_action_update", "damped_lbfgs_update")
        names = ("inverse_hessian", "s", "y", "damped_s", "damped_y", "matrix", "hy", "hs", "hhy", "s_pairs", "y_pairs")
        self._call(
            "bfgs", layers[0].s.dtype, launchers.index(launcher), len(layers), longs([x.s.size for x in layers]),
            longs([0 if x.s_pairs is None else len(x.s_pairs) for x in layers]),
            *(pointers([getattr(x, name) for x in layers]) for name in names),
            ctypes.c_double(mu1), ctypes.c_double(mu2), damped, bounded, ctypes.c_double(damping), pointer(status),
        )  # fmt: skip
        return status.tolist()

    def lbfgs_middle(self, sy: np.ndarray, yy: np.ndarray, columns: np.ndarray) -> None:
        """Writes to `columns` [2p, k]."""
        p, k = len(sy), columns.shape[1]
        arrays = (sy, np.ascontiguousarray(sy.T), yy, columns)
        self._call("lbfgs_middle", columns.dtype, ctypes.c_int64(p), ctypes.c_int64(k), *map(pointer, arrays))

    def eigen_sketch(
        self, sketch: np.ndarray, inputs: np.ndarray, basis: np.ndarray, shift: np.ndarray, multiprocessors: int,
        control: np.ndarray | None = None, renew_every: int = 0,
    ) -> None:  # fmt: skip
        """Adds to `sketch`."""
        sizes = (*inputs.shape, len(basis))
        self._call("eigen_sketch", sketch.dtype, *map(ctypes.c_int64, sizes),
                   *map(pointer, (inputs, basis, shift, sketch, control)), ctypes.c_int64(renew_every),
                   multiprocessors)  # fmt: skip

    def _eigen(self, name: str, matrices: Sequence[EigenMatrix], *arguments: object) -> None:
        """Calls a launcher with what all of EigenAdam's take first."""
        common = ("grad_weight", "grad_bias", "mean", "basis_out", "basis_in", "first")
        self._call(
            name, matrices[0].grad_weight.dtype if matrices else np.dtype(np.float32), len(matrices),
            longs([x.grad_weight.shape[0] for x in matrices]), longs([x.grad_weight.shape[1] for x in matrices]),
            longs([len(x.basis_out) for x in matrices]), longs([len(x.basis_in) for x in matrices]),
            *(pointers([getattr(x, field) for x in matrices]) for field in common), *arguments,
        )  # fmt: skip

    def eigen_renew(
        self, matrices: Sequence[EigenMatrix], control: np.ndarray, multiprocessors: int, renew_every: int = 0, since: int = 0,
        decay: float = 0.0,
    ) -> None:  # fmt: skip
        """Writes to means, bases, scales, first moments and `control`."""
        lists = ("scale_out", "scale_in", "sketch", "bias_hessian")
        self._eigen(
            "eigen_renew", matrices, *(pointers([getattr(x, name) for x in matrices]) for name in lists),
            longs([x.rows for x in matrices]), doubles([x.share for x in matrices]), *map(ctypes.c_int64, (renew_every, since)),
            ctypes.c_double(decay), pointer(control), multiprocessors,
        )  # fmt: skip

    def eigen_step(
        self,
        matrices: Sequence[EigenMatrix],
        control: np.ndarray,
        multiprocessors: int,
        beta1: float,
        beta2: float,
        eps: float,
        renewed: bool,
        renew_every: int = 0,
        since: int = 0,
        rate: np.ndarray | None = None,
    ) -> None:
        """Writes to weights, biases, moments, last steps, sizes and `control`."""
        self._eigen(
            "eigen_step", matrices, *(pointers([getattr(x, f) for x in matrices]) for f in ("weight", "bias", "second", "last")),
            longs([x.sampled for x in matrices]), pointers([x.size for x in matrices]), longs([x.step for x in matrices]),
            *(doubles([getattr(x, f) for x in matrices]) for f in ("lr", "lr_bias", "decay", "decay_bias")),
            *map(ctypes.c_double, (beta1, beta2, eps)), renewed, *map(ctypes.c_int64, (renew_every, since)), pointer(rate),
            pointer(control), multiprocessors,
        )  # fmt: skip
