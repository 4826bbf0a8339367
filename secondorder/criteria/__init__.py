"""The papers' criteria, and the Hessians of any criterion with respect to the network's output."""

from secondorder.criteria.added_roots import added_up, densely_added_up, differences_added_up
from secondorder.criteria.autograd import autograd_hessian, autograd_root, check_second_derivatives, tangent_map
from secondorder.criteria.hessians import KnownForm, OutputHessian, analytic_hessian, known_form
from secondorder.criteria.known import (
    LateMasses,
    by_position,
    divides_by_masses,
    element_masses,
    is_convex,
    is_fixed,
    link_of,
    of_difference,
    row_masses,
)
from secondorder.criteria.likelihoods import likelihood_root
from secondorder.criteria.losses import BoundedClassificationLoss, CompositeLoss, FunctionCriterion, TukeyBiweightLoss
from secondorder.criteria.reduction import reduction_of, sums_rows
from secondorder.criteria.roots import LikelihoodRoot, OutputRoot, SampledRoot

__all__ = [
    "BoundedClassificationLoss", "CompositeLoss", "FunctionCriterion", "KnownForm", "LateMasses", "LikelihoodRoot",
    "OutputHessian", "OutputRoot", "SampledRoot", "TukeyBiweightLoss", "added_up", "analytic_hessian", "autograd_hessian",
    "autograd_root", "by_position", "check_second_derivatives", "densely_added_up", "differences_added_up",
    "divides_by_masses", "element_masses", "is_convex", "is_fixed", "known_form", "likelihood_root", "link_of",
    "of_difference", "reduction_of", "row_masses", "sums_rows", "tangent_map",
]  # fmt: skip
