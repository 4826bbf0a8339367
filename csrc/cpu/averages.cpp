// mean_inputs and average_ of a whole net: one call for all layers, and threads for those alone that are worth waking
// them. The means of large inputs are ATen's.
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../ops/averages.h"
#include "../tensors.h"
#include "kernels.h"
#include "parallel.h"

namespace secondorder::cpu {
namespace {

std::vector<at::Tensor> mean_inputs(at::TensorList inputs) {
  check_mean_inputs(inputs);
  const Unrecorded guard;
  std::vector<at::Tensor> means, small;
  std::vector<size_t> places;  // of the small ones
  std::vector<int64_t> sizes;
  for (const at::Tensor& input : inputs) {
    if (input.numel() >= kSerialWork) {
      means.push_back(input.mean(0));
      continue;
    }
    places.push_back(means.size());
    sizes.push_back(input.numel());
    small.push_back(input.contiguous());
    means.push_back(at::empty({input.size(1)}, input.options()));
  }
  parallel_layers(sizes, 1, [&](int64_t i) {
    AT_DISPATCH_FLOATING_TYPES(small[i].scalar_type(), "mean_inputs", [&] {
      using T = scalar_t;
      const int64_t m = small[i].size(0), n = small[i].size(1);
      std::vector<double> sums(n, 0.0);
      kernels<T>().column_sums(m, n, small[i].const_data_ptr<T>(), n, sums.data());
      std::transform(sums.begin(), sums.end(), means[places[i]].mutable_data_ptr<T>(),
                     [&](double sum) { return T(sum / double(m)); });
    });
  });
  return means;
}

void average_(at::TensorList news, at::TensorList olds, double share) {
  check_average(news, olds, share);
  std::vector<at::Tensor> contiguous;
  std::vector<int64_t> sizes;
  for (const at::Tensor& old : olds) {
    contiguous.push_back(old.contiguous());
    sizes.push_back(old.numel());
  }
  own_storage(news);
  parallel_layers(sizes, 1, [&](int64_t i) {
    AT_DISPATCH_FLOATING_TYPES(contiguous[i].scalar_type(), "average_", [&] {
      using T = scalar_t;
      const T* y = contiguous[i].const_data_ptr<T>();
      T* x = news[i].mutable_data_ptr<T>();
      parallel_rows(sizes[i], 1, [&](int64_t begin, int64_t end) {
        kernels<T>().average(end - begin, T(share), y + begin, x + begin);
      });
    });
  });
  written(news);
}

}  // namespace

TORCH_LIBRARY_IMPL(secondorder, CPU, m) {
  m.impl("mean_inputs", mean_inputs);
  m.impl("average_", average_);
}

}  // namespace secondorder::cpu
