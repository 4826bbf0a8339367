// activation_derivatives: sigma' and sigma'' of the analytic activations, in one pass.
#include "activation.h"

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <torch/library.h>

#include <cmath>
#include <numbers>
#include <tuple>

#include "../ops/activation.h"
#include "kernels.h"
#include "parallel.h"

namespace secondorder::cpu {

std::pair<at::Tensor, at::Tensor> transcendentals(Activation activation, double parameter, const at::Tensor& saved) {
  switch (activation) {
    case Activation::softplus: return {parameter == 1 ? at::sigmoid(saved) : at::mul(saved, parameter).sigmoid_(), {}};
    case Activation::silu: return {at::sigmoid(saved), {}};
    case Activation::gelu:
      return {at::mul(saved, std::numbers::sqrt2 / 2).erf_(), at::mul(saved, saved).mul_(-0.5).exp_()};
    case Activation::gelu_tanh: {
      const double c = 2 * std::sqrt(2 / std::numbers::pi);
      return {at::mul(saved, saved).mul_(0.044715 * c).add_(c).mul_(saved).abs_().neg_().sigmoid_(), {}};
    }
    default: return {};
  }
}

namespace {

std::tuple<at::Tensor, at::Tensor> activation_derivatives(const at::Tensor& saved_, c10::string_view name,
                                                          double parameter) {
  constexpr const char* op = "activation_derivatives";
  const Activation activation = check_activation_derivatives(saved_, name, parameter);
  const at::Tensor saved = saved_.contiguous();
  const auto [e0, e1] = transcendentals(activation, parameter, saved);
  at::Tensor d1 = at::empty_like(saved), d2 = at::empty_like(saved);
  AT_DISPATCH_FLOATING_TYPES(saved.scalar_type(), op, [&] {
    const scalar_t* v = saved.const_data_ptr<scalar_t>();
    const scalar_t* p0 = e0.defined() ? e0.const_data_ptr<scalar_t>() : v;
    const scalar_t* p1 = e1.defined() ? e1.const_data_ptr<scalar_t>() : v;
    scalar_t *o1 = d1.mutable_data_ptr<scalar_t>(), *o2 = d2.mutable_data_ptr<scalar_t>();
    parallel_rows(saved.numel(), 1, [&](int64_t begin, int64_t end) {
      kernels<scalar_t>().derivatives(activation, scalar_t(parameter), 1, end - begin, v + begin, p0 + begin,
                                      p1 + begin, nullptr, 0, o1 + begin, 0, o2 + begin, nullptr);
    });
  });
  return {d1, d2};
}

}  // namespace

TORCH_LIBRARY_IMPL(secondorder, CPU, m) { m.impl("activation_derivatives", activation_derivatives); }

}  // namespace secondorder::cpu
