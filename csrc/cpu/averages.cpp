// mean_inputs and average_ of a whole net: one call for all layers, and threads for those alone that are worth waking them.
// The means of large inputs are ATen's.
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../argument_checks.h"
#include "kernels.h"
#include "parallel.h"

namespace secondorder::cpu {
namespace {

std::vector<at::Tensor> mean_inputs(at::TensorList inputs) {
  check_inputs("mean_inputs", inputs);
  std::vector<at::Tensor> means;
  for (const at::Tensor& input_ : inputs) {
    if (input_.numel() >= kSerialWork) {
      means.push_back(input_.mean(0));
      continue;
    }
    const at::Tensor input = input_.contiguous();
    const int64_t m = input.size(0), n = input.size(1);
    at::Tensor mean = at::empty({n}, input.options());
    AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "mean_inputs", [&] {
      using T = scalar_t;
      std::vector<double> sums(n, 0.0);
      kernels<T>().column_sums(m, n, input.const_data_ptr<T>(), n, sums.data());
      std::transform(sums.begin(), sums.end(), mean.mutable_data_ptr<T>(), [&](double sum) { return T(sum / double(m)); });
    });
    means.push_back(std::move(mean));
  }
  return means;
}

void average_(at::TensorList news, at::TensorList olds, double share) {
  check_average("average_", news, olds, share);
  for (size_t i = 0; i < news.size(); ++i) {
    const at::Tensor old = olds[i].contiguous();
    AT_DISPATCH_FLOATING_TYPES(old.scalar_type(), "average_", [&] {
      using T = scalar_t;
      const T* y = old.const_data_ptr<T>();
      T* x = news[i].mutable_data_ptr<T>();
      parallel_rows(old.numel(), 1, [&](int64_t begin, int64_t end) {
        kernels<T>().average(end - begin, T(share), y + begin, x + begin);
      });
    });
    news[i].unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(secondorder, CPU, m) {
  m.impl("mean_inputs", mean_inputs);
  m.impl("average_", average_);
}

}  // namespace secondorder::cpu
