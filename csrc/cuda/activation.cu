// activation_derivatives: sigma' and sigma'' of the analytic activations, one pass, elementwise.
#include "activation.cuh"
#include "kernels.h"

namespace secondorder::cuda {
namespace {

constexpr int kThreads = 256;

// Parallel over elements, a Vector each where `vectors`.   saved, d1, d2 [n]
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    derivatives_kernel(int64_t n, const T* __restrict__ saved, Activation activation, T parameter, T* __restrict__ d1,
                       T* __restrict__ d2) {
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kWidth;
  if (i >= n) return;
  T v[kWidth], first[kWidth], second[kWidth];
  load<kWidth>(saved + i, v);
#pragma unroll
  for (int e = 0; e < kWidth; ++e) derivatives(activation, v[e], parameter, first[e], second[e]);
  store<kWidth>(d1 + i, first);
  store<kWidth>(d2 + i, second);
}

}  // namespace

#if defined(__CUDACC__)
bool has_kernels() {
  cudaFuncAttributes attributes;  // of any kernel: all files are compiled for the same cards
  const bool found = cudaFuncGetAttributes(&attributes, derivatives_kernel<float, 1>) == cudaSuccess;
  if (!found) (void)cudaGetLastError();  // which a later check would take for its own
  return found;
}
#endif

template <typename T>
void activation_derivatives(int64_t n, const T* saved, Activation activation, T parameter, T* d1, T* d2,
                            cudaStream_t stream) {
  if (n == 0) return;
  constexpr int kSize = Vector<T>::kSize;
  if (aligned(n, saved, d1, d2))
    LAUNCH((derivatives_kernel<T, kSize>), unsigned(ceil_div<int64_t>(n / kSize, kThreads)), kThreads, 0, stream, n,
           saved, activation, parameter, d1, d2);
  else
    LAUNCH((derivatives_kernel<T, 1>), unsigned(ceil_div<int64_t>(n, kThreads)), kThreads, 0, stream, n, saved,
           activation, parameter, d1, d2);
}

template void activation_derivatives(int64_t, const float*, Activation, float, float*, float*, cudaStream_t);
template void activation_derivatives(int64_t, const double*, Activation, double, double*, double*, cudaStream_t);

}  // namespace secondorder::cuda
