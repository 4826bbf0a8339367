"""The bias Hessian of every layer: which curvature a step uses. One file for each way to get it, found by its being here.

A curvature turns the tape's records into {layer: H [n_out, n_out]}, in the dtype of the layer's weight and on the scale of the
loss: for a mean loss H is a mean over the instances, for a sum it is the sum.
"""

import importlib
import pkgutil

from secondorder.curvature.base import CURVATURES, Curvature, curvature_by_name, register
from secondorder.curvature.columns import FisherExact, FisherMC, FromColumns, KFLRCurvature
from secondorder.curvature.empirical import FisherEmpirical, empirical_fisher
from secondorder.curvature.recursion import PCH, GaussNewton, Recursion

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "CURVATURES", "PCH", "Curvature", "FisherEmpirical", "FisherExact", "FisherMC", "FromColumns", "GaussNewton", "KFLRCurvature",
    "Recursion", "curvature_by_name", "empirical_fisher", "register",
]  # fmt: skip
