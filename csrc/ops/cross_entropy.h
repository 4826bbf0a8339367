#pragma once

#include <ATen/core/Tensor.h>

namespace secondorder {

void check_cross_entropy_hessian(const at::Tensor& output, const at::Tensor& target);

// The Hessian by ATen's operators, of checked arguments on any device.
at::Tensor cross_entropy_hessian_by_products(const at::Tensor& output, const at::Tensor& target, int64_t ignore_index,
                                             bool mean);

}  // namespace secondorder
