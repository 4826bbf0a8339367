// What the operators demand of their whole argument lists, the same on every device.
#pragma once

#include <optional>

#include "checks.h"

namespace secondorder {

// bias_hessian, with d1 or (d1_name) what the activation saved
inline void check_recursion(const char* op, const at::Tensor& hessian, const at::Tensor& weight, const char* d1_name,
                            const at::Tensor& d1, const std::optional<at::Tensor>& grad_input, double gamma) {
  check_square(op, "bias_hessian", hessian);
  check_floating(op, "bias_hessian", hessian);
  check_dim(op, "weight", weight, 2);
  check_shape(op, "weight", weight, {hessian.size(0), weight.size(1)});
  check_same(op, "weight", weight, "bias_hessian", hessian);
  check_dim(op, d1_name, d1, 2);
  check_shape(op, d1_name, d1, {d1.size(0), weight.size(1)});
  check_same(op, d1_name, d1, "bias_hessian", hessian);
  TORCH_CHECK_VALUE(d1.size(0) > 0, op, ": expected at least one instance in ", d1_name, ", got shape ", d1.sizes(),
                    "; an expectation over an empty batch is undefined");
  if (grad_input) {
    check_shape(op, "grad_input", *grad_input, d1.sizes());
    check_same(op, "grad_input", *grad_input, "bias_hessian", hessian);
  }
  check_gamma(op, gamma);
}

inline void check_second_derivative(const char* op, const at::Tensor& hessian, const at::Tensor& d1,
                                    const std::optional<at::Tensor>& d2, const std::optional<at::Tensor>& grad_input) {
  TORCH_CHECK_VALUE(d2.has_value() == grad_input.has_value(), op,
                    ": expected d2 and grad_input together (with the diagonal) or neither (without), got only ",
                    d2 ? "d2" : "grad_input");
  if (!d2) return;
  check_shape(op, "d2", *d2, d1.sizes());
  check_same(op, "d2", *d2, "bias_hessian", hessian);
}

inline void check_hvp(const char* op, const at::Tensor& hessian, const at::Tensor& mean_input, const at::Tensor& p) {
  check_square(op, "bias_hessian", hessian);
  check_floating(op, "bias_hessian", hessian);
  check_dim(op, "mean_input", mean_input, 1);
  check_same(op, "mean_input", mean_input, "bias_hessian", hessian);
  check_shape(op, "p", p, {hessian.size(0), mean_input.size(0)});
  check_same(op, "p", p, "bias_hessian", hessian);
}

// One layer of eacg_solve or eacg_update_. grad_bias of shape [0]: a layer without a bias.
inline void check_layer(const char* op, const at::Tensor& hessian, const at::Tensor& mean_input,
                        const at::Tensor& grad_weight, const at::Tensor& grad_bias, double alpha) {
  check_square(op, "bias_hessian", hessian);
  check_floating(op, "bias_hessian", hessian);
  check_dim(op, "mean_input", mean_input, 1);
  check_same(op, "mean_input", mean_input, "bias_hessian", hessian);
  check_shape(op, "grad_weight", grad_weight, {hessian.size(0), mean_input.size(0)});
  check_same(op, "grad_weight", grad_weight, "bias_hessian", hessian);
  if (grad_bias.numel() > 0 || grad_bias.dim() != 1) check_shape(op, "grad_bias", grad_bias, {hessian.size(0)});
  check_same(op, "grad_bias", grad_bias, "bias_hessian", hessian);
  check_alpha(op, alpha);
}

inline void check_solve(const char* op, at::TensorList hessians, at::TensorList mean_inputs,
                        at::TensorList grad_weights, at::TensorList grad_biases, at::ArrayRef<double> alpha,
                        int64_t max_iter, double tol) {
  check_lengths(op, {{"bias_hessian", hessians.size()},
                     {"mean_input", mean_inputs.size()},
                     {"grad_weight", grad_weights.size()},
                     {"grad_bias", grad_biases.size()},
                     {"alpha", alpha.size()}});
  check_cg(op, max_iter, tol);
  for (size_t l = 0; l < hessians.size(); ++l) {
    check_layer(op, hessians[l], mean_inputs[l], grad_weights[l], grad_biases[l], alpha[l]);
    check_same_device(op, "bias_hessian", hessians[l], "the first layer", hessians[0]);
  }
}

inline void check_update(const char* op, at::TensorList hessians, at::TensorList mean_inputs,
                         at::TensorList grad_weights, at::TensorList grad_biases, at::TensorList weights,
                         at::TensorList biases, at::TensorList weight_momenta, at::TensorList bias_momenta,
                         at::ArrayRef<double> lr, at::ArrayRef<double> alpha, at::ArrayRef<double> momentum,
                         at::ArrayRef<double> weight_decay, int64_t max_iter, double tol) {
  check_solve(op, hessians, mean_inputs, grad_weights, grad_biases, alpha, max_iter, tol);
  check_lengths(op, {{"bias_hessian", hessians.size()},
                     {"weight", weights.size()},
                     {"bias", biases.size()},
                     {"lr", lr.size()},
                     {"momentum", momentum.size()},
                     {"weight_decay", weight_decay.size()}});
  const bool keep = !weight_momenta.empty() || !bias_momenta.empty();  // empty lists: no momentum
  if (keep)
    check_lengths(op, {{"bias_hessian", hessians.size()},
                       {"weight_momentum", weight_momenta.size()},
                       {"bias_momentum", bias_momenta.size()}});
  const auto check_target = [&](const char* name, const at::Tensor& t, const char* like_name, const at::Tensor& like) {
    check_shape(op, name, t, like.sizes());
    check_same(op, name, t, like_name, like);
    check_contiguous(op, name, t);
  };
  for (size_t l = 0; l < hessians.size(); ++l) {
    check_target("weight", weights[l], "grad_weight", grad_weights[l]);
    check_target("bias", biases[l], "grad_bias", grad_biases[l]);
    if (!keep) continue;
    check_target("weight_momentum", weight_momenta[l], "weight", weights[l]);
    check_target("bias_momentum", bias_momenta[l], "bias", biases[l]);
  }
}

inline void check_cross_entropy(const char* op, const at::Tensor& output, const at::Tensor& target) {
  check_dim(op, "output", output, 2);
  check_floating(op, "output", output);
  TORCH_CHECK_TYPE(at::isIntegralType(target.scalar_type(), /*includeBool=*/false), op,
                   ": expected target with class indices, got dtype ", target.scalar_type());
  check_shape(op, "target", target, {output.size(0)});
  check_same_device(op, "target", target, "output", output);
}

// mean_inputs
inline void check_inputs(const char* op, at::TensorList inputs) {
  for (const at::Tensor& input : inputs) {
    check_dim(op, "input", input, 2);
    check_floating(op, "input", input);
  }
}

// average_
inline void check_average(const char* op, at::TensorList news, at::TensorList olds, double share) {
  check_lengths(op, {{"new", news.size()}, {"old", olds.size()}});
  TORCH_CHECK_VALUE(share >= 0 && share < 1, op, ": expected share in [0, 1), got ", share);
  for (size_t i = 0; i < news.size(); ++i) {
    check_floating(op, "new", news[i]);
    check_contiguous(op, "new", news[i]);
    check_shape(op, "old", olds[i], news[i].sizes());
    check_same(op, "old", olds[i], "new", news[i]);
    check_same_device(op, "new", news[i], "the first one", news[0]);
  }
}

// precondition
inline void check_precondition(const char* op, const std::optional<at::Tensor>& left, const at::Tensor& gradient,
                               const std::optional<at::Tensor>& right) {
  check_dim(op, "gradient", gradient, 2);
  check_floating(op, "gradient", gradient);
  const auto check_side = [&](const char* name, const std::optional<at::Tensor>& side, int64_t n) {
    if (!side) return;
    check_shape(op, name, *side, {n, n});
    check_same(op, name, *side, "gradient", gradient);
  };
  check_side("left", left, gradient.size(0));
  check_side("right", right, gradient.size(1));
}

// K-BFGS's matrices, one per layer, of one dtype on one device; `written` in place.
inline void check_matrices(const char* op, const char* name, at::TensorList matrices, bool written) {
  for (const at::Tensor& h : matrices) {
    check_square(op, name, h);
    check_floating(op, name, h);
    check_same(op, name, h, "the first one", matrices[0]);
    if (written) check_contiguous(op, name, h);
  }
}

// A layer's s and y, [n] each, as `like` in dtype and device
inline void check_pair(const char* op, const at::Tensor& s, const at::Tensor& y, const char* like_name,
                       const at::Tensor& like, int64_t n) {
  check_shape(op, "s", s, {n});
  check_same(op, "s", s, like_name, like);
  check_shape(op, "y", y, {n});
  check_same(op, "y", y, like_name, like);
}

// double_damping, bfgs_update_ and damped_bfgs_update_; `written`: the inverses are
inline void check_pairs(const char* op, at::TensorList inverses, at::TensorList s, at::TensorList y, bool written) {
  check_lengths(op, {{"inverse_hessian", inverses.size()}, {"s", s.size()}, {"y", y.size()}});
  check_matrices(op, "inverse_hessian", inverses, written);
  for (size_t l = 0; l < s.size(); ++l) check_pair(op, s[l], y[l], "inverse_hessian", inverses[l], inverses[l].size(0));
}

// hessian_action_update_
inline void check_action(const char* op, at::TensorList inverses, at::TensorList matrices, at::TensorList vectors,
                         double damping) {
  check_lengths(op, {{"inverse", inverses.size()}, {"matrix", matrices.size()}, {"vector", vectors.size()}});
  TORCH_CHECK_VALUE(damping >= 0, op, ": expected damping >= 0, got ", damping);
  check_matrices(op, "inverse", inverses, /*written=*/true);
  for (size_t l = 0; l < vectors.size(); ++l) {
    check_shape(op, "matrix", matrices[l], inverses[l].sizes());
    check_same(op, "matrix", matrices[l], "inverse", inverses[l]);
    check_shape(op, "vector", vectors[l], {inverses[l].size(0)});
    check_same(op, "vector", vectors[l], "inverse", inverses[l]);
  }
}

// A layer's limited memory
inline void check_memory(const char* op, const at::Tensor& s_pairs, const at::Tensor& y_pairs) {
  check_dim(op, "s_pairs", s_pairs, 2);
  check_floating(op, "s_pairs", s_pairs);
  check_shape(op, "y_pairs", y_pairs, s_pairs.sizes());
  check_same(op, "y_pairs", y_pairs, "s_pairs", s_pairs);
}

// lbfgs_product
inline void check_product(const char* op, const at::Tensor& s_pairs, const at::Tensor& y_pairs, const at::Tensor& v) {
  check_memory(op, s_pairs, y_pairs);
  check_dim(op, "v", v, 2);
  check_shape(op, "v", v, {s_pairs.size(1), v.size(1)});
  check_same(op, "v", v, "s_pairs", s_pairs);
}

// damped_lbfgs_update_
inline void check_memories(const char* op, at::TensorList s_pairs, at::TensorList y_pairs, at::TensorList s,
                           at::TensorList y) {
  check_lengths(op, {{"s_pairs", s_pairs.size()}, {"y_pairs", y_pairs.size()}, {"s", s.size()}, {"y", y.size()}});
  for (size_t l = 0; l < s.size(); ++l) {
    check_memory(op, s_pairs[l], y_pairs[l]);
    check_same(op, "s_pairs", s_pairs[l], "the first one", s_pairs[0]);
    TORCH_CHECK_VALUE(s_pairs[l].size(0) >= 1, op, ": expected room for at least one pair, got s_pairs of shape ",
                      s_pairs[l].sizes());
    check_contiguous(op, "s_pairs", s_pairs[l]);
    check_contiguous(op, "y_pairs", y_pairs[l]);
    check_pair(op, s[l], y[l], "s_pairs", s_pairs[l], s_pairs[l].size(1));
  }
}

}  // namespace secondorder
