"""The optimizers, one file each over what `base` shares."""

from secondorder.optim.eacg import EACG
from secondorder.optim.kbfgs import KBFGS, KBFGSL

__all__ = ["EACG", "KBFGS", "KBFGSL"]
