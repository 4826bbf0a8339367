// The names by which operators take an activation, and their parameters' bounds.
#pragma once

#include <c10/util/Exception.h>

#include <string_view>

#include "formulas.h"

namespace secondorder {

inline Activation activation_by_name(const char* op, std::string_view name, double parameter) {
  struct Entry {
    std::string_view name;
    Activation activation;
    bool positive;  // its parameter must be > 0
  };
  static constexpr Entry kEntries[] = {
      {"identity", Activation::identity, false}, {"sigmoid", Activation::sigmoid, false},
      {"tanh", Activation::tanh, false},         {"relu", Activation::relu, false},
      {"leaky_relu", Activation::leaky_relu, true}, {"elu", Activation::elu, true},
      {"softplus", Activation::softplus, true},  {"silu", Activation::silu, false},
      {"gelu", Activation::gelu, false},         {"gelu_tanh", Activation::gelu_tanh, false},
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

}  // namespace secondorder
