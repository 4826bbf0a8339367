// Sums and maxima over a warp, over a row by a warp, and over a block. Every thread gets the same bits, whatever the
// order in which warps run.
#pragma once

#include <cmath>

#include "launch.cuh"

namespace secondorder::cuda {

template <typename T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

template <typename T>
__device__ __forceinline__ T warp_max(T v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v = std::fmax(v, __shfl_xor_sync(0xffffffffu, v, offset));
  return v;
}

// sum_j row[j] x[j] for one or two x in one pass, the same in every lane of the warp.   row, x0, x1 [n]
template <int kCount, typename T>
__device__ __forceinline__ void row_products(int64_t n, bool vectors, const T* row, const T* x0, const T* x1,
                                             T (&sums)[kCount]) {
  T partial[kCount] = {};
  each_column<T>(n, vectors, [&](int64_t j, auto width) {
    T m[width.value], x[width.value];
    load(row + j, m);
    load(x0 + j, x);
#pragma unroll
    for (int e = 0; e < width.value; ++e) partial[0] += m[e] * x[e];
    if constexpr (kCount > 1) {
      load(x1 + j, x);
#pragma unroll
      for (int e = 0; e < width.value; ++e) partial[1] += m[e] * x[e];
    }
  });
#pragma unroll
  for (int c = 0; c < kCount; ++c) sums[c] = warp_sum(partial[c]);
}

// Replaces each of kCount values by its sum over the block. Every thread must call it.
//   partial [kCount, kWarp] shared; free for reuse when the call returns
template <int kCount>
__device__ __forceinline__ void block_sum(double (&v)[kCount], double (*partial)[kWarp]) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    v[c] = warp_sum(v[c]);
    if (lane == 0) partial[c][warp] = v[c];
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < kCount; ++c) v[c] = warp_sum(lane < warps ? partial[c][lane] : 0.0);
  __syncthreads();
}

}  // namespace secondorder::cuda
