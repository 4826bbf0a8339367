"""The operators in plain PyTorch: what `secondorder.ops` must equal, and what stands in for it where there is no kernel.

Each function reads like its equation, has the signature of its twin in `secondorder.ops`, which documents it, and works on any
device and dtype. It does not check its arguments, and nothing here is fast on purpose. Nothing of the package is imported here,
so that tests may compare the package with these functions.
"""

from secondorder.reference.activation import activation_derivatives
from secondorder.reference.averages import average_, mean_inputs
from secondorder.reference.bfgs import (
    bfgs_update_,
    damped_bfgs_update_,
    damped_lbfgs_update_,
    double_damping,
    hessian_action_update_,
    lbfgs_product,
)
from secondorder.reference.bias_hessian import bias_hessian, bias_hessian_activation, bias_hessian_chain, pos_eig
from secondorder.reference.cross_entropy import cross_entropy_hessian
from secondorder.reference.eacg import conjugate_gradient, eacg_hvp, eacg_solve, eacg_update_
from secondorder.reference.eigen import eigen_control_, eigen_length, eigen_renew_, eigen_sketch_, eigen_step_
from secondorder.reference.eigen_rows import eigen_renew_rows_, eigen_shapes, eigen_split, eigen_step_rows_
from secondorder.reference.jacobian import jacobian_rows_
from secondorder.reference.precondition import precondition

__all__ = [
    "activation_derivatives",
    "average_",
    "bfgs_update_",
    "bias_hessian",
    "bias_hessian_activation",
    "bias_hessian_chain",
    "conjugate_gradient",
    "cross_entropy_hessian",
    "damped_bfgs_update_",
    "damped_lbfgs_update_",
    "double_damping",
    "eacg_hvp",
    "eacg_solve",
    "eacg_update_",
    "eigen_control_",
    "eigen_length",
    "eigen_renew_",
    "eigen_renew_rows_",
    "eigen_shapes",
    "eigen_sketch_",
    "eigen_split",
    "eigen_step_",
    "eigen_step_rows_",
    "hessian_action_update_",
    "jacobian_rows_",
    "lbfgs_product",
    "mean_inputs",
    "pos_eig",
    "precondition",
]
