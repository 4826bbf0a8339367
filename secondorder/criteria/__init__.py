"""The papers' criteria, and the Hessians of any criterion with respect to the network's output."""

from secondorder.criteria.autograd import autograd_hessian, autograd_root
from secondorder.criteria.hessians import OutputHessian, analytic_hessian, nonconvex_hessian
from secondorder.criteria.known import row_masses, takes_log_probabilities
from secondorder.criteria.losses import BoundedClassificationLoss, FunctionCriterion, TukeyBiweightLoss
from secondorder.criteria.roots import LikelihoodRoot, OutputRoot, likelihood_root

__all__ = [
    "BoundedClassificationLoss", "FunctionCriterion", "LikelihoodRoot", "OutputHessian", "OutputRoot", "TukeyBiweightLoss",
    "analytic_hessian", "autograd_hessian", "autograd_root", "likelihood_root", "nonconvex_hessian", "row_masses",
    "takes_log_probabilities",
]  # fmt: skip
