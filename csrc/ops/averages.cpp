// mean_inputs and average_: the mean inputs of all layers of a net, and exponential averages.
#include "averages.h"

#include <ATen/Functions.h>
#include <torch/library.h>

#include <vector>

#include "../checks.h"
#include "../tensors.h"

namespace secondorder {

void check_mean_inputs(at::TensorList inputs) {
  constexpr const char* op = "mean_inputs";
  for (const at::Tensor& input : inputs) {
    check_dim(op, "input", input, 2);
    check_floating(op, "input", input);
  }
}

void check_average(at::TensorList news, at::TensorList olds, double share) {
  constexpr const char* op = "average_";
  check_lengths(op, {{"new", news.size()}, {"old", olds.size()}});
  TORCH_CHECK_VALUE(share >= 0 && share < 1, op, ": expected share in [0, 1), got ", share);
  Targets targets(op);
  for (size_t i = 0; i < news.size(); ++i) {
    check_floating(op, "new", news[i]);
    check_shape(op, "old", olds[i], news[i].sizes());
    check_same(op, "old", olds[i], "new", news[i]);
    check_same_device(op, "new", news[i], "the first one", news[0]);
    targets.add("new", news[i]);
  }
  targets.check_apart();
}

namespace {

std::vector<at::Tensor> mean_inputs(at::TensorList inputs) {
  check_mean_inputs(inputs);
  const Unrecorded guard;
  std::vector<at::Tensor> means;
  for (const at::Tensor& input : inputs) means.push_back(input.mean(0));
  return means;
}

void average_(at::TensorList news, at::TensorList olds, double share) {
  check_average(news, olds, share);
  const Unrecorded guard;
  if (!news.empty()) at::_foreach_lerp_(news, olds, share);
}

}  // namespace

TORCH_LIBRARY_IMPL(secondorder, CompositeExplicitAutograd, m) {
  m.impl("mean_inputs", mean_inputs);
  m.impl("average_", average_);
}

}  // namespace secondorder
