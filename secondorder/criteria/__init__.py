"""The papers' criteria, and the Hessians of any criterion with respect to the network's output."""

from secondorder.criteria.autograd import autograd_hessian
from secondorder.criteria.hessians import OutputHessian, analytic_hessian
from secondorder.criteria.likelihoods import likelihood_root
from secondorder.criteria.losses import BoundedClassificationLoss, CompositeLoss, FunctionCriterion, TukeyBiweightLoss
from secondorder.criteria.roots import LikelihoodRoot, OutputRoot, SampledRoot

__all__ = [
    "BoundedClassificationLoss", "CompositeLoss", "FunctionCriterion", "LikelihoodRoot", "OutputHessian", "OutputRoot",
    "SampledRoot", "TukeyBiweightLoss", "analytic_hessian", "autograd_hessian", "likelihood_root",
]  # fmt: skip
