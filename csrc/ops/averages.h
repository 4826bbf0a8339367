#pragma once

#include <ATen/core/Tensor.h>

namespace secondorder {

void check_mean_inputs(at::TensorList inputs);

void check_average(at::TensorList news, at::TensorList olds, double share);

}  // namespace secondorder
