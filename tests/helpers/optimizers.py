"""Every optimizer of the package that takes a model and a criterion by a name, and the parameters that it leaves."""

import torch

import secondorder as so

FACTORED = {"lr": 0.1, "solver": "kfi", "momentum": 0.0, "weight_decay": 1e-5}
# Those with a learning rate, at one that fits these nets; the others take none.
FIXED = {
    "EACG": lambda m, c, **k: so.EACG(m, c, **{"lr": 0.1, **k}),
    "EACG-exact": lambda m, c, **k: so.EACG(m, c, **{"lr": 0.1, "solver": "exact", "curvature": "gauss-newton", **k}),
    "KFAC-lr": lambda m, c, **k: so.EACG(m, c, **{**FACTORED, "curvature": "fisher-mc", "inverse_every": 20, **k}),
    "KFRA-lr": lambda m, c, **k: so.EACG(m, c, **{**FACTORED, "curvature": "gauss-newton", "average": True, **k}),
    "KFLR-lr": lambda m, c, **k: so.EACG(m, c, **{**FACTORED, "curvature": "kflr", "average": True, **k}),
    "KBFGS": lambda m, c, **k: so.KBFGS(m, c, **{"lr": 0.1, **k}),
    "KBFGSL": lambda m, c, **k: so.KBFGSL(m, c, **{"lr": 0.1, "memory": 3, **k}),
}
OTHERS = {"EigenAdam", "LevenbergMarquardt"}  # those that take no criterion; each has tests of its own
ALL = {**FIXED, **{name: getattr(so, name) for name in so.optim.__all__ if name not in FIXED and name not in OTHERS}}


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])
