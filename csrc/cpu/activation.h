#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

#include "../formulas.h"

namespace secondorder::cpu {

// The transcendental functions e0, e1 of `saved` that the activation's derivatives need (formulas.h); undefined where
// there are none. They are whole passes of ATen, whose vectorised functions are better than any written here.
std::pair<at::Tensor, at::Tensor> transcendentals(Activation activation, double parameter, const at::Tensor& saved);

}  // namespace secondorder::cpu
