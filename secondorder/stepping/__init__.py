"""Steps that find their own length.

Those of LayerwiseNewton, KFAC, KFRA and KFLR, which are given here, go by a quadratic model of the recorded loss:
`quadratic_model`, its products, trial losses and the dampings that follow. Those of LevenbergMarquardt, in `gauss_newton_step`
and the modules that it imports, go by the exact Jacobian of the residuals of a closure's loss.
"""

from secondorder.stepping.closure_loss import ClosureLoss
from secondorder.stepping.damping_loop import Damping, DampingSchedule, LevenbergMarquardtLoop, LossTrend, TrialLoss
from secondorder.stepping.local_loss import CannotReplay, LocalLoss
from secondorder.stepping.quadratic_model import QuadraticModel, QuadraticTerms, Step

__all__ = [
    "CannotReplay", "ClosureLoss", "Damping", "DampingSchedule", "LevenbergMarquardtLoop", "LocalLoss", "LossTrend",
    "QuadraticModel", "QuadraticTerms", "Step", "TrialLoss",
]  # fmt: skip
