// The tensor-core instructions that CUDA C++ has no function for, as PTX; cuda_on_cpu.h has the same functions for g++.
#pragma once

#include "launch.cuh"

#if defined(__CUDACC__)
namespace secondorder::cuda {

// Before compute capability 8.0 there is no TF32, and `arithmetic` in bias_hessian_cuda.cpp does not ask for it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define NO_TF32
#endif

// v rounded to TF32's 11 significant bits, ties away from zero.
__device__ __forceinline__ float to_tf32(float v) {
#if defined(NO_TF32)
  __trap();
  return v;
#else
  unsigned bits;
  asm volatile("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return __uint_as_float(bits);
#endif
}

// v = large + small: large rounded to TF32, small exact, to 12 significant bits at most. Of them the tensor cores
// ignore what TF32 has no room for, the last. Three instructions, for cvt.rna alone takes three on some devices. A NaN
// may leave `large`, but not `small`.
__device__ __forceinline__ void split_tf32(float v, float& large, float& small) {
  large = __uint_as_float((__float_as_uint(v) + 0x1000u) & 0xffffe000u);
  small = v - large;
}

// d += a b for a [16, 8] and b [8, 8] of TF32 numbers and d [16, 8], by all lanes of a warp together. With
// group = lane / 4 and member = lane % 4 a lane holds
//
//   a[group, member], a[group + 8, member], a[group, member + 4], a[group + 8, member + 4];
//   b[member, group], b[member + 4, group];
//   d[group, 2 member + (0, 1)], d[group + 8, 2 member + (0, 1)].
__device__ __forceinline__ void mma_m16n8k8(float* d, const float (&a)[4], const float (&b)[2]) {
#if defined(NO_TF32)
  __trap();
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#endif
}

}  // namespace secondorder::cuda
#endif
