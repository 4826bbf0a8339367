"""The optimizers, one file each over what `base` shares."""

from secondorder.optim.eacg import EACG

__all__ = ["EACG"]
