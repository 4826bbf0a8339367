// activation_derivatives on CUDA tensors.
#include <tuple>

#include "../ops/activation.h"
#include "glue.h"

namespace secondorder::cuda {
namespace {

std::tuple<at::Tensor, at::Tensor> derivatives(const at::Tensor& saved_, c10::string_view name, double parameter) {
  constexpr const char* op = "activation_derivatives";
  const Activation activation = check_activation_derivatives(saved_, name, parameter);
  const Launch launch(saved_);
  const at::Tensor saved = saved_.contiguous();
  at::Tensor d1 = at::empty_like(saved), d2 = at::empty_like(saved);
  AT_DISPATCH_FLOATING_TYPES(saved.scalar_type(), op, [&] {
    using T = scalar_t;
    activation_derivatives<T>(saved.numel(), saved.const_data_ptr<T>(), activation, T(parameter),
                              d1.mutable_data_ptr<T>(), d2.mutable_data_ptr<T>(), launch.stream);
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {d1, d2};
}

}  // namespace

TORCH_LIBRARY_IMPL(secondorder, CUDA, m) { m.impl("activation_derivatives", derivatives); }

}  // namespace secondorder::cuda
