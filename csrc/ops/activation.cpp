// activation_derivatives: sigma' and sigma'' of the activations whose derivatives have formulas.
#include "activation.h"

#include <string_view>

#include "../checks.h"

namespace secondorder {

Activation activation_by_name(const char* op, c10::string_view name_, double parameter) {
  const std::string_view name(name_.data(), name_.size());  // c10's is a type of its own in older versions of torch
  struct Entry {
    std::string_view name;
    Activation activation;
    bool positive;  // its parameter must be > 0
  };
  static constexpr Entry kEntries[] = {
      {"identity", Activation::identity, false},
      {"sigmoid", Activation::sigmoid, false},
      {"tanh", Activation::tanh, false},
      {"relu", Activation::relu, false},
      {"leaky_relu", Activation::leaky_relu, true},
      {"elu", Activation::elu, true},
      {"softplus", Activation::softplus, true},
      {"silu", Activation::silu, false},
      {"gelu", Activation::gelu, false},
      {"gelu_tanh", Activation::gelu_tanh, false},
  };
  for (const auto& entry : kEntries)
    if (entry.name == name) {
      TORCH_CHECK_VALUE(!entry.positive || parameter > 0, op, ": expected a parameter > 0 for activation '", name,
                        "', got ", parameter);
      return entry.activation;
    }
  TORCH_CHECK_VALUE(false, op, ": expected activation to be one of identity, sigmoid, tanh, relu, leaky_relu, elu, ",
                    "softplus, silu, gelu, gelu_tanh; got '", name, "'");
}

Activation check_activation_derivatives(const at::Tensor& saved, c10::string_view name, double parameter) {
  constexpr const char* op = "activation_derivatives";
  check_floating(op, "saved", saved);
  return activation_by_name(op, name, parameter);
}

}  // namespace secondorder
