// Runs unmodified kernel source on the CPU: what CUDA C++ takes from nvcc and from cuda_runtime.h, for g++ on x86-64.
//
// A block's threads are fibers on one OS thread. Each runs until it waits (barrier, warp collective, __nanosleep), in
// an order that `configure` sets. Static __shared__ variables are thread_local, so they lie in one piece of memory,
// which is poisoned with 0xFF bytes (NaN) at a block's start and saved and restored where several blocks are resident.
// Blocks run one after the other, those of a cooperative launch in turns. Every misuse that is noticed throws
// std::runtime_error.
//
// Kernel files alone are compiled for a check: with AddressSanitizer, or with -fsanitize=thread, whose calls races.cpp
// answers. The emulation is compiled once, plainly. What all this cannot show: speed, rounding of fast intrinsics, and
// the weak ordering of memory beyond what races.cpp models.
#pragma once

#if !defined(__x86_64__)
#error "cuda_on_cpu switches fibers with x86-64 instructions"
#endif

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __shared__ thread_local
#define __grid_constant__ &  // a parameter that stays where the launch put it
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __forceinline__ inline __attribute__((always_inline))
#define NO_RACE_CHECK __attribute__((no_sanitize("thread")))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
typedef struct CUstream_st* cudaStream_t;

namespace cuda_on_cpu {

constexpr int kLanes = 32;
constexpr size_t kLaneBytes = 24;  // the most that a lane gives to a collective

struct Block;
struct Warp;

// One meeting of a warp's lanes.
struct Collective {
  unsigned mask, arrived, unread;
  int line;
  const char* name;
  bool complete;
  alignas(8) unsigned char value[kLanes][kLaneBytes];
};

enum class State : uint8_t { ready, at_barrier, at_collective, sleeping, done };

struct Thread {
  uint3 index, block_index;
  Block* block;
  Warp* warp;
  unsigned char* dynamic;  // the block's dynamic shared memory
  void* stack_pointer;
  int linear, lane, line;
  int vote;  // the result of the last __syncthreads_and
  State state;
  bool fenced;  // has passed __threadfence since its last barrier
};

extern Thread* current;
extern dim3 block_size;
extern int planted;  // the bug that is switched on, or -1

void barrier(int line);
int barrier_and(int predicate, int line);
void sleep();

// Waits for the lanes of the mask, each of which gives `bytes` bytes; `leave` ends the reading of what they gave.
Collective& meet(unsigned mask, const void* value, size_t bytes, const char* name, int line);
void leave(Collective& c);

void launch(const char* name, const void* kernel, cudaStream_t stream, bool cooperative, dim3 grid, dim3 block,
            size_t dynamic_bytes, void (*call)(void*), void* arguments);
void set_shared_limit(const void* kernel, size_t bytes);
void set_memory(void* address, int value, size_t bytes, cudaStream_t stream);

template <typename F>
NO_RACE_CHECK void launch(const char* name, const void* kernel, cudaStream_t stream, bool cooperative, dim3 grid,
                          dim3 block, size_t dynamic_bytes, F&& call) {
  using Call = std::remove_reference_t<F>;
  launch(
      name, kernel, stream, cooperative, grid, block, dynamic_bytes, [](void* f) { (*static_cast<Call*>(f))(); },
      &call);
}

template <typename T>
NO_RACE_CHECK T shuffle(unsigned mask, T value, int source, const char* name, int line) {
  static_assert(sizeof(T) <= kLaneBytes && std::is_trivially_copyable_v<T>);
  Collective& c = meet(mask, &value, sizeof value, name, line);
  std::memcpy(&value, c.value[source], sizeof value);
  leave(c);
  return value;
}

// One OS thread runs all fibers, so that atomics need only be told to the race check.
#if defined(CUDA_ON_CPU_RACES)
void atomic_access(const void* address, size_t bytes, void* caller);
void fence();
#else
inline void atomic_access(const void*, size_t, void*) {}
inline void fence() {}
#endif

template <typename T, typename F>
NO_RACE_CHECK __attribute__((noinline)) T read_modify_write(T* address, F f) {
  atomic_access(address, sizeof(T), __builtin_return_address(0));
  const T old = *address;
  *address = f(old);
  return old;
}

}  // namespace cuda_on_cpu

#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                               \
  (cuda_on_cpu::launch(#kernel, (const void*)(kernel), stream, false, dim3(grid), dim3(block), shared_bytes, \
                       [&] { kernel(__VA_ARGS__); }))
#define LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, ...)                                  \
  (cuda_on_cpu::launch(#kernel, (const void*)(kernel), stream, true, dim3(grid), dim3(block), shared_bytes, \
                       [&] { kernel(__VA_ARGS__); }))
#define DYN_SHARED(T, name) T* const name = reinterpret_cast<T*>(cuda_on_cpu::current->dynamic)
#define PLANTED(bug) (cuda_on_cpu::planted == (bug))  // in the kernels' source as harness.py changes it

#define threadIdx (cuda_on_cpu::current->index)
#define blockIdx (cuda_on_cpu::current->block_index)
#define blockDim (cuda_on_cpu::block_size)

inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_cpu::barrier(line); }
inline int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
  return cuda_on_cpu::barrier_and(predicate, line);
}
template <typename T>
NO_RACE_CHECK T __shfl_xor_sync(unsigned mask, T value, int lanes, int line = __builtin_LINE()) {
  return cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::current->lane ^ lanes, "__shfl_xor_sync", line);
}
template <typename T>
NO_RACE_CHECK T __shfl_sync(unsigned mask, T value, int lane, int line = __builtin_LINE()) {
  return cuda_on_cpu::shuffle(mask, value, lane, "__shfl_sync", line);
}
inline void __threadfence() { cuda_on_cpu::fence(); }
inline void __nanosleep(unsigned) { cuda_on_cpu::sleep(); }
template <typename T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  return cuda_on_cpu::read_modify_write(address, [=](T old) { return T(old + value); });
}
template <typename T>
T atomicOr(T* address, std::common_type_t<T> value) {
  return cuda_on_cpu::read_modify_write(address, [=](T old) { return T(old | value); });
}

// ---- tensor cores: tensor_cores.cuh has the instructions, of which these are the twins

namespace secondorder::cuda {

NO_RACE_CHECK inline float to_tf32(float v) {
  if (std::isnan(v)) return v;  // whose bits would wrap
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  bits += 0x1000u;  // half of the last place that stays
  bits &= ~0x1fffu;
  std::memcpy(&v, &bits, sizeof bits);
  return v;
}

NO_RACE_CHECK inline void split_tf32(float v, float& large, float& small) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  bits = (bits + 0x1000u) & ~0x1fffu;
  std::memcpy(&large, &bits, sizeof bits);
  small = v - large;
}

// As on hardware the operands' low bits are ignored and the sum is truncated; its order and its inner width, which
// NVIDIA does not publish, are not modelled.
NO_RACE_CHECK inline void mma_m16n8k8(float* d, const float (&a)[4], const float (&b)[2], int line = __builtin_LINE()) {
  struct Operands {
    uint32_t a[4], b[2];
  } mine;
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  for (uint32_t* bits : {mine.a, mine.a + 1, mine.a + 2, mine.a + 3, mine.b, mine.b + 1}) *bits &= ~0x1fffu;
  cuda_on_cpu::Collective& c = cuda_on_cpu::meet(~0u, &mine, sizeof mine, "mma", line);
  const int group = cuda_on_cpu::current->lane / 4, member = cuda_on_cpu::current->lane % 4;
  const auto number = [&](int lane, int index) {
    float v;
    std::memcpy(&v, c.value[lane] + index * sizeof v, sizeof v);
    return double(v);
  };
  for (int e = 0; e < 4; ++e) {
    double sum = d[e];
    for (int k = 0; k < 8; ++k)
      sum += number(group * 4 + k % 4, e / 2 + k / 4 * 2) * number((member * 2 + e % 2) * 4 + k % 4, 4 + k / 4);
    d[e] = float(sum);
    if (std::abs(double(d[e])) > std::abs(sum)) d[e] = std::nextafter(d[e], 0.0f);
  }
  cuda_on_cpu::leave(c);
}

}  // namespace secondorder::cuda

// ---- the little of the run-time library that launchers call

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <typename Kernel>
void cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  cuda_on_cpu::set_shared_limit((const void*)kernel, size_t(value));
}
inline void cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t stream) {
  cuda_on_cpu::set_memory(address, value, bytes, stream);
}
