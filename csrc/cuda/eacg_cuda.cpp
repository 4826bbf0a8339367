// eacg_solve and eacg_update_ on CUDA tensors. `iterations` stays on the device.
#include <algorithm>
#include <climits>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../ops/eacg.h"
#include "glue.h"

namespace secondorder::cuda {
namespace {

// The arguments of all layers, contiguous; the parameters where the results go.
struct Net {
  std::vector<at::Tensor> hessian, mean_input, grad_weight, grad_bias;
  at::TensorList weight, bias, weight_momentum, bias_momentum;
  at::ArrayRef<double> alpha, lr, momentum, weight_decay;
  std::optional<at::ArrayRef<double>> max_norm;
  at::Tensor iterations;  // [layers]

  template <typename T>
  EacgLayer<T> layer(size_t l) const {
    const auto target = [](at::TensorList list, size_t l) {
      return !list.empty() && list[l].numel() ? list[l].mutable_data_ptr<T>() : nullptr;
    };
    const auto setting = [&](at::ArrayRef<double> list) { return list.empty() ? 0.0 : list[l]; };
    return {hessian[l].size(0),
            mean_input[l].size(0),
            data<T>(hessian[l]),
            data<T>(mean_input[l]),
            data<T>(grad_weight[l]),
            data<T>(grad_bias[l]),
            target(weight, l),
            target(bias, l),
            target(weight_momentum, l),
            target(bias_momentum, l),
            iterations.mutable_data_ptr<int64_t>() + l,
            alpha[l],
            setting(lr),
            setting(momentum),
            setting(weight_decay),
            max_norm ? (*max_norm)[l] : std::numeric_limits<double>::infinity()};
  }
};

// Solves every layer, those of one dtype together; then writes the directions, or updates the parameters if all layers
// of both dtypes are finite.
void solve(const Net& net, int64_t max_iter, double tol, bool truncated, bool update, const Launch& launch) {
  const EacgSettings settings{int(std::min<int64_t>(max_iter, INT_MAX)), tol, truncated};
  const at::Tensor not_finite = at::zeros({1}, net.iterations.options().dtype(at::kInt));
  int* const flag = update ? not_finite.mutable_data_ptr<int>() : nullptr;
  const Device device = launch.device();
  std::vector<at::Tensor> memory;
  const auto each_dtype = [&](auto&& f) {
    for (const at::ScalarType dtype : {at::kFloat, at::kDouble})
      AT_DISPATCH_FLOATING_TYPES(dtype, "eacg", [&] {
        std::vector<EacgLayer<scalar_t>> layers;
        for (size_t l = 0; l < net.hessian.size(); ++l)
          if (net.hessian[l].scalar_type() == dtype) layers.push_back(net.layer<scalar_t>(l));
        if (!layers.empty()) f(layers);
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
  };
  each_dtype([&](const auto& layers) {
    memory.push_back(workspace(eacg_workspace(layers.data(), int(layers.size()), device), net.iterations));
    eacg_directions(layers.data(), int(layers.size()), settings, memory.back().mutable_data_ptr(), flag, device,
                    launch.stream);
  });
  auto next = memory.begin();
  each_dtype([&](const auto& layers) {
    void* const work = (next++)->mutable_data_ptr();
    if (update) eacg_update(layers.data(), int(layers.size()), work, flag, device, launch.stream);
    else eacg_write(layers.data(), int(layers.size()), work, device, launch.stream);
  });
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, at::Tensor> solve_list(
    at::TensorList hessians, at::TensorList mean_inputs, at::TensorList grad_weights, at::TensorList grad_biases,
    at::ArrayRef<double> alpha, int64_t max_iter, double tol, bool truncated) {
  check_eacg_solve(hessians, mean_inputs, grad_weights, grad_biases, alpha, max_iter, tol);
  const Launch launch(hessians[0]);
  std::vector<at::Tensor> weights, biases;
  for (size_t l = 0; l < hessians.size(); ++l) {
    weights.push_back(at::empty(grad_weights[l].sizes(), hessians[l].options()));
    biases.push_back(at::empty(grad_biases[l].sizes(), hessians[l].options()));
  }
  at::Tensor iterations = at::empty({int64_t(hessians.size())}, hessians[0].options().dtype(at::kLong));
  solve({contiguous(hessians),
         contiguous(mean_inputs),
         contiguous(grad_weights),
         contiguous(grad_biases),
         weights,
         biases,
         {},
         {},
         alpha,
         {},
         {},
         {},
         std::nullopt,
         iterations},
        max_iter, tol, truncated, false, launch);
  return {std::move(weights), std::move(biases), iterations};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> solve_one(const at::Tensor& hessian, const at::Tensor& mean_input,
                                                         const at::Tensor& grad_weight,
                                                         const std::optional<at::Tensor>& grad_bias, double alpha,
                                                         int64_t max_iter, double tol, bool truncated) {
  const at::Tensor bias = grad_bias ? *grad_bias : at::empty({0}, hessian.options());
  auto [weights, biases, iterations] =
      solve_list(hessian, mean_input, grad_weight, bias, alpha, max_iter, tol, truncated);
  return {weights[0], biases[0], iterations.select(0, 0).clone()};
}

at::Tensor update_(at::TensorList hessians, at::TensorList mean_inputs, at::TensorList grad_weights,
                   at::TensorList grad_biases, at::TensorList weights, at::TensorList biases,
                   at::TensorList weight_momenta, at::TensorList bias_momenta, at::ArrayRef<double> lr,
                   at::ArrayRef<double> alpha, at::ArrayRef<double> momentum, at::ArrayRef<double> weight_decay,
                   int64_t max_iter, double tol, bool truncated, std::optional<at::ArrayRef<double>> max_norm) {
  check_eacg_update(hessians, mean_inputs, grad_weights, grad_biases, weights, biases, weight_momenta, bias_momenta, lr,
                    alpha, momentum, weight_decay, max_iter, tol, max_norm);
  const Launch launch(hessians[0]);
  at::Tensor iterations = at::empty({int64_t(hessians.size())}, hessians[0].options().dtype(at::kLong));
  solve({contiguous(hessians), contiguous(mean_inputs), contiguous(grad_weights), contiguous(grad_biases), weights,
         biases, weight_momenta, bias_momenta, alpha, lr, momentum, weight_decay, max_norm, iterations},
        max_iter, tol, truncated, true, launch);
  for (const at::TensorList list : {weights, biases, weight_momenta, bias_momenta}) written(list);
  return iterations;
}

}  // namespace

TORCH_LIBRARY_IMPL(secondorder, CUDA, m) {
  m.impl("eacg_solve", solve_one);
  m.impl("eacg_solve.list", solve_list);
  m.impl("eacg_update_", update_);
}

}  // namespace secondorder::cuda
