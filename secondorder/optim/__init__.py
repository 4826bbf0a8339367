"""The optimizers, one file each; files with an underscore hold what several share."""

from secondorder.optim.eacg import EACG
from secondorder.optim.eigen_adam import EigenAdam
from secondorder.optim.kbfgs import KBFGS
from secondorder.optim.kbfgsl import KBFGSL
from secondorder.optim.kfac import KFAC
from secondorder.optim.kflr import KFLR
from secondorder.optim.kfra import KFRA
from secondorder.optim.layerwise_newton import LayerwiseNewton
from secondorder.optim.levenberg_marquardt import LevenbergMarquardt

__all__ = ["EACG", "KBFGS", "KBFGSL", "KFAC", "KFLR", "KFRA", "EigenAdam", "LayerwiseNewton", "LevenbergMarquardt"]
