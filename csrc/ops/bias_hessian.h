#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <optional>
#include <string>
#include <vector>

#include "../formulas.h"

namespace secondorder {

void check_bias_hessian(const at::Tensor& hessian, const at::Tensor& weight, const at::Tensor& d1,
                        const std::optional<at::Tensor>& d2, const std::optional<at::Tensor>& grad_input, double gamma);

Activation check_bias_hessian_activation(const at::Tensor& hessian, const at::Tensor& weight, const at::Tensor& saved,
                                         c10::string_view name, double parameter,
                                         const std::optional<at::Tensor>& grad_input, double gamma);

// H of the layers below `hessian`'s, going down: weights W_0 [n_0, n_1], W_1 [n_1, n_2], ..., what the activations
// below each saved [m, n_(l+1)], and the gradients there, or none where the diagonal is left out. One call from Python
// in place of one per layer, whose dispatch and argument parsing are what nets of small layers cost.
std::vector<at::Tensor> bias_hessian_chain(at::Tensor hessian, at::TensorList weights, at::TensorList saved,
                                           const c10::List<std::string>& activations, at::ArrayRef<double> parameters,
                                           const c10::List<std::optional<at::Tensor>>& grad_inputs, double gamma);

}  // namespace secondorder
