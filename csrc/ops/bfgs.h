#pragma once

#include <ATen/core/Tensor.h>

namespace secondorder {

// A list with one entry per layer each.

void check_double_damping(at::TensorList s, at::TensorList y, at::TensorList inverses, double mu1, double mu2);

void check_bfgs_update(at::TensorList inverses, at::TensorList s, at::TensorList y);

void check_damped_bfgs_update(at::TensorList inverses, at::TensorList s, at::TensorList y, double mu1, double mu2);

void check_hessian_action_update(at::TensorList inverses, at::TensorList matrices, at::TensorList vectors,
                                 double damping);

void check_lbfgs_product(at::TensorList s_pairs, at::TensorList y_pairs, at::TensorList v);

void check_damped_lbfgs_update(at::TensorList s_pairs, at::TensorList y_pairs, at::TensorList s, at::TensorList y,
                               double mu1, double mu2);

}  // namespace secondorder
