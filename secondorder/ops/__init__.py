"""The operators of `secondorder`: fused C++ behind PyTorch's dispatcher, each with a plain twin in `secondorder.reference`.

Notation (docs/math.md): a linear layer computes z = W h + b. H is its bias Hessian [n_out, n_out], a = E[h] its mean input
[n_in], B and g the gradients of the mean loss with respect to W [n_out, n_in] and b [n_out]. All tensors of a call have one
dtype (float32 or float64) and one device; they need not be contiguous unless an operator writes to them. Wrong shapes,
devices and values raise ValueError, wrong dtypes TypeError, before anything is computed. No operator is differentiable:
tangents of forward mode raise NotImplementedError, and backward passes warn, as torch has them do.
"""

from secondorder.ops.activation import activation_derivatives
from secondorder.ops.averages import average_, mean_inputs
from secondorder.ops.bfgs import (
    DAMPED_S,
    DAMPED_Y,
    UPDATED,
    bfgs_update_,
    damped_bfgs_update_,
    damped_lbfgs_update_,
    double_damping,
    hessian_action_update_,
    lbfgs_product,
)
from secondorder.ops.bias_hessian import bias_hessian, bias_hessian_activation, bias_hessian_chain
from secondorder.ops.cross_entropy import cross_entropy_hessian
from secondorder.ops.eacg import eacg_hvp, eacg_solve, eacg_update_
from secondorder.ops.eigen import CONTROL, eigen_renew_, eigen_sketch_, eigen_step_
from secondorder.ops.jacobian import jacobian_rows_
from secondorder.ops.precondition import precondition

__all__ = [
    "CONTROL",
    "DAMPED_S",
    "DAMPED_Y",
    "UPDATED",
    "activation_derivatives",
    "average_",
    "bfgs_update_",
    "bias_hessian",
    "bias_hessian_activation",
    "bias_hessian_chain",
    "cross_entropy_hessian",
    "damped_bfgs_update_",
    "damped_lbfgs_update_",
    "double_damping",
    "eacg_hvp",
    "eacg_solve",
    "eacg_update_",
    "eigen_renew_",
    "eigen_sketch_",
    "eigen_step_",
    "hessian_action_update_",
    "jacobian_rows_",
    "lbfgs_product",
    "mean_inputs",
    "precondition",
]
