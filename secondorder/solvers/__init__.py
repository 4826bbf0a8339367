"""From a layer's curvature and gradients to its update directions: which linear system a step solves, and how.

For a layer z = W h + b with gradients B and g of the mean loss, bias Hessian H, input factor A ~ E[h h^T], a scale c and a
damping l, the directions P and d solve

    c H P A + l P = -B     and     (c H + l I) d = -g.

EACG's fixed damping alpha is c = 1 - alpha, l = alpha (Chen et al., Eq. 9); c = 1 is Levenberg-Marquardt's. The solvers
differ in A and in exactness:

| solver            | A                              | method                                     |
|-------------------|--------------------------------|--------------------------------------------|
| `ea-cg`           | a a^T (Eq. 11b)                | closed form across a, CG along it          |
| `ea-cg-truncated` | a a^T                          | the paper's CG iterates                    |
| `kron-cg`         | E[h h^T] (Eq. 11a)             | CG                                         |
| `kfi`             | E[h h^T], factored damping     | two inverses (Eq. 12)                      |
| `kfi-rank-one`    | a a^T, factored damping        | inverse and Sherman-Morrison (Eq. 13)      |
| `exact`           | E[h h^T]                       | both eigendecompositions                   |
| `ea-isotropic`    | a a^T + tr Cov(h) / n_in I     | three inverses of [n_out, n_out]           |
| `auto`            | that of either                 | `kfi` up to n_in = 1024, else `ea-isotropic` |

Every statistic of the input is an expectation, so that averages of it over steps are statistics again.
"""

import importlib
import pkgutil

from secondorder.solvers.auto import Auto
from secondorder.solvers.base import SOLVERS, Factors, Solver, SolverOptions, register, second_moment, solver_by_name
from secondorder.solvers.eacg import EACGSolver
from secondorder.solvers.exact import Exact
from secondorder.solvers.isotropic import Isotropic
from secondorder.solvers.kfi import KFI
from secondorder.solvers.kron_cg import KroneckerCG

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "KFI", "SOLVERS", "Auto", "EACGSolver", "Exact", "Factors", "Isotropic", "KroneckerCG", "Solver", "SolverOptions", "register",
    "second_moment", "solver_by_name",
]  # fmt: skip
