"""Arrays of more than 2^32 elements."""

import math
import mmap

import numpy as np
from case_tools import case, double
from harness import BfgsLayer, Kernels

from secondorder import reference

# Which are too large to be watched word by word.
WITHOUT_RACE_CHECK = {"indices_beyond_32_bits"}


def sparse(*shape: int) -> np.ndarray:
    """Zeros of float32 that take memory only where they are written."""
    size = 4 * math.prod(shape)
    no_reserve = 0x4000  # which `mmap` has a name for from Python 3.13 on
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return np.frombuffer(memory, np.float32).reshape(shape)


@case
def indices_beyond_32_bits(kernels: Kernels) -> None:
    """The last block alone, of an array and of a matrix with more than 2^32 elements."""
    rng = np.random.default_rng(18)
    z, *out = (sparse(2**32 + 5) for _ in range(3))
    z[-5:] = rng.standard_normal(5)
    kernels.run_last_blocks(1)
    results = kernels.activation_derivatives(z, "softplus", 1.0, tuple(out))
    for result, exact in zip(results, reference.activation_derivatives(double(z[-5:]), "softplus", 1.0), strict=True):
        np.testing.assert_allclose(result[-5:], exact.numpy(), rtol=0, atol=2e-6)
    del z, out, results, result
    n = 65537  # the last row is alone in its block; H y is 0 in the others, which do not run
    h, s, y = sparse(n, n), np.zeros(n, np.float32), np.zeros(n, np.float32)
    last = slice(n - 3, n)
    h[-1, last], s[last], y[last] = [0.3, -0.7, 5], 1, rng.random(3)
    before = h[-1, last].astype(np.float64)
    hy = np.array([0, 0, before @ y[last]])
    rho = 1 / (s[last] @ y[last].astype(np.float64))
    expected = before - rho * (s[-1] * hy + hy[-1] * s[last]) + rho * (1 + rho * (y[last] @ hy)) * s[-1] * s[last]
    assert kernels.bfgs("bfgs_update", [BfgsLayer(h, s, y)]) == [1]
    np.testing.assert_allclose(h[-1, last], expected, rtol=1e-5)
