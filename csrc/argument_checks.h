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
  const size_t layers = hessians.size();
  TORCH_CHECK_VALUE(mean_inputs.size() == layers && grad_weights.size() == layers && grad_biases.size() == layers &&
                        alpha.size() == layers,
                    op, ": expected lists of one length, got ", layers, " bias_hessian, ", mean_inputs.size(),
                    " mean_input, ", grad_weights.size(), " grad_weight, ", grad_biases.size(), " grad_bias and ",
                    alpha.size(), " alpha");
  check_cg(op, max_iter, tol);
  for (size_t l = 0; l < layers; ++l)
    check_layer(op, hessians[l], mean_inputs[l], grad_weights[l], grad_biases[l], alpha[l]);
}

inline void check_update(const char* op, at::TensorList hessians, at::TensorList mean_inputs,
                         at::TensorList grad_weights, at::TensorList grad_biases, at::TensorList weights,
                         at::TensorList biases, at::TensorList weight_momenta, at::TensorList bias_momenta,
                         at::ArrayRef<double> lr, at::ArrayRef<double> alpha, at::ArrayRef<double> momentum,
                         at::ArrayRef<double> weight_decay, int64_t max_iter, double tol) {
  const size_t layers = hessians.size();
  TORCH_CHECK_VALUE(mean_inputs.size() == layers && grad_weights.size() == layers && grad_biases.size() == layers &&
                        weights.size() == layers && biases.size() == layers && lr.size() == layers &&
                        alpha.size() == layers && momentum.size() == layers && weight_decay.size() == layers &&
                        weight_momenta.size() == bias_momenta.size() &&
                        (weight_momenta.size() == layers || weight_momenta.empty()),
                    op, ": expected lists of one length (the momenta may be empty lists), got ", layers,
                    " bias_hessian, ", mean_inputs.size(), " mean_input, ", grad_weights.size(), " grad_weight, ",
                    grad_biases.size(), " grad_bias, ", weights.size(), " weight, ", biases.size(), " bias, ",
                    weight_momenta.size(), " weight_momentum, ", bias_momenta.size(), " bias_momentum");
  check_cg(op, max_iter, tol);
  const auto check_target = [&](const char* name, const at::Tensor& t, const char* like_name, const at::Tensor& like) {
    check_shape(op, name, t, like.sizes());
    check_same(op, name, t, like_name, like);
    check_contiguous(op, name, t);
  };
  for (size_t l = 0; l < layers; ++l) {
    check_layer(op, hessians[l], mean_inputs[l], grad_weights[l], grad_biases[l], alpha[l]);
    check_target("weight", weights[l], "grad_weight", grad_weights[l]);
    check_target("bias", biases[l], "grad_bias", grad_biases[l]);
    if (!weight_momenta.empty()) {
      check_target("weight_momentum", weight_momenta[l], "weight", weights[l]);
      check_target("bias_momentum", bias_momenta[l], "bias", biases[l]);
    }
  }
}

// double_damping, bfgs_update_ and damped_bfgs_update_; `written`: the inverses are
inline void check_pairs(const char* op, at::TensorList inverses, at::TensorList s, at::TensorList y, bool written) {
  const size_t layers = inverses.size();
  TORCH_CHECK_VALUE(s.size() == layers && y.size() == layers, op, ": expected lists of one length, got ", layers,
                    " inverse_hessian, ", s.size(), " s and ", y.size(), " y");
  for (size_t l = 0; l < layers; ++l) {
    const at::Tensor& h = inverses[l];
    check_square(op, "inverse_hessian", h);
    check_floating(op, "inverse_hessian", h);
    check_same(op, "inverse_hessian", h, "the first one", inverses[0]);
    if (written) check_contiguous(op, "inverse_hessian", h);
    check_shape(op, "s", s[l], {h.size(0)});
    check_same(op, "s", s[l], "inverse_hessian", h);
    check_shape(op, "y", y[l], {h.size(0)});
    check_same(op, "y", y[l], "inverse_hessian", h);
  }
}

}  // namespace secondorder
