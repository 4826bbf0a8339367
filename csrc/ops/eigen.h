#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace secondorder {

void check_eigen_sketch(const at::Tensor& sketch, const at::Tensor& inputs, const at::Tensor& basis,
                        const at::Tensor& shift, const std::optional<at::Tensor>& control, int64_t renew_every);

// A list with one entry per matrix each.

void check_eigen_renew(at::TensorList mean, at::TensorList basis_out, at::TensorList basis_in, at::TensorList scale_out,
                       at::TensorList scale_in, at::TensorList first, const at::Tensor& control,
                       at::TensorList grad_weight, at::TensorList grad_bias, at::TensorList sketch,
                       at::TensorList bias_hessian, at::IntArrayRef rows, at::ArrayRef<double> share,
                       int64_t renew_every, int64_t since, double decay);

void check_eigen_step(at::TensorList weight, at::TensorList bias, at::TensorList first, at::TensorList second,
                      at::TensorList last, at::TensorList size, const at::Tensor& control, at::TensorList grad_weight,
                      at::TensorList grad_bias, at::TensorList mean, at::TensorList basis_out, at::TensorList basis_in,
                      at::ArrayRef<double> lr, at::ArrayRef<double> lr_bias, at::ArrayRef<double> decay,
                      at::ArrayRef<double> decay_bias, at::IntArrayRef step, double beta1, double beta2, double eps,
                      int64_t renew_every, int64_t since, const std::optional<at::Tensor>& rate);

}  // namespace secondorder
