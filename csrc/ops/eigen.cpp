// EigenAdam: Adam's rule in the eigenbases of both sides of every matrix of a net.
#include "eigen.h"

#include "../checks.h"
#include "../eigen.h"

namespace secondorder {
namespace {

void check_control(const char* op, const at::Tensor& control) {
  check_shape(op, "control", control, {kEigenControl});
  TORCH_CHECK_TYPE(control.scalar_type() == at::kDouble, op, ": expected control of dtype float64, got ",
                   control.scalar_type());
  check_contiguous(op, "control", control);
}

void check_replay(const char* op, int64_t renew_every, int64_t since) {
  TORCH_CHECK_VALUE(renew_every >= 0 && since >= 0, op, ": expected renew_every and since >= 0, got ", renew_every,
                    " and ", since);
}

// A tensor of this shape, as `like` in dtype and device, that is written in place.
void check_written(const char* op, const char* name, const at::Tensor& t, at::IntArrayRef shape, const at::Tensor& like,
                   Targets& targets) {
  check_shape(op, name, t, shape);
  check_same(op, name, t, "grad_weight", like);
  targets.add(name, t);
}

// What a matrix of a step and of a renewal has in common; the sizes of the parts of its gradient.
EigenSizes check_matrix(const char* op, const at::Tensor& grad_weight, const at::Tensor& grad_bias,
                        const at::Tensor& mean, const at::Tensor& basis_out, const at::Tensor& basis_in) {
  check_dim(op, "grad_weight", grad_weight, 2);
  check_floating(op, "grad_weight", grad_weight);
  TORCH_CHECK_VALUE(grad_weight.numel() > 0, op, ": expected a grad_weight with elements, got shape ",
                    grad_weight.sizes());
  const int64_t n = grad_weight.size(0), p = grad_weight.size(1);
  const bool bias = grad_bias.numel() > 0;
  check_shape(op, "grad_bias", grad_bias, {bias ? n : 0});
  check_dim(op, "basis_out", basis_out, 2);
  check_dim(op, "basis_in", basis_in, 2);
  check_shape(op, "basis_out", basis_out, {std::min(basis_out.size(0), n), n});
  check_shape(op, "basis_in", basis_in, {std::min(basis_in.size(0), p), p});
  check_shape(op, "mean", mean, {bias ? p : 0});
  for (const auto& [name, t] : {std::pair<const char*, const at::Tensor&>{"grad_bias", grad_bias},
                                {"mean", mean},
                                {"basis_out", basis_out},
                                {"basis_in", basis_in}})
    check_same(op, name, t, "grad_weight", grad_weight);
  return {n, p, basis_out.size(0), basis_in.size(0), bias};
}

}  // namespace

void check_eigen_sketch(const at::Tensor& sketch, const at::Tensor& inputs, const at::Tensor& basis,
                        const at::Tensor& shift, const std::optional<at::Tensor>& control, int64_t renew_every) {
  constexpr const char* op = "eigen_sketch_";
  check_dim(op, "inputs", inputs, 2);
  check_floating(op, "inputs", inputs);
  check_dim(op, "basis", basis, 2);
  const int64_t k = basis.size(0), p = inputs.size(1);
  check_shape(op, "basis", basis, {k, p});
  check_same(op, "basis", basis, "inputs", inputs);
  check_shape(op, "shift", shift, {shift.numel() ? p : 0});
  check_same(op, "shift", shift, "inputs", inputs);
  check_shape(op, "sketch", sketch, {k + 1, p});
  check_same(op, "sketch", sketch, "inputs", inputs);
  Targets(op).add("sketch", sketch);
  check_replay(op, renew_every, 0);
  TORCH_CHECK_VALUE(control.has_value() || !renew_every, op, ": expected control with renew_every > 0, got None");
  if (!control) return;
  check_control(op, *control);
  check_same_device(op, "control", *control, "inputs", inputs);
}

void check_eigen_renew(at::TensorList mean, at::TensorList basis_out, at::TensorList basis_in, at::TensorList scale_out,
                       at::TensorList scale_in, at::TensorList first, const at::Tensor& control,
                       at::TensorList grad_weight, at::TensorList grad_bias, at::TensorList sketch,
                       at::TensorList bias_hessian, at::IntArrayRef rows, at::ArrayRef<double> share,
                       int64_t renew_every, int64_t since, double decay) {
  constexpr const char* op = "eigen_renew_";
  check_lengths(op, {{"grad_weight", grad_weight.size()},
                     {"grad_bias", grad_bias.size()},
                     {"mean", mean.size()},
                     {"basis_out", basis_out.size()},
                     {"basis_in", basis_in.size()},
                     {"scale_out", scale_out.size()},
                     {"scale_in", scale_in.size()},
                     {"first", first.size()},
                     {"sketch", sketch.size()},
                     {"bias_hessian", bias_hessian.size()},
                     {"rows", rows.size()},
                     {"share", share.size()}});
  check_control(op, control);
  Targets targets(op);
  targets.add("control", control);
  check_replay(op, renew_every, since);
  TORCH_CHECK_VALUE(decay >= 0 && decay < 1, op, ": expected decay in [0, 1), got ", decay);
  for (size_t l = 0; l < grad_weight.size(); ++l) {
    const at::Tensor& g = grad_weight[l];
    const EigenSizes sizes = check_matrix(op, g, grad_bias[l], mean[l], basis_out[l], basis_in[l]);
    check_same(op, "grad_weight", g, "the first one", grad_weight[0]);
    check_same_device(op, "grad_weight", g, "control", control);
    check_written(op, "mean", mean[l], {sizes.bias ? sizes.p : 0}, g, targets);
    check_written(op, "basis_out", basis_out[l], {sizes.ku, sizes.n}, g, targets);
    check_written(op, "basis_in", basis_in[l], {sizes.kv, sizes.p}, g, targets);
    check_written(op, "scale_out", scale_out[l], {sizes.ku}, g, targets);
    check_written(op, "scale_in", scale_in[l], {sizes.kv}, g, targets);
    check_written(op, "first", first[l], {sizes.parts()}, g, targets);
    const bool seen = sketch[l].numel() > 0;
    if (seen) check_shape(op, "sketch", sketch[l], {sizes.kv + 1, sizes.p});
    check_same(op, "sketch", sketch[l], "grad_weight", g);
    if (bias_hessian[l].numel() > 0) check_shape(op, "bias_hessian", bias_hessian[l], {sizes.n, sizes.n});
    check_same(op, "bias_hessian", bias_hessian[l], "grad_weight", g);
    TORCH_CHECK_VALUE(seen ? rows[l] > 0 : rows[l] == 0, op,
                      ": expected rows > 0 with a sketch and 0 without one, got ", rows[l], " with a sketch of shape ",
                      sketch[l].sizes());
    TORCH_CHECK_VALUE(share[l] > 0 && share[l] <= 1, op, ": expected share in (0, 1], got ", share[l]);
  }
  targets.check_apart();
}

void check_eigen_step(at::TensorList weight, at::TensorList bias, at::TensorList first, at::TensorList second,
                      at::TensorList last, at::TensorList size, const at::Tensor& control, at::TensorList grad_weight,
                      at::TensorList grad_bias, at::TensorList mean, at::TensorList basis_out, at::TensorList basis_in,
                      at::ArrayRef<double> lr, at::ArrayRef<double> lr_bias, at::ArrayRef<double> decay,
                      at::ArrayRef<double> decay_bias, at::IntArrayRef step, double beta1, double beta2, double eps,
                      int64_t renew_every, int64_t since, const std::optional<at::Tensor>& rate) {
  constexpr const char* op = "eigen_step_";
  check_lengths(op, {{"grad_weight", grad_weight.size()},
                     {"grad_bias", grad_bias.size()},
                     {"weight", weight.size()},
                     {"bias", bias.size()},
                     {"first", first.size()},
                     {"second", second.size()},
                     {"last", last.size()},
                     {"size", size.size()},
                     {"mean", mean.size()},
                     {"basis_out", basis_out.size()},
                     {"basis_in", basis_in.size()},
                     {"lr", lr.size()},
                     {"lr_bias", lr_bias.size()},
                     {"decay", decay.size()},
                     {"decay_bias", decay_bias.size()},
                     {"step", step.size()}});
  check_control(op, control);
  Targets targets(op);
  targets.add("control", control);
  check_replay(op, renew_every, since);
  if (rate) {
    check_shape(op, "rate", *rate, {int64_t(grad_weight.size()), 2});
    TORCH_CHECK_TYPE(rate->scalar_type() == at::kDouble, op, ": expected rate of dtype float64, got ",
                     rate->scalar_type());
    check_same_device(op, "rate", *rate, "control", control);
    check_contiguous(op, "rate", *rate);
  }
  TORCH_CHECK_VALUE(beta1 >= 0 && beta1 < 1, op, ": expected beta1 in [0, 1), got ", beta1);
  TORCH_CHECK_VALUE(beta2 > 0 && beta2 < 1, op, ": expected beta2 in (0, 1), got ", beta2);
  check_not_negative(op, "eps", eps);
  for (size_t l = 0; l < grad_weight.size(); ++l) {
    const at::Tensor& g = grad_weight[l];
    const EigenSizes sizes = check_matrix(op, g, grad_bias[l], mean[l], basis_out[l], basis_in[l]);
    check_same(op, "grad_weight", g, "the first one", grad_weight[0]);
    check_same_device(op, "grad_weight", g, "control", control);
    check_written(op, "weight", weight[l], {sizes.n, sizes.p}, g, targets);
    check_written(op, "bias", bias[l], {sizes.bias ? sizes.n : 0}, g, targets);
    check_written(op, "first", first[l], {sizes.parts()}, g, targets);
    check_written(op, "second", second[l], {sizes.parts()}, g, targets);
    check_dim(op, "last", last[l], 1);
    check_same(op, "last", last[l], "grad_weight", g);
    targets.add("last", last[l]);
    const int64_t sampled = last[l].numel() - sizes.rest();  // of E: whole rows
    TORCH_CHECK_VALUE(sampled >= 0 && sampled % sizes.p == 0 && (sampled > 0) == (sizes.residual() > 0) &&
                          sampled <= sizes.residual(),
                      op, ": expected last of ", sizes.rest(), " elements and 1 to ", sizes.residual() / sizes.p,
                      " rows of ", sizes.p, " more, got ", last[l].numel());
    check_shape(op, "size", size[l], {1});
    TORCH_CHECK_TYPE(size[l].scalar_type() == at::kDouble, op, ": expected size of dtype float64, got ",
                     size[l].scalar_type());
    check_same_device(op, "size", size[l], "control", control);
    targets.add("size", size[l]);
    TORCH_CHECK_VALUE(step[l] >= 0, op, ": expected step >= 0, got ", step[l]);
    for (const auto& [name, value] : {std::pair<const char*, double>{"lr", lr[l]},
                                      {"lr_bias", lr_bias[l]},
                                      {"decay", decay[l]},
                                      {"decay_bias", decay_bias[l]}})
      check_not_negative(op, name, value);
  }
  targets.check_apart();
}

}  // namespace secondorder
