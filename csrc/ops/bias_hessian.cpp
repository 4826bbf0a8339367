// bias_hessian: the checks of one step of the recursion, also with the derivatives computed inside (activation); down
// several layers (chain).
#include "bias_hessian.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include "../checks.h"
#include "activation.h"

namespace secondorder {
namespace {

constexpr const char* op = "bias_hessian";

// `d1`, or (d1_name) what the activation saved.
void check_recursion(const at::Tensor& hessian, const at::Tensor& weight, const char* d1_name, const at::Tensor& d1,
                     const std::optional<at::Tensor>& grad_input, double gamma) {
  check_square(op, "bias_hessian", hessian);
  check_floating(op, "bias_hessian", hessian);
  check_dim(op, "weight", weight, 2);
  check_shape(op, "weight", weight, {hessian.size(0), weight.size(1)});
  check_same(op, "weight", weight, "bias_hessian", hessian);
  check_dim(op, d1_name, d1, 2);
  check_shape(op, d1_name, d1, {d1.size(0), weight.size(1)});
  check_same(op, d1_name, d1, "bias_hessian", hessian);
  TORCH_CHECK_VALUE(d1.size(0) > 0, op, ": expected at least one instance in ", d1_name, ", got shape ", d1.sizes(),
                    "; an expectation over an empty batch is undefined");
  if (grad_input) {
    check_shape(op, "grad_input", *grad_input, d1.sizes());
    check_same(op, "grad_input", *grad_input, "bias_hessian", hessian);
  }
  TORCH_CHECK_VALUE(gamma <= 0, op, ": expected gamma <= 0 (-1: PCH-1, 0: PCH-2), got ", gamma);
}

}  // namespace

std::vector<at::Tensor> bias_hessian_chain(at::Tensor hessian, at::TensorList weights, at::TensorList saved,
                                           const c10::List<std::string>& activations, at::ArrayRef<double> parameters,
                                           const c10::List<std::optional<at::Tensor>>& grad_inputs, double gamma) {
  static const auto step = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("secondorder::bias_hessian", "activation")
                               .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                 c10::string_view, double, const std::optional<at::Tensor>&, double)>();
  const size_t layers = weights.size();
  check_lengths(op, {{"weight", layers},
                     {"saved", saved.size()},
                     {"activation", activations.size()},
                     {"parameter", parameters.size()},
                     {"grad_input", grad_inputs.size()}});
  const at::AutoDispatchBelowADInplaceOrView guard;  // autograd has been passed already
  std::vector<at::Tensor> hessians;
  for (size_t l = 0; l < layers; ++l)
    hessians.push_back(step.call(l == 0 ? hessian : hessians.back(), weights[l], saved[l], activations.get(l),
                                 parameters[l], grad_inputs.get(l), gamma));
  return hessians;
}

void check_bias_hessian(const at::Tensor& hessian, const at::Tensor& weight, const at::Tensor& d1,
                        const std::optional<at::Tensor>& d2, const std::optional<at::Tensor>& grad_input,
                        double gamma) {
  check_recursion(hessian, weight, "d1", d1, grad_input, gamma);
  TORCH_CHECK_VALUE(d2.has_value() == grad_input.has_value(), op,
                    ": expected d2 and grad_input together (with the diagonal) or neither (without), got only ",
                    d2 ? "d2" : "grad_input");
  if (!d2) return;
  check_shape(op, "d2", *d2, d1.sizes());
  check_same(op, "d2", *d2, "bias_hessian", hessian);
}

Activation check_bias_hessian_activation(const at::Tensor& hessian, const at::Tensor& weight, const at::Tensor& saved,
                                         c10::string_view name, double parameter,
                                         const std::optional<at::Tensor>& grad_input, double gamma) {
  check_recursion(hessian, weight, "saved", saved, grad_input, gamma);
  return activation_by_name(op, name, parameter);
}

}  // namespace secondorder
