"""Fast second-order optimizers for PyTorch.

`EigenAdam` takes Adam's place in any training script; `LevenbergMarquardt` takes a closure, for losses that are sums of squares.
`EACG` is its paper's method with a learning rate; `LayerwiseNewton`, `KFAC`, `KFRA` and `KFLR` find their own step;
`KBFGS` and `KBFGSL` take a closure. `curvature` and `solvers` hold what they are made of, `ops` the operators, `reference` the
operators' plain-PyTorch twins, `criteria` the papers' criteria.
"""

from typing import Any

import torch

from secondorder import criteria, curvature, diagnostics, ops, reference, solvers
from secondorder._extension import compiled as _compiled
from secondorder.errors import NonFiniteError
from secondorder.optim import EACG, KBFGS, KBFGSL, KFAC, KFLR, KFRA, EigenAdam, LayerwiseNewton, LevenbergMarquardt

__all__ = [
    "EACG",
    "KBFGS",
    "KBFGSL",
    "KFAC",
    "KFLR",
    "KFRA",
    "EigenAdam",
    "LayerwiseNewton",
    "LevenbergMarquardt",
    "NonFiniteError",
    "build_info",
    "criteria",
    "curvature",
    "diagnostics",
    "ops",
    "reference",
    "solvers",
]  # fmt: skip
__version__ = "0.2.0"


def build_info() -> dict[str, Any]:
    """How the extension was built, and what it runs with here.

    Returns:
        "extension": whether there is one; without it plain PyTorch stands in, and the next six are missing.
        "compiler", "cxx_standard", "torch" (the version built against), "cuda_architectures" (None: without CUDA), "openmp",
        "vectors" (the widest this machine has: "avx512", "avx2" or "baseline"), and "threads", those of torch.
    """
    built = {} if _compiled is None else _compiled.build_info()
    return {"extension": _compiled is not None, **built, "threads": torch.get_num_threads()}
