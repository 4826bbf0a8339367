// What every glue file shares: where tensors become launches.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <atomic>
#include <cstdint>
#include <vector>

#include "../tensors.h"
#include "kernels.h"

namespace secondorder::cuda {

// The current device can run the kernels. Asked once for each of the first 64 devices.
inline void check_device(int index) {
  static std::atomic<uint64_t> checked{0};
  const uint64_t bit = index < 64 ? uint64_t(1) << index : 0;
  if (checked & bit) return;
  if (!has_kernels()) {
    cudaDeviceProp card;
    C10_CUDA_CHECK(cudaGetDeviceProperties(&card, index));
    TORCH_CHECK(false, "secondorder: its extension has no kernels for ", card.name, ", a card of compute capability ",
                card.major, ".", card.minor, ": install the package anew with TORCH_CUDA_ARCH_LIST=\"", card.major, ".",
                card.minor, "\", or set SECONDORDER_PURE_PYTHON=1 to go without it");
  }
  checked |= bit;
}

// The device of `like` made current, with its current stream, for one operator.
struct Launch {
  explicit Launch(const at::Tensor& like) : guard(like.device()), stream(c10::cuda::getCurrentCUDAStream()) {
    check_device(guard.current_device().index());
  }

  Device device() const {
    Device found;
    const int index = guard.current_device().index();
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, index));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    return found;
  }

  c10::cuda::CUDAGuard guard;
  c10::cuda::CUDAStream stream;
};

// A contiguous tensor's data, or null where there is none.
template <typename T>
const T* data(const at::Tensor& t) {
  return t.defined() && t.numel() ? t.const_data_ptr<T>() : nullptr;
}

inline at::Tensor workspace(size_t bytes, const at::Tensor& like) {
  return at::empty({int64_t(bytes)}, like.options().dtype(at::kByte));
}

}  // namespace secondorder::cuda
