"""Steps that find their own length: a quadratic model of the loss, its products, trial losses and the dampings that follow."""

from secondorder.stepping.closure_loss import ClosureLoss
from secondorder.stepping.levenberg_marquardt import Damping, DampingSchedule, LevenbergMarquardtLoop, LossTrend, TrialLoss
from secondorder.stepping.local_loss import CannotReplay, LocalLoss
from secondorder.stepping.quadratic_model import QuadraticModel, QuadraticTerms, Step

__all__ = [
    "CannotReplay", "ClosureLoss", "Damping", "DampingSchedule", "LevenbergMarquardtLoop", "LocalLoss", "LossTrend",
    "QuadraticModel", "QuadraticTerms", "Step", "TrialLoss",
]  # fmt: skip
