// Lists of tensors, as every operator on the CPU and on CUDA takes and leaves them.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace secondorder {

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
