#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <optional>

#include "../formulas.h"

namespace secondorder {

void check_bias_hessian(const at::Tensor& hessian, const at::Tensor& weight, const at::Tensor& d1,
                        const std::optional<at::Tensor>& d2, const std::optional<at::Tensor>& grad_input, double gamma);

Activation check_bias_hessian_activation(const at::Tensor& hessian, const at::Tensor& weight, const at::Tensor& saved,
                                         c10::string_view name, double parameter,
                                         const std::optional<at::Tensor>& grad_input, double gamma);

}  // namespace secondorder
