// bias_hessian on CUDA tensors.
#include <ATen/Context.h>

#include <optional>
#include <type_traits>

#include "../ops/bias_hessian.h"
#include "glue.h"

namespace secondorder::cuda {
namespace {

// Context::float32Precision, by whichever types it has: strings first, enumerations later.
template <typename Context, typename Precision, typename Backend, typename Op>
bool reads_tf32(const Context& context, Precision (Context::*read)(Backend, Op) const) {
  if constexpr (std::is_enum_v<Precision>) return (context.*read)(Backend::CUDA, Op::MATMUL) == Precision::TF32;
  else return (context.*read)("cuda", "matmul") == "tf32";
}

// Whether PyTorch allows TF32 in matrix products on CUDA. Where torch has float32Precision (2.9), allowTF32CuBLAS
// throws once the user has set torch.backends.cuda.matmul.fp32_precision; before, there is nothing else to ask.
template <typename Context>
bool allows_tf32(const Context& context) {
  if constexpr (requires { &Context::float32Precision; }) return reads_tf32(context, &Context::float32Precision);
  else return context.allowTF32CuBLAS();
}

// How float32's products are computed: PyTorch's own switch for matrix products on CUDA
// (torch.set_float32_matmul_precision) allows TF32, or calls for float32's accuracy. That takes three TF32 products in
// place of one, which pays by the data sheets' rates on 8.0 (156 TFLOP/s against 19.5) and 9.0 (495 against 67) only.
Arithmetic arithmetic(int device) {
  int major, minor;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  if (major < 8) return Arithmetic::plain;  // no tensor cores for TF32
  if (allows_tf32(at::globalContext())) return Arithmetic::tf32;
  return minor == 0 && (major == 8 || major == 9) ? Arithmetic::split_tf32 : Arithmetic::plain;
}

// Whether cuBLAS computes the products. In TF32 its kernels for compute capability 9.0 reach five times the rate of
// mma.sync's, which from some size on outweighs the symmetry that they cannot use and the passes over whole products.
// H200, m = 1000, TF32: 1.14 ms by cuBLAS for k = n = 4096, against 2.90 by an earlier form of these kernels; for
// k = n = 1024 these kernels take 0.14 ms, cuBLAS and passes of PyTorch's 0.12 to 0.24. With few rows of W the moment
// of d1 is nearly all of the work, and n decides alike. In float32's accuracy cuBLAS has no tensor cores to offer.
bool cublas_pays(int64_t n, Arithmetic arithmetic) { return arithmetic == Arithmetic::tf32 && n >= 2048; }

// Only float32 comes here, at sizes where the launches are small beside the products.
at::Tensor recursion_by_cublas(const at::Tensor& hessian, const at::Tensor& weight, const at::Tensor& first,
                               const at::Tensor& second, const at::Tensor& grad_input,
                               std::optional<Activation> activation, double parameter, double gamma,
                               const Launch& launch) {
  const int64_t n = weight.size(1), m = first.size(0);
  at::Tensor d1 = first, d2 = second;
  if (activation) {
    d1 = at::empty_like(first);
    d2 = at::empty_like(first);
    activation_derivatives<float>(first.numel(), data<float>(first), *activation, float(parameter),
                                  d1.mutable_data_ptr<float>(), d2.mutable_data_ptr<float>(), launch.stream);
  }
  at::Tensor sums;
  if (grad_input.defined()) sums = at::sum(at::mul(d2, grad_input), 0, false, at::kDouble);
  const at::Tensor curvature = at::mm(weight.t(), at::mm(hessian, weight)), moment = at::mm(d1.t(), d1);
  at::Tensor out = at::empty({n, n}, hessian.options());
  bias_hessian_of_products<float>(n, m, data<float>(curvature), data<float>(moment), data<double>(sums), float(gamma),
                                  out.mutable_data_ptr<float>(), launch.stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
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
  const Device device = launch.device();
  const Arithmetic kind = arithmetic(launch.guard.current_device().index());
  if (hessian.scalar_type() == at::kFloat && cublas_pays(n, kind))
    return recursion_by_cublas(hessian, weight, first, second, grad_input, activation, parameter, gamma, launch);
  at::Tensor out = at::empty({n, n}, hessian.options());
  AT_DISPATCH_FLOATING_TYPES(hessian.scalar_type(), "bias_hessian", [&] {
    using T = scalar_t;
    const Derivatives<T> derivatives{data<T>(first),
                                     data<T>(second),
                                     data<T>(grad_input),
                                     activation.has_value(),
                                     activation.value_or(Activation::identity),
                                     T(parameter)};
    const at::Tensor work = workspace(bias_hessian_workspace<T>(k, n, m, kind, device), hessian);
    bias_hessian<T>(k, n, m, data<T>(hessian), data<T>(weight), derivatives, T(gamma), kind, work.mutable_data_ptr(),
                    out.mutable_data_ptr<T>(), device, launch.stream);
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
  m.impl("bias_hessian.chain", bias_hessian_chain);
}

}  // namespace secondorder::cuda
