// The operators of K-BFGS on CUDA tensors. A status stays on the device.
#include <tuple>
#include <vector>

#include "../ops/bfgs.h"
#include "glue.h"

namespace secondorder::cuda {
namespace {

// The layers' arguments, contiguous; what an operator does not take is an empty list or an undefined tensor.
struct Pairs {
  std::vector<at::Tensor> inverse, s, y, damped_s, damped_y, matrix, hy, hs, hhy, s_pairs, y_pairs;
  at::Tensor status;  // [layers]
  double mu1 = 0, mu2 = 0, damping = 0;
  bool damped = true, bounded = false;

  template <typename T>
  BfgsLayer<T> layer(size_t l) const {
    const auto target = [l](const std::vector<at::Tensor>& list) {
      return list.empty() || !list[l].numel() ? nullptr : list[l].mutable_data_ptr<T>();
    };
    const auto source = [l](const std::vector<at::Tensor>& list) { return list.empty() ? nullptr : data<T>(list[l]); };
    BfgsLayer<T> layer{};
    layer.n = s[l].numel();
    layer.inverse_hessian = target(inverse);
    layer.s = source(s);
    layer.y = source(y);
    layer.damped_s = target(damped_s);
    layer.damped_y = target(damped_y);
    layer.status = status.defined() ? status.mutable_data_ptr<int64_t>() + l : nullptr;
    layer.mu1 = mu1;
    layer.mu2 = mu2;
    layer.damped = damped;
    layer.bounded = bounded;
    layer.matrix = source(matrix);
    layer.damping = damping;
    layer.hy = target(hy);
    layer.hs = source(hs);
    layer.hhy = source(hhy);
    layer.s_pairs = target(s_pairs);
    layer.y_pairs = target(y_pairs);
    layer.pairs = s_pairs.empty() ? 0 : s_pairs[l].size(0);
    return layer;
  }
};

at::Tensor statuses(at::TensorList layers) {
  return at::empty({int64_t(layers.size())}, layers[0].options().dtype(at::kLong));
}

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
  check_double_damping(s, y, inverses, mu1, mu2);
  Pairs pairs{.inverse = contiguous(inverses), .s = contiguous(s), .y = contiguous(y), .mu1 = mu1, .mu2 = mu2};
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

at::Tensor update_list_(at::TensorList inverses, at::TensorList s, at::TensorList y) {
  check_bfgs_update(inverses, s, y);
  const Pairs pairs{.inverse = inverses.vec(), .s = contiguous(s), .y = contiguous(y), .status = statuses(inverses)};
  launch_all(pairs, [](auto... arguments) { bfgs_update(arguments...); });
  written(inverses);
  return pairs.status;
}

at::Tensor update_one_(const at::Tensor& inverse, const at::Tensor& s, const at::Tensor& y) {
  return update_list_(inverse, s, y).select(0, 0).clone();
}

at::Tensor damped_update_(at::TensorList inverses, at::TensorList s, at::TensorList y, double mu1, double mu2,
                          bool damped, bool bounded) {
  check_damped_bfgs_update(inverses, s, y, mu1, mu2);
  const Pairs pairs{.inverse = inverses.vec(),
                    .s = contiguous(s),
                    .y = contiguous(y),
                    .status = statuses(inverses),
                    .mu1 = mu1,
                    .mu2 = mu2,
                    .damped = damped,
                    .bounded = bounded};
  launch_all(pairs, [](auto... arguments) { damped_bfgs_update(arguments...); });
  written(inverses);
  return pairs.status;
}

at::Tensor action_update_(at::TensorList inverses, at::TensorList matrices, at::TensorList vectors, double damping) {
  check_hessian_action_update(inverses, matrices, vectors, damping);
  const Pairs pairs{.inverse = inverses.vec(),
                    .s = contiguous(vectors),
                    .matrix = contiguous(matrices),
                    .status = statuses(inverses),
                    .damping = damping};
  launch_all(pairs, [](auto... arguments) { hessian_action_update(arguments...); });
  written(inverses);
  return pairs.status;
}

// H of a limited memory, as csrc/cpu/bfgs.cpp has it. The long products are PyTorch's own; what is short, and
// ill-conditioned, is in float64.
struct Memory {
  at::Tensor pairs, sy, ys, yy;  // P [2p, n]; S Y^T, Y S^T and Y Y^T [p, p] in float64

  // s, y [p, n]
  Memory(const at::Tensor& s, const at::Tensor& y) : pairs(at::cat({s, y}, 0)) {
    const at::Tensor s64 = s.to(at::kDouble), y64 = y.to(at::kDouble);
    sy = at::matmul(s64, y64.t()).contiguous();
    ys = sy.t().contiguous();
    yy = at::matmul(y64, y64.t()).contiguous();
  }

  // H v for v [n, k]
  at::Tensor times(const at::Tensor& v) const {
    const Unrecorded guard;
    const int64_t p = sy.size(0), k = v.size(1);
    const at::Tensor columns = at::matmul(pairs, v).contiguous(), work = at::empty({k, 2 * p}, sy.options());
    const Launch launch(v);
    AT_DISPATCH_FLOATING_TYPES(v.scalar_type(), "lbfgs_product", [&] {
      lbfgs_middle(p, k, sy.const_data_ptr<double>(), ys.const_data_ptr<double>(), yy.const_data_ptr<double>(),
                   columns.mutable_data_ptr<scalar_t>(), work.mutable_data_ptr<double>(), launch.stream);
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return at::addmm(v, pairs.t(), columns);
  }
};

at::Tensor product(const at::Tensor& s_pairs, const at::Tensor& y_pairs, const at::Tensor& v) {
  check_lbfgs_product(s_pairs, y_pairs, v);
  return Memory(s_pairs, y_pairs).times(v);
}

std::vector<at::Tensor> product_list(at::TensorList s_pairs, at::TensorList y_pairs, at::TensorList v) {
  check_lbfgs_product(s_pairs, y_pairs, v);
  std::vector<at::Tensor> out;
  for (size_t l = 0; l < v.size(); ++l) out.push_back(Memory(s_pairs[l], y_pairs[l]).times(v[l]));
  return out;
}

at::Tensor damped_limited_update_(at::TensorList s_pairs, at::TensorList y_pairs, at::TensorList s, at::TensorList y,
                                  double mu1, double mu2, bool damped, bool bounded) {
  check_damped_lbfgs_update(s_pairs, y_pairs, s, y, mu1, mu2);
  Pairs pairs{.s = contiguous(s),
              .y = contiguous(y),
              .s_pairs = s_pairs.vec(),
              .y_pairs = y_pairs.vec(),
              .status = statuses(s),
              .mu1 = mu1,
              .mu2 = mu2,
              .damped = damped,
              .bounded = bounded};
  for (size_t l = 0; l < y.size(); ++l) {
    const Memory memory(s_pairs[l], y_pairs[l]);
    const auto h = [&](const at::Tensor& vector) { return memory.times(vector.unsqueeze(1)).squeeze(1).contiguous(); };
    pairs.hy.push_back(h(y[l]));
    if (bounded && damped) {
      pairs.hs.push_back(h(s[l]));
      pairs.hhy.push_back(h(pairs.hy[l]));
    }
  }
  launch_all(pairs, [](auto... arguments) { damped_lbfgs_update(arguments...); });
  for (const at::TensorList list : {s_pairs, y_pairs}) written(list);
  return pairs.status;
}

}  // namespace

TORCH_LIBRARY_IMPL(secondorder, CUDA, m) {
  m.impl("double_damping", damping_one);
  m.impl("double_damping.list", damping_list);
  m.impl("bfgs_update_", update_one_);
  m.impl("bfgs_update_.list", update_list_);
  m.impl("damped_bfgs_update_", damped_update_);
  m.impl("hessian_action_update_", action_update_);
  m.impl("lbfgs_product", product);
  m.impl("lbfgs_product.list", product_list);
  m.impl("damped_lbfgs_update_", damped_limited_update_);
}

}  // namespace secondorder::cuda
