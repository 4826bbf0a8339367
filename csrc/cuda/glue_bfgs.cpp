// double_damping, bfgs_update_ and damped_bfgs_update_ on CUDA tensors. The status stays on the device.
#include <tuple>
#include <vector>

#include "../argument_checks.h"
#include "glue.h"

namespace secondorder::cuda {
namespace {

// The layers' arguments, contiguous; what an operator does not take is an empty list or an undefined tensor.
struct Pairs {
  std::vector<at::Tensor> inverse, s, y, damped_s, damped_y;
  at::Tensor status;  // [layers]
  double mu1, mu2;

  template <typename T>
  BfgsLayer<T> layer(size_t l) const {
    const auto target = [l](const std::vector<at::Tensor>& list) {
      return list.empty() || !list[l].numel() ? nullptr : list[l].mutable_data_ptr<T>();
    };
    return {s[l].numel(),     target(inverse),  data<T>(s[l]), data<T>(y[l]),
            target(damped_s), target(damped_y), status.defined() ? status.mutable_data_ptr<int64_t>() + l : nullptr,
            mu1,              mu2};
  }
};

// Calls f(layers, count, workspace, stream), a launcher, on all layers.
template <typename F>
void launch_all(const Pairs& pairs, F&& f) {
  const Launch launch(pairs.s[0]);
  AT_DISPATCH_FLOATING_TYPES(pairs.s[0].scalar_type(), "bfgs", [&] {
    std::vector<BfgsLayer<scalar_t>> layers;
    for (size_t l = 0; l < pairs.s.size(); ++l) layers.push_back(pairs.layer<scalar_t>(l));
    const int count = int(layers.size());
    const at::Tensor memory = workspace(bfgs_workspace(layers.data(), count), pairs.s[0]);
    f(layers.data(), count, memory.mutable_data_ptr(), launch.stream);
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> damping_list(at::TensorList s, at::TensorList y,
                                                                          at::TensorList inverses, double mu1,
                                                                          double mu2) {
  constexpr const char* op = "double_damping";
  check_damping(op, mu1, mu2);
  check_pairs(op, inverses, s, y, /*written=*/false);
  Pairs pairs{contiguous(inverses), contiguous(s), contiguous(y), {}, {}, {}, mu1, mu2};
  for (const at::Tensor& vector : pairs.s) {
    pairs.damped_s.push_back(at::empty_like(vector));
    pairs.damped_y.push_back(at::empty_like(vector));
  }
  launch_all(pairs, [](auto... arguments) { double_damping(arguments...); });
  return {std::move(pairs.damped_s), std::move(pairs.damped_y)};
}

std::tuple<at::Tensor, at::Tensor> damping_one(const at::Tensor& s, const at::Tensor& y, const at::Tensor& inverse,
                                               double mu1, double mu2) {
  auto [damped_s, damped_y] = damping_list(s, y, inverse, mu1, mu2);
  return {damped_s[0], damped_y[0]};
}

Pairs written(at::TensorList inverses, at::TensorList s, at::TensorList y, double mu1, double mu2) {
  return {inverses.vec(), contiguous(s), contiguous(y), {}, {},
          at::empty({int64_t(inverses.size())}, inverses[0].options().dtype(at::kLong)), mu1, mu2};
}

at::Tensor update_list_(at::TensorList inverses, at::TensorList s, at::TensorList y) {
  check_pairs("bfgs_update_", inverses, s, y, /*written=*/true);
  const Pairs pairs = written(inverses, s, y, 0, 0);
  launch_all(pairs, [](auto... arguments) { bfgs_update(arguments...); });
  return pairs.status;
}

at::Tensor update_one_(const at::Tensor& inverse, const at::Tensor& s, const at::Tensor& y) {
  return update_list_(inverse, s, y).select(0, 0).clone();
}

at::Tensor damped_update_(at::TensorList inverses, at::TensorList s, at::TensorList y, double mu1, double mu2) {
  constexpr const char* op = "damped_bfgs_update_";
  check_damping(op, mu1, mu2);
  check_pairs(op, inverses, s, y, /*written=*/true);
  const Pairs pairs = written(inverses, s, y, mu1, mu2);
  launch_all(pairs, [](auto... arguments) { damped_bfgs_update(arguments...); });
  return pairs.status;
}

}  // namespace

TORCH_LIBRARY_IMPL(secondorder, CUDA, m) {
  m.impl("double_damping", damping_one);
  m.impl("double_damping.list", damping_list);
  m.impl("bfgs_update_", update_one_);
  m.impl("bfgs_update_.list", update_list_);
  m.impl("damped_bfgs_update_", damped_update_);
}

}  // namespace secondorder::cuda
