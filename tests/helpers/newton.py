"""Optimizers that find their step, with every solver; and EACG or LayerwiseNewton, by a learning rate or without."""

import secondorder as so
from secondorder.solvers import SOLVERS

OPTIMIZERS = {
    **{
        f"LayerwiseNewton {s}": lambda m, c, s=s: so.LayerwiseNewton(m, c, solver=s, inverse_every=3, average=True)
        for s in SOLVERS
    },
    "LayerwiseNewton": lambda m, c: so.LayerwiseNewton(m, c, curvature_every=2, weight_decay=1e-3),
    "KFAC": lambda m, c: so.KFAC(m, c, inverse_every=2),
    "KFRA": lambda m, c: so.KFRA(m, c),
    "KFLR": lambda m, c: so.KFLR(m, c),
}


def stepping(model, criterion, lr, alpha=0.1, **kwargs):
    """EACG with this learning rate; None: LayerwiseNewton."""
    return so.LayerwiseNewton(model, criterion, **kwargs) if lr is None else so.EACG(model, criterion, lr, alpha=alpha, **kwargs)
