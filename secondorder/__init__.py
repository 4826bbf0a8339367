"""Fast second-order optimizers for PyTorch.

`EACG` is a drop-in torch optimizer, `KBFGS` and `KBFGSL` are ones whose step takes a closure; `ops` holds their operators,
`reference` the operators' plain-PyTorch twins, `criteria` the papers' criteria.
"""

from typing import Any

import torch

try:
    from secondorder import _C
except ImportError as error:
    raise ImportError(
        "secondorder: its compiled extension is missing or does not fit this torch "
        f"({torch.__version__}): {error}. Compile it against the installed torch: `pip install .` in the "
        "source folder (`pip install -e . --no-build-isolation` to work on it)."
    ) from error

from secondorder import criteria, diagnostics, ops, reference
from secondorder.errors import NonFiniteError
from secondorder.optim import EACG, KBFGS, KBFGSL, KFAC, KFLR, KFRA

__all__ = [
    "EACG", "KBFGS", "KBFGSL", "KFAC", "KFLR", "KFRA", "NonFiniteError",
    "build_info", "criteria", "diagnostics", "ops", "reference",
]  # fmt: skip
__version__ = "0.2.0"


def build_info() -> dict[str, Any]:
    """How the extension was built, and what it runs with here.

    Returns:
        "compiler", "cxx_standard", "torch" (the version built against), "cuda_architectures" (None: without CUDA), "openmp",
        "vectors" (the widest this machine has: "avx512", "avx2" or "baseline") and "threads".
    """
    return {**_C.build_info(), "threads": torch.get_num_threads()}
