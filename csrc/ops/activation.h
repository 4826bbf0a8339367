#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include "../formulas.h"

namespace secondorder {

// The activation of this name, if it has one and the parameter is within its bounds.
Activation activation_by_name(const char* op, c10::string_view name, double parameter);

Activation check_activation_derivatives(const at::Tensor& saved, c10::string_view name, double parameter);

}  // namespace secondorder
