// EigenAdam's operators on CUDA tensors. Whether a step was refused, and what it has learnt, stays on the device.
#include <optional>
#include <vector>

#include "../ops/eigen.h"
#include "glue.h"

namespace secondorder::cuda {
namespace {

// A written tensor's data, or null where there is none.
template <typename T>
T* target(const at::Tensor& t) {
  return t.numel() ? t.mutable_data_ptr<T>() : nullptr;
}

// The gradients and bases of all matrices, contiguous; the first moments.
struct Net {
  std::vector<at::Tensor> grad_weight, grad_bias, mean, basis_out, basis_in;
  at::TensorList first;

  Net(at::TensorList grad_weight_, at::TensorList grad_bias_, at::TensorList mean_, at::TensorList basis_out_,
      at::TensorList basis_in_, at::TensorList first_)
      : grad_weight(contiguous(grad_weight_)), grad_bias(contiguous(grad_bias_)), mean(contiguous(mean_)),
        basis_out(contiguous(basis_out_)), basis_in(contiguous(basis_in_)), first(first_) {}

  size_t count() const { return grad_weight.size(); }
  at::ScalarType dtype() const { return grad_weight.empty() ? at::kFloat : grad_weight[0].scalar_type(); }

  template <typename T>
  EigenMatrix<T> matrix(size_t l) const {
    return {{grad_weight[l].size(0), grad_weight[l].size(1), basis_out[l].size(0), basis_in[l].size(0),
             grad_bias[l].numel() > 0},
            data<T>(grad_weight[l]),
            data<T>(grad_bias[l]),
            data<T>(mean[l]),
            data<T>(basis_out[l]),
            data<T>(basis_in[l]),
            target<T>(first[l])};
  }
};

void sketch_(const at::Tensor& sketch, const at::Tensor& inputs, const at::Tensor& basis, const at::Tensor& shift,
             const std::optional<at::Tensor>& control, int64_t renew_every) {
  check_eigen_sketch(sketch, inputs, basis, shift, control, renew_every);
  if (inputs.numel() == 0) return;
  const Launch launch(sketch);
  const at::Tensor h = inputs.contiguous(), v = basis.contiguous(), a = shift.contiguous();
  AT_DISPATCH_FLOATING_TYPES(h.scalar_type(), "eigen_sketch_", [&] {
    const EigenSketch<scalar_t> in{h.size(0),
                                   h.size(1),
                                   v.size(0),
                                   data<scalar_t>(h),
                                   data<scalar_t>(v),
                                   data<scalar_t>(a),
                                   target<scalar_t>(sketch)};
    const Device device = launch.device();
    const at::Tensor memory = workspace(eigen_sketch_workspace(in, device), h);
    eigen_sketch(in, control ? control->const_data_ptr<double>() : nullptr, EigenReplay{renew_every},
                 memory.mutable_data_ptr(), device, launch.stream);
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  written(sketch);
}

void renew_(at::TensorList mean, at::TensorList basis_out, at::TensorList basis_in, at::TensorList scale_out,
            at::TensorList scale_in, at::TensorList first, const at::Tensor& control, at::TensorList grad_weight,
            at::TensorList grad_bias, at::TensorList sketch, at::TensorList bias_hessian, at::IntArrayRef rows,
            at::ArrayRef<double> share, int64_t renew_every, int64_t since, double decay) {
  check_eigen_renew(mean, basis_out, basis_in, scale_out, scale_in, first, control, grad_weight, grad_bias, sketch,
                    bias_hessian, rows, share, renew_every, since, decay);
  if (grad_weight.empty()) return;
  const Launch launch(control);
  const Net net(grad_weight, grad_bias, mean, basis_out, basis_in, first);
  const std::vector<at::Tensor> sums = contiguous(sketch), hessians = contiguous(bias_hessian);
  AT_DISPATCH_FLOATING_TYPES(net.dtype(), "eigen_renew_", [&] {
    std::vector<EigenRenewal<scalar_t>> matrices;
    for (size_t l = 0; l < net.count(); ++l)
      matrices.push_back({net.matrix<scalar_t>(l), target<scalar_t>(mean[l]), target<scalar_t>(basis_out[l]),
                          target<scalar_t>(basis_in[l]), target<scalar_t>(scale_out[l]), target<scalar_t>(scale_in[l]),
                          data<scalar_t>(sums[l]), rows[l], data<scalar_t>(hessians[l]), share[l]});
    const int count = int(matrices.size());
    const Device device = launch.device();
    const at::Tensor memory = workspace(eigen_renew_workspace(matrices.data(), count, device), control);
    eigen_renew(matrices.data(), count, control.mutable_data_ptr<double>(), EigenReplay{renew_every, since}, decay,
                memory.mutable_data_ptr(), device, launch.stream);
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  for (const at::TensorList list : {mean, basis_out, basis_in, scale_out, scale_in, first}) written(list);
  written(control);
}

void step_(at::TensorList weight, at::TensorList bias, at::TensorList first, at::TensorList second, at::TensorList last,
           at::TensorList size, const at::Tensor& control, at::TensorList grad_weight, at::TensorList grad_bias,
           at::TensorList mean, at::TensorList basis_out, at::TensorList basis_in, at::ArrayRef<double> lr,
           at::ArrayRef<double> lr_bias, at::ArrayRef<double> decay, at::ArrayRef<double> decay_bias,
           at::IntArrayRef step, double beta1, double beta2, double eps, bool renewed, int64_t renew_every,
           int64_t since, const std::optional<at::Tensor>& rate) {
  check_eigen_step(weight, bias, first, second, last, size, control, grad_weight, grad_bias, mean, basis_out, basis_in,
                   lr, lr_bias, decay, decay_bias, step, beta1, beta2, eps, renew_every, since, rate);
  const Launch launch(control);
  const Net net(grad_weight, grad_bias, mean, basis_out, basis_in, first);
  AT_DISPATCH_FLOATING_TYPES(net.dtype(), "eigen_step_", [&] {
    std::vector<EigenStep<scalar_t>> matrices;
    for (size_t l = 0; l < net.count(); ++l) {
      const EigenMatrix<scalar_t> matrix = net.matrix<scalar_t>(l);
      matrices.push_back({matrix, target<scalar_t>(weight[l]), target<scalar_t>(bias[l]), target<scalar_t>(second[l]),
                          target<scalar_t>(last[l]), (last[l].numel() - matrix.sizes.rest()) / matrix.sizes.p,
                          size[l].mutable_data_ptr<double>(), step[l], beta1, beta2, eps, lr[l], lr_bias[l], decay[l],
                          decay_bias[l], rate ? rate->const_data_ptr<double>() + 2 * l : nullptr});
    }
    const int count = int(matrices.size());
    const Device device = launch.device();
    const at::Tensor memory = workspace(eigen_step_workspace(matrices.data(), count, device), control);
    eigen_step(matrices.data(), count, control.mutable_data_ptr<double>(), renewed, EigenReplay{renew_every, since},
               memory.mutable_data_ptr(), device, launch.stream);
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  for (const at::TensorList list : {weight, bias, first, second, last, size}) written(list);
  written(control);
}

}  // namespace

TORCH_LIBRARY_IMPL(secondorder, CUDA, m) {
  m.impl("eigen_sketch_", sketch_);
  m.impl("eigen_renew_", renew_);
  m.impl("eigen_step_", step_);
}

}  // namespace secondorder::cuda
