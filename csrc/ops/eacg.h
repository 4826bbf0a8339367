#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace secondorder {

// A list with one entry per layer each; a grad_bias of shape [0] is that of a layer without a bias.
void check_eacg_solve(at::TensorList hessians, at::TensorList mean_inputs, at::TensorList grad_weights,
                      at::TensorList grad_biases, at::ArrayRef<double> alpha, int64_t max_iter, double tol);

void check_eacg_update(at::TensorList hessians, at::TensorList mean_inputs, at::TensorList grad_weights,
                       at::TensorList grad_biases, at::TensorList weights, at::TensorList biases,
                       at::TensorList weight_momenta, at::TensorList bias_momenta, at::ArrayRef<double> lr,
                       at::ArrayRef<double> alpha, at::ArrayRef<double> momentum, at::ArrayRef<double> weight_decay,
                       int64_t max_iter, double tol, std::optional<at::ArrayRef<double>> max_norm);

}  // namespace secondorder
