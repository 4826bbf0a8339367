// Tensors and lists of them, as every operator on the CPU and on CUDA takes and leaves them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>

#include <vector>

namespace secondorder {

// Stands where ATen's operators compute an operator's results or write its arguments. None is differentiable, so
// autograd records nothing of it, nor minds leaves that are written, whatever size and device the tensors have.
using Unrecorded = c10::NoGradGuard;

inline std::vector<at::Tensor> contiguous(at::TensorList tensors) {
  std::vector<at::Tensor> out;
  for (const at::Tensor& t : tensors) out.push_back(t.contiguous());
  return out;
}

// What autograd saved of these is no longer what they hold.
inline void written(at::TensorList tensors) {
  for (const at::Tensor& t : tensors) t.unsafeGetTensorImpl()->bump_version();
}

}  // namespace secondorder
