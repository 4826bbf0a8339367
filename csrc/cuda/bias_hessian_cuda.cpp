// bias_hessian on CUDA tensors.
#include <ATen/Context.h>

#include <optional>

#include "../ops/bias_hessian.h"
#include "glue.h"

namespace secondorder::cuda {
namespace {

// How float32's products are computed: PyTorch's own switch for matrix products on CUDA
// (torch.set_float32_matmul_precision) allows TF32, or calls for float32's accuracy. That takes three TF32 products in
// place of one, which pays by the data sheets' rates on 8.0 (156 TFLOP/s against 19.5) and 9.0 (495 against 67) only.
Arithmetic arithmetic(int device) {
  if (at::globalContext().allowTF32CuBLAS()) return Arithmetic::tf32;
  int major, minor;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return minor == 0 && (major == 8 || major == 9) ? Arithmetic::split_tf32 : Arithmetic::plain;
}

// The recursion from `first`, which is d1, or with an activation what it saved.
at::Tensor recursion(const at::Tensor& hessian_, const at::Tensor& weight_, const at::Tensor& first_,
                     const std::optional<at::Tensor>& second_, const std::optional<at::Tensor>& grad_input_,
                     std::optional<Activation> activation, double parameter, double gamma) {
  const Launch launch(hessian_);
  const auto contiguous = [](const std::optional<at::Tensor>& t) { return t ? t->contiguous() : at::Tensor(); };
  const at::Tensor hessian = hessian_.contiguous(), weight = weight_.contiguous(), first = first_.contiguous(),
                   second = contiguous(second_), grad_input = contiguous(grad_input_);
  const int64_t k = weight.size(0), n = weight.size(1), m = first.size(0);
  at::Tensor product = at::empty({k, n}, hessian.options()), out = at::empty({n, n}, hessian.options());
  AT_DISPATCH_FLOATING_TYPES(hessian.scalar_type(), "bias_hessian", [&] {
    using T = scalar_t;
    const Derivatives<T> derivatives{data<T>(first),         data<T>(second),
                                     data<T>(grad_input),    activation.has_value(),
                                     activation.value_or(Activation::identity), T(parameter)};
    bias_hessian<T>(k, n, m, data<T>(hessian), data<T>(weight), derivatives, T(gamma),
                    arithmetic(launch.guard.current_device().index()), product.mutable_data_ptr<T>(),
                    out.mutable_data_ptr<T>(), launch.device(), launch.stream);
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

at::Tensor from_derivatives(const at::Tensor& hessian, const at::Tensor& weight, const at::Tensor& d1,
                            const std::optional<at::Tensor>& d2, const std::optional<at::Tensor>& grad_input,
                            double gamma) {
  check_bias_hessian(hessian, weight, d1, d2, grad_input, gamma);
  return recursion(hessian, weight, d1, d2, grad_input, {}, 1, gamma);
}

at::Tensor from_activation(const at::Tensor& hessian, const at::Tensor& weight, const at::Tensor& saved,
                           c10::string_view name, double parameter, const std::optional<at::Tensor>& grad_input,
                           double gamma) {
  const Activation activation =
      check_bias_hessian_activation(hessian, weight, saved, name, parameter, grad_input, gamma);
  return recursion(hessian, weight, saved, {}, grad_input, activation, parameter, gamma);
}

}  // namespace

TORCH_LIBRARY_IMPL(secondorder, CUDA, m) {
  m.impl("bias_hessian", from_derivatives);
  m.impl("bias_hessian.activation", from_activation);
}

}  // namespace secondorder::cuda
