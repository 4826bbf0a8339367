// What the kernel files share: launches, vector loads, and the table that lets one launch serve many layers. No torch
// header here or in any kernel file: they are plain CUDA C++, and tests compile them with g++ as well (cuda_on_cpu.h).
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
// All blocks resident at once, so that they may wait for each other. A failure is left for the caller's launch check.
#define LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, ...)                                   \
  do {                                                                                                       \
    cudaLaunchAttribute attribute_{};                                                                        \
    attribute_.id = cudaLaunchAttributeCooperative;                                                          \
    attribute_.val.cooperative = 1;                                                                          \
    const cudaLaunchConfig_t config_{dim3(grid), dim3(block), size_t(shared_bytes), stream, &attribute_, 1}; \
    (void)cudaLaunchKernelEx(&config_, kernel, __VA_ARGS__);                                                 \
  } while (false)
#define DYN_SHARED(T, name)                                        \
  extern __shared__ __align__(16) unsigned char dynamic_shared_[]; \
  T* const name = reinterpret_cast<T*>(dynamic_shared_)
#else
#include "cuda_on_cpu.h"
#endif

#include <cstdint>
#include <limits>

namespace secondorder::cuda {

constexpr int kWarp = 32;

template <typename T>
constexpr double kLargest = double(std::numeric_limits<T>::max());

template <typename I>
constexpr __host__ __device__ I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

// 16 bytes, the widest load of one thread.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};

// Whether rows of n elements from each of these pointers can be read as Vectors. A null pointer always can.
template <typename T, typename... P>
__host__ __device__ inline bool aligned(int64_t n, const T* first, const P*... rest) {
  const uintptr_t bits = (reinterpret_cast<uintptr_t>(first) | ... | reinterpret_cast<uintptr_t>(rest));
  return n % Vector<T>::kSize == 0 && bits % sizeof(Vector<T>) == 0;
}

// kWidth consecutive elements: one vector access where kWidth is a Vector's size, for which p must be aligned.
template <int kWidth, typename T>
__device__ __forceinline__ void load(const T* p, T (&v)[kWidth]) {
  if constexpr (kWidth == Vector<T>::kSize) {
    const Vector<T> vector = *reinterpret_cast<const Vector<T>*>(p);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) v[e] = vector.v[e];
  } else {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) v[e] = p[e];
  }
}

template <int kWidth, typename T>
__device__ __forceinline__ void store(T* p, const T (&v)[kWidth]) {
  if constexpr (kWidth == Vector<T>::kSize) {
    Vector<T> vector;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) vector.v[e] = v[e];
    *reinterpret_cast<Vector<T>*>(p) = vector;
  } else {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) p[e] = v[e];
  }
}

template <int kWidth>
struct Width {
  static constexpr int value = kWidth;
};

// f(column, Width) over the columns of one row, shared among the lanes of a warp; `vectors` as `aligned` found.
template <typename T, typename F>
__device__ __forceinline__ void each_column(int64_t n, bool vectors, F&& f) {
  const int lane = threadIdx.x % kWarp;
  if (vectors) {
    constexpr int kSize = Vector<T>::kSize;
#pragma unroll 2
    for (int64_t j = lane * kSize; j < n; j += kWarp * kSize) f(j, Width<kSize>{});
  } else {
#pragma unroll 2
    for (int64_t j = lane; j < n; j += kWarp) f(j, Width<1>{});
  }
}

// One launch serves many layers. Both structs are passed by value as kernel parameters: no copy to the device, and CUDA
// graphs keep them. Parameters may take 32,764 bytes from CUDA 12.1 on.
constexpr int kLayersPerLaunch = 128;

template <typename Layer>
struct Table {
  Layer layer[kLayersPerLaunch];
  int count;
};

// How a launch's blocks are divided: layer l has [first[l], first[l + 1]), maybe none.
struct Blocks {
  unsigned first[kLayersPerLaunch + 1] = {};

  // The layer of a block: the last one that begins at or before it.
  __device__ __forceinline__ int layer(int count, unsigned block) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first[middle] <= block) low = middle;
      else high = middle - 1;
    }
    return low;
  }
};

// Rows of matrices are given a warp each, kRowsPerBlock to a block; at least kRowBlocks blocks fit a multiprocessor,
// which leaves each thread 64 registers.
constexpr int kRowsPerBlock = 8;
constexpr int kRowThreads = kRowsPerBlock * kWarp;
constexpr int kRowBlocks = 4;

}  // namespace secondorder::cuda
