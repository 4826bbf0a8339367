"""The papers' criteria, and the Hessians of any criterion with respect to the network's output."""

from secondorder.criteria.autograd import autograd_hessian, autograd_root
from secondorder.criteria.hessians import OutputHessian, analytic_hessian, known_form
from secondorder.criteria.known import by_position, element_masses, row_masses, takes_log_probabilities
from secondorder.criteria.losses import BoundedClassificationLoss, CompositeLoss, FunctionCriterion, TukeyBiweightLoss
from secondorder.criteria.roots import LikelihoodRoot, OutputRoot, SampledRoot, likelihood_root

__all__ = [
    "BoundedClassificationLoss", "CompositeLoss", "FunctionCriterion", "LikelihoodRoot", "OutputHessian", "OutputRoot",
    "SampledRoot", "TukeyBiweightLoss", "analytic_hessian", "autograd_hessian", "autograd_root", "by_position",
    "element_masses", "known_form", "likelihood_root", "row_masses", "takes_log_probabilities",
]  # fmt: skip
