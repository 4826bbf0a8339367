"""What the cases of all kernels share: their registry, arrays in allocations of their own, and how accurate is accurate."""

from collections.abc import Callable

import numpy as np
import torch
from harness import ACTIVATIONS as ACTIVATIONS
from harness import Kernels

DTYPES = (np.float32, np.float64)
BATCH = 20000  # a large one
MANY = 131  # matrices, more than a launch holds
PARAMETERS = {"leaky_relu": 0.1, "elu": 1.3, "softplus": 0.7}
CASES: dict[str, Callable[[Kernels], None]] = {}


def case(function: Callable[[Kernels], None]) -> Callable[[Kernels], None]:
    """Registers a case under its name."""
    CASES[function.__name__] = function
    return function


def placed(array: np.ndarray, offset: int = 0) -> np.ndarray:
    """A copy in an allocation of its own, 64-byte aligned plus `offset` elements, that ends where the array does."""
    skip = -(-64 // array.itemsize)
    base = np.full(array.size + skip + offset, np.nan, array.dtype)
    first = -base.ctypes.data % 64 // array.itemsize + offset
    view = base[first : first + array.size].reshape(array.shape)
    view[...] = array
    return view


def exact_size(array: np.ndarray) -> np.ndarray:
    """A copy whose allocation has the array's size to the byte, for AddressSanitizer."""
    return np.array(array, copy=True, order="C")


def normal(rng: np.random.Generator, *shape: int, dtype: type, offset: int | None = None) -> np.ndarray:
    """Normal numbers: `offset` None for an allocation of exact size, else from alignment on."""
    array = rng.standard_normal(shape).astype(dtype)
    return exact_size(array) if offset is None else placed(array, offset)


def spd(rng: np.random.Generator, n: int, dtype: type) -> np.ndarray:
    """A symmetric positive definite matrix with eigenvalues from about 0.1 to 3."""
    q = rng.standard_normal((n, n)) / max(n, 1) ** 0.5
    return exact_size((q @ q.T + 0.1 * np.eye(n)).astype(dtype))


def double(array: np.ndarray | None) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(array.astype(np.float64))


def same(array: np.ndarray | None) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(array)


def assert_accurate(actual: np.ndarray, exact: torch.Tensor, plain: torch.Tensor, slack: float = 16) -> None:
    """The error is at most twice that of plain PyTorch at the same dtype, plus `slack` roundings of the largest number."""
    exact_array = exact.numpy()
    assert actual.shape == exact_array.shape
    if actual.size == 0:
        return
    error = np.abs(actual - exact_array).max()
    allowed = 2 * np.abs(plain.numpy() - exact_array).max()
    allowed += slack * np.finfo(actual.dtype).eps * np.abs(exact_array).max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def few() -> None:
    """Races and the order of fibers do not depend on the values: one dtype and one activation or matrix of each kind."""
    global DTYPES, ACTIVATIONS, MANY, BATCH
    DTYPES, ACTIVATIONS, MANY, BATCH = (np.float32,), ["tanh", "gelu"], 3, 300
