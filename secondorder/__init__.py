"""Fast second-order optimizers for PyTorch.

`EigenAdam` replaces Adam in any training script. `LevenbergMarquardt` takes a closure, and trains on losses that are sums of
squares. The other optimizers implement the methods of four papers: `EACG` (Chen et al., 2019) has a learning rate;
`LayerwiseNewton`, with that paper's curvature, `KFAC` (Martens & Grosse, 2015), `KFRA` and `KFLR` (Botev et al., 2017) find their
own step; `KBFGS` and `KBFGSL` (Goldfarb et al., 2020) take a closure.

`curvature` and `solvers` hold the parts that these methods are made of, `criteria` the papers' criteria, `diagnostics`
comparisons with the true Hessian, `ops` the fused operators, and `reference` the operators in plain PyTorch.
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
    """Tells how the extension was built, and what it runs with here.

    Returns:
        "extension": whether there is one. Without it plain PyTorch stands in, and the next six entries are missing: "compiler",
        "cxx_standard", "torch" (the version built against), "cuda_architectures" (None: built without CUDA), "openmp", and
        "vectors" (the widest of this machine: "avx512", "avx2" or "baseline"). "threads": how many threads torch uses.
    """
    built = {} if _compiled is None else _compiled.build_info()
    return {"extension": _compiled is not None, **built, "threads": torch.get_num_threads()}
