// eacg_solve and eacg_update_: EA-CG's two systems of a layer or of a whole net, and the step along their solutions.
#include "eacg.h"

#include "../checks.h"

namespace secondorder {
namespace {

void check_layer(const char* op, const at::Tensor& hessian, const at::Tensor& mean_input, const at::Tensor& grad_weight,
                 const at::Tensor& grad_bias, double alpha) {
  check_square(op, "bias_hessian", hessian);
  check_floating(op, "bias_hessian", hessian);
  check_dim(op, "mean_input", mean_input, 1);
  check_same(op, "mean_input", mean_input, "bias_hessian", hessian);
  check_shape(op, "grad_weight", grad_weight, {hessian.size(0), mean_input.size(0)});
  check_same(op, "grad_weight", grad_weight, "bias_hessian", hessian);
  if (grad_bias.numel() > 0 || grad_bias.dim() != 1) check_shape(op, "grad_bias", grad_bias, {hessian.size(0)});
  check_same(op, "grad_bias", grad_bias, "bias_hessian", hessian);
  TORCH_CHECK_VALUE(alpha > 0 && alpha < 1, op, ": expected alpha in (0, 1), got ", alpha);
}

void check_systems(const char* op, at::TensorList hessians, at::TensorList mean_inputs, at::TensorList grad_weights,
                   at::TensorList grad_biases, at::ArrayRef<double> alpha, int64_t max_iter, double tol) {
  check_lengths(op, {{"bias_hessian", hessians.size()},
                     {"mean_input", mean_inputs.size()},
                     {"grad_weight", grad_weights.size()},
                     {"grad_bias", grad_biases.size()},
                     {"alpha", alpha.size()}});
  TORCH_CHECK_VALUE(max_iter >= 1, op, ": expected max_iter >= 1, got ", max_iter);
  TORCH_CHECK_VALUE(tol >= 0, op, ": expected tol >= 0, got ", tol);
  for (size_t l = 0; l < hessians.size(); ++l) {
    check_layer(op, hessians[l], mean_inputs[l], grad_weights[l], grad_biases[l], alpha[l]);
    check_same_device(op, "bias_hessian", hessians[l], "the first layer", hessians[0]);
  }
}

}  // namespace

void check_eacg_solve(at::TensorList hessians, at::TensorList mean_inputs, at::TensorList grad_weights,
                      at::TensorList grad_biases, at::ArrayRef<double> alpha, int64_t max_iter, double tol) {
  check_systems("eacg_solve", hessians, mean_inputs, grad_weights, grad_biases, alpha, max_iter, tol);
}

void check_eacg_update(at::TensorList hessians, at::TensorList mean_inputs, at::TensorList grad_weights,
                       at::TensorList grad_biases, at::TensorList weights, at::TensorList biases,
                       at::TensorList weight_momenta, at::TensorList bias_momenta, at::ArrayRef<double> lr,
                       at::ArrayRef<double> alpha, at::ArrayRef<double> momentum, at::ArrayRef<double> weight_decay,
                       int64_t max_iter, double tol, std::optional<at::ArrayRef<double>> max_norm) {
  constexpr const char* op = "eacg_update_";
  check_systems(op, hessians, mean_inputs, grad_weights, grad_biases, alpha, max_iter, tol);
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
  if (max_norm) check_lengths(op, {{"bias_hessian", hessians.size()}, {"max_norm", max_norm->size()}});
  for (size_t l = 0; max_norm && l < hessians.size(); ++l)
    TORCH_CHECK_VALUE((*max_norm)[l] >= 0, op, ": expected max_norm >= 0, got ", (*max_norm)[l]);
  Targets targets(op);
  const auto check_target = [&](const char* name, const at::Tensor& t, const char* like_name, const at::Tensor& like) {
    check_shape(op, name, t, like.sizes());
    check_same(op, name, t, like_name, like);
    targets.add(name, t);
  };
  for (size_t l = 0; l < hessians.size(); ++l) {
    check_not_negative(op, "lr", lr[l]);
    check_not_negative(op, "weight_decay", weight_decay[l]);
    TORCH_CHECK_VALUE(momentum[l] >= 0 && momentum[l] < 1, op, ": expected momentum in [0, 1), got ", momentum[l]);
    check_target("weight", weights[l], "grad_weight", grad_weights[l]);
    check_target("bias", biases[l], "grad_bias", grad_biases[l]);
    if (!keep) continue;
    check_target("weight_momentum", weight_momenta[l], "weight", weights[l]);
    check_target("bias_momentum", bias_momenta[l], "bias", biases[l]);
  }
  targets.check_apart();
}

}  // namespace secondorder
