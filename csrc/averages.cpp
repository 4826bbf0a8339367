// mean_inputs and average_ on any device without operators of its own.
#include <ATen/Functions.h>
#include <torch/library.h>

#include <vector>

#include "argument_checks.h"

namespace secondorder {
namespace {

std::vector<at::Tensor> mean_inputs(at::TensorList inputs) {
  check_inputs("mean_inputs", inputs);
  std::vector<at::Tensor> means;
  for (const at::Tensor& input : inputs) means.push_back(input.mean(0));
  return means;
}

void average_(at::TensorList news, at::TensorList olds, double share) {
  check_average("average_", news, olds, share);
  if (!news.empty()) at::_foreach_lerp_(news, olds, share);
}

}  // namespace

TORCH_LIBRARY_IMPL(secondorder, CompositeExplicitAutograd, m) {
  m.impl("mean_inputs", mean_inputs);
  m.impl("average_", average_);
}

}  // namespace secondorder
