"""The optimizers, one file each over what `base` and `layerwise` share."""

from secondorder.optim.eacg import EACG
from secondorder.optim.kbfgs import KBFGS, KBFGSL
from secondorder.optim.kfac import KFAC
from secondorder.optim.kflr import KFLR
from secondorder.optim.kfra import KFRA

__all__ = ["EACG", "KBFGS", "KBFGSL", "KFAC", "KFLR", "KFRA"]
