"""Compiles the CUDA kernels for the CPU (cuda_on_cpu.h) and calls their launchers on numpy arrays."""

import ctypes
import math
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
ACTIVATIONS = ["identity", "sigmoid", "tanh", "relu", "leaky_relu", "elu", "softplus", "silu", "gelu", "gelu_tanh"]
ARITHMETIC = ["plain", "split_tf32", "tf32"]
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}
MODES = {
    "values": (["-O2"], []),
    "address": (["-O1", "-g", "-fsanitize=address"], ["-fsanitize=address"]),
    "alignment": (["-O1", "-g", "-fsanitize=alignment", "-fno-sanitize-recover=alignment"], ["-fsanitize=alignment"]),
    "races": (["-O1", "-g", "-fsanitize=thread", "-DCUDA_ON_CPU_RACES"], ["-ldl"]),
}
# Without gnu-unique symbols, each library has state of its own though several are loaded.
FLAGS = ["-x", "c++", "-std=c++17", "-fPIC", "-fno-gnu-unique", "-Wall", "-Wno-unknown-pragmas", f"-I{HERE}"]


def build(mode: str, out: Path) -> Path:
    """The shared library of all kernels and the driver, in a new folder `out`."""
    out.mkdir(parents=True)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda source: compile_one(mode, source, KERNELS, out), [*SOURCES, HERE / "driver.cpp"]))
    return link(mode, out)


def build_with_bug(mode: str, healthy: Path, out: Path, source: str, file: str, old: str, new: str) -> Path:
    """The library with `old` replaced by `new` in `file`, and of the kernel files `source` alone compiled anew."""
    shutil.copytree(KERNELS.parent, out / "csrc", ignore=shutil.ignore_patterns("cpu", "ops"))
    patched = out / "csrc" / "cuda" / file
    text = patched.read_text()
    assert text.count(old) == 1, f"{old!r} must stand in {file} once"
    patched.write_text(text.replace(old, new))
    for object_file in healthy.parent.glob("*.o"):
        shutil.copy(object_file, out)
    compile_one(mode, out / "csrc" / "cuda" / source, patched.parent, out)
    return link(mode, out)


def compile_one(mode: str, source: Path, kernels: Path, out: Path) -> None:
    flags = [*FLAGS, f"-I{kernels}", *MODES[mode][0]]
    subprocess.run(["g++", *flags, "-c", source, "-o", out / f"{source.stem}.o"], check=True)


def link(mode: str, out: Path) -> Path:
    library = out / "kernels.so"
    subprocess.run(["g++", "-shared", *out.glob("*.o"), *MODES[mode][1], "-o", library], check=True)
    return library


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
        for name in ("message", "launches", "races"):
            getattr(self.library, name).restype = ctypes.c_char_p
        self.configure("forward")

    def configure(self, order: str, seed: int = 0) -> None:
        """Sets the order in which fibers and blocks run, and forgets the launches."""
        self.library.configure(ORDERS[order], ctypes.c_uint64(seed))

    def launches(self) -> list[str]:
        return self.library.launches().decode().splitlines()

    def races(self) -> list[str]:
        return self.library.races().decode().splitlines()

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
        self, launcher: str, layers: Sequence[BfgsLayer], mu1: float = 0.2, mu2: float = 0.001, damping: float = 0.0
    ) -> list[int]:
        """`launcher`: as in kernels.h; returns the statuses of the updates."""
        status = np.full(len(layers), -7, np.int64)
        launchers = ("double_damping", "bfgs_update", "damped_bfgs_update", "hessian_action_update", "damped_lbfgs_update")
        names = ("inverse_hessian", "s", "y", "damped_s", "damped_y", "matrix", "hy", "s_pairs", "y_pairs")
        self._call(
            "bfgs", layers[0].s.dtype, launchers.index(launcher), len(layers), longs([x.s.size for x in layers]),
            longs([0 if x.s_pairs is None else len(x.s_pairs) for x in layers]),
            *(pointers([getattr(x, name) for x in layers]) for name in names),
            ctypes.c_double(mu1), ctypes.c_double(mu2), ctypes.c_double(damping), pointer(status),
        )  # fmt: skip
        return status.tolist()

    def lbfgs_middle(self, sy: np.ndarray, yy: np.ndarray, columns: np.ndarray) -> None:
        """Writes to `columns` [2p, k]."""
        p, k = len(sy), columns.shape[1]
        self._call(
            "lbfgs_middle", columns.dtype, ctypes.c_int64(p), ctypes.c_int64(k), pointer(sy), pointer(yy), pointer(columns)
        )

    def eigen_sketch(
        self, sketch: np.ndarray, inputs: np.ndarray, basis: np.ndarray, shift: np.ndarray, multiprocessors: int
    ) -> None:
        """Adds to `sketch`."""
        sizes = (*inputs.shape, len(basis))
        self._call("eigen_sketch", sketch.dtype, *map(ctypes.c_int64, sizes),
                   *map(pointer, (inputs, basis, shift, sketch)), multiprocessors)  # fmt: skip

    def _eigen(self, name: str, matrices: Sequence[EigenMatrix], *arguments: object) -> None:
        """Calls a launcher with what all of EigenAdam's take first."""
        common = ("grad_weight", "grad_bias", "mean", "basis_out", "basis_in", "first")
        self._call(
            name, matrices[0].grad_weight.dtype if matrices else np.dtype(np.float32), len(matrices),
            longs([x.grad_weight.shape[0] for x in matrices]), longs([x.grad_weight.shape[1] for x in matrices]),
            longs([len(x.basis_out) for x in matrices]), longs([len(x.basis_in) for x in matrices]),
            *(pointers([getattr(x, field) for x in matrices]) for field in common), *arguments,
        )  # fmt: skip

    def eigen_renew(self, matrices: Sequence[EigenMatrix], control: np.ndarray, multiprocessors: int) -> None:
        """Writes to means, bases, scales, first moments and `control`."""
        lists = ("scale_out", "scale_in", "sketch", "bias_hessian")
        self._eigen(
            "eigen_renew", matrices, *(pointers([getattr(x, name) for x in matrices]) for name in lists),
            longs([x.rows for x in matrices]), doubles([x.share for x in matrices]), pointer(control), multiprocessors,
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
    ) -> None:
        """Writes to weights, biases, moments, last steps, sizes and `control`."""
        self._eigen(
            "eigen_step", matrices, *(pointers([getattr(x, f) for x in matrices]) for f in ("weight", "bias", "second", "last")),
            longs([x.sampled for x in matrices]), pointers([x.size for x in matrices]), longs([x.step for x in matrices]),
            *(doubles([getattr(x, f) for x in matrices]) for f in ("lr", "lr_bias", "decay", "decay_bias")),
            *map(ctypes.c_double, (beta1, beta2, eps)), renewed, pointer(control), multiprocessors,
        )  # fmt: skip
