// Runs unmodified kernel source on the CPU: what CUDA C++ takes from nvcc and from cuda_runtime.h, for g++ on x86-64.
//
// A block's threads are fibers on one OS thread. Each runs until it waits (barrier, warp collective, __nanosleep), in
// an order that `configure` sets. Static __shared__ variables are thread_local, so they lie in one piece of memory,
// which is poisoned with 0xFF bytes (NaN) at a block's start and saved and restored where several blocks are resident.
// Blocks run one after the other, those of a cooperative launch in turns. Every misuse that is noticed throws
// std::runtime_error.
//
// With -DCUDA_ON_CPU_RACES -fsanitize=thread (at compilation, not at linking) races.h checks every access. What this
// cannot show: speed, rounding of fast intrinsics, and the weak ordering of memory beyond what races.h models.
#pragma once

#if !defined(__x86_64__)
#error "cuda_on_cpu.h switches fibers with x86-64 instructions"
#endif

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

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
constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kDefaultSharedBytes = 48 << 10;

struct Block;

// One meeting of a warp's lanes.
struct Collective {
  unsigned mask, arrived, unread;
  int line;
  const char* name;
  bool complete;
  alignas(8) unsigned char value[kLanes][kLaneBytes];
};

struct Warp {
  Collective collective[kLanes];
  unsigned open;  // the collectives in use
  unsigned gone;  // lanes that have returned, or never existed
};

enum class State : uint8_t { ready, at_barrier, at_collective, sleeping, done };

struct Thread {
  uint3 index;
  Block* block;
  Warp* warp;
  void* stack_pointer;
  int linear, lane, line;
  State state;
  int vote;                               // the result of the last __syncthreads_and
  bool fenced;                            // has passed __threadfence since its last barrier
  std::map<unsigned, unsigned> acquired;  // races.h: what its atomics have read of other blocks' epochs
};

struct Block {
  uint3 index;
  unsigned linear;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char, void (*)(void*)> dynamic{nullptr, std::free};
  std::vector<unsigned char> statics;  // its static shared memory while another block runs
  unsigned done, at_barrier, epoch;    // epoch: barriers passed
  bool vote;
  std::map<unsigned, unsigned> known, pending;  // races.h: other blocks' epochs that precede, now and after a barrier
};

enum class Order { forward, reverse, shuffled };

// The process's only grid, its settings and what it has launched.
struct Machine {
  Order order = Order::forward;
  uint64_t seed = 0;
  std::mt19937_64 random;
  std::vector<std::string> launches;
  std::map<const void*, size_t> shared_limits;  // by kernel, from cudaFuncSetAttribute
  cudaStream_t stream = nullptr;                // that every launch must name
  size_t multiprocessors = ~size_t(0);          // so many blocks of a cooperative launch are resident

  dim3 grid_size, block_size;
  size_t dynamic_bytes = 0;
  unsigned launch = 0;
  std::function<void()> kernel;
  std::vector<Block> blocks;  // the resident ones
  void* scheduler = nullptr;
  std::string error;
  char* stacks = nullptr;
  size_t stack_count = 0;
};

inline Machine& machine() {
  static Machine machine;
  return machine;
}

inline thread_local Thread* current = nullptr;

inline void configure(Order order, uint64_t seed) {
  machine().order = order;
  machine().seed = seed;
  machine().launches.clear();
}

// Saves the running fiber's registers and stack pointer in *from, and goes on where `to` was saved.
NO_RACE_CHECK inline __attribute__((naked, noinline)) void switch_stack(void** /*from*/, void* /*to*/) {
  asm volatile(
      "push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15; mov %rsp,(%rdi); mov %rsi,%rsp;"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}

NO_RACE_CHECK inline void to_scheduler() { switch_stack(&current->stack_pointer, machine().scheduler); }

NO_RACE_CHECK inline void resume(Thread& thread) {
  current = &thread;
  switch_stack(&machine().scheduler, thread.stack_pointer);
  current = nullptr;
  if (!machine().error.empty()) throw std::runtime_error(std::exchange(machine().error, {}));
}

// Ends the launch from inside a kernel.
[[noreturn]] NO_RACE_CHECK inline void fail(const std::string& message) {
  machine().error =
      "block " + std::to_string(current->block->linear) + " thread " + std::to_string(current->linear) + ": " + message;
  to_scheduler();
  std::abort();
}

// ---- barriers and warp collectives

NO_RACE_CHECK inline void barrier(int line) {
  current->state = State::at_barrier;
  current->line = line;
  ++current->block->at_barrier;
  to_scheduler();
}

// Complete once every lane of the mask that still runs has come.
NO_RACE_CHECK inline void check_complete(Thread& thread, Collective& c) {
  const unsigned expected = c.mask & ~thread.warp->gone;
  if ((c.arrived & expected) != expected) return;
  c.complete = true;
  c.unread = c.arrived;
  Thread* lanes = &thread.block->threads[thread.linear / kLanes * kLanes];
  for (int lane = 0; lane < kLanes; ++lane)
    if ((c.arrived >> lane & 1) && lanes[lane].state == State::at_collective) lanes[lane].state = State::ready;
}

// Waits for the lanes of the mask and returns what each gave.
NO_RACE_CHECK inline Collective& meet(unsigned mask, const void* value, size_t bytes, const char* name, int line) {
  Thread& thread = *current;
  Warp& warp = *thread.warp;
  if (!(mask >> thread.lane & 1)) fail(std::string(name) + ": the calling lane is not in its mask");
  Collective* c = nullptr;
  for (int k = 0; k < kLanes && !c; ++k) {
    Collective& candidate = warp.collective[k];
    const bool arrived = candidate.arrived >> thread.lane & 1;
    if ((warp.open >> k & 1) && !candidate.complete && candidate.mask == mask && !arrived) c = &candidate;
  }
  if (!c) {
    const int k = __builtin_ctz(~warp.open);
    warp.open |= 1u << k;
    c = &warp.collective[k];
    *c = {mask, 0, 0, line, name, false, {}};
    std::memset(c->value, 0xFF, sizeof c->value);  // what a lane outside gives is no number
  }
  if (std::strcmp(c->name, name)) fail(std::string("lanes of one warp meet in ") + c->name + " and in " + name);
  std::memcpy(c->value[thread.lane], value, bytes);
  c->arrived |= 1u << thread.lane;
  thread.line = line;
  check_complete(thread, *c);
  if (!c->complete) {
    thread.state = State::at_collective;
    to_scheduler();
  }
  return *c;
}

NO_RACE_CHECK inline void leave(Collective& c) {
  c.unread &= ~(1u << current->lane);
  if (!c.unread) current->warp->open &= ~(1u << (&c - current->warp->collective));
}

template <typename T>
NO_RACE_CHECK T shuffle(unsigned mask, T value, int source, const char* name, int line) {
  static_assert(sizeof(T) <= kLaneBytes && std::is_trivially_copyable_v<T>);
  Collective& c = meet(mask, &value, sizeof value, name, line);
  std::memcpy(&value, c.value[source], sizeof value);
  leave(c);
  return value;
}

// ---- the scheduler

NO_RACE_CHECK inline void enter() {
  machine().kernel();
  Thread& thread = *current;
  thread.state = State::done;
  ++thread.block->done;
  thread.warp->gone |= 1u << thread.lane;
  for (int k = 0; k < kLanes; ++k)
    if ((thread.warp->open >> k & 1) && !thread.warp->collective[k].complete)
      check_complete(thread, thread.warp->collective[k]);
  to_scheduler();
  std::abort();
}

// The kernels' static shared memory: the thread-local variables of the module that this is compiled into.
NO_RACE_CHECK inline std::pair<char*, size_t> static_shared() {
  static std::pair<char*, size_t> found = [] {
    std::pair<char*, size_t> result{};
    current = nullptr;  // touched, hence allocated
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
          for (int k = 0; k < info->dlpi_phnum; ++k) {
            char* begin = static_cast<char*>(info->dlpi_tls_data);
            const size_t size = info->dlpi_phdr[k].p_memsz;
            const char* here = reinterpret_cast<char*>(&current);
            if (info->dlpi_phdr[k].p_type != PT_TLS || !begin || here < begin || here >= begin + size) continue;
            *static_cast<std::pair<char*, size_t>*>(out) = {begin, size};
            return 1;
          }
          return 0;
        },
        &result);
    return result;
  }();
  return found;
}

NO_RACE_CHECK inline void start(Block& block, size_t id, size_t first_stack) {
  Machine& m = machine();
  const dim3 size = m.block_size;
  const unsigned count = size.x * size.y * size.z, warps = (count + kLanes - 1) / kLanes;
  block.linear = unsigned(id);
  block.index = {unsigned(id % m.grid_size.x), unsigned(id / m.grid_size.x % m.grid_size.y),
                 unsigned(id / (size_t(m.grid_size.x) * m.grid_size.y))};
  block.done = block.at_barrier = block.epoch = 0;
  block.vote = true;
  void* dynamic = nullptr;
  if (posix_memalign(&dynamic, 64, std::max<size_t>(m.dynamic_bytes, 1))) throw std::bad_alloc();
  block.dynamic.reset(static_cast<unsigned char*>(dynamic));  // of exactly its size: AddressSanitizer sees its end
  std::memset(dynamic, 0xFF, m.dynamic_bytes);
  block.statics.assign(static_shared().second, 0xFF);
  block.warps.assign(warps, Warp{});
  for (unsigned w = 0; w < warps; ++w)
    block.warps[w].gone = count - w * kLanes >= kLanes ? 0 : ~0u << (count - w * kLanes);
  block.threads.assign(warps * kLanes, Thread{});
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = block.threads[i];
    thread.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    thread.block = &block;
    thread.warp = &block.warps[i / kLanes];
    thread.linear = int(i);
    thread.lane = int(i % kLanes);
    char* top = m.stacks + (first_stack + i + 1) * kStackBytes - i * 7 % 64 * 64;  // apart in the cache
    void** sp = reinterpret_cast<void**>(top);
    *--sp = nullptr;
    *--sp = reinterpret_cast<void*>(enter);
    thread.stack_pointer = sp - 6;
  }
}

[[noreturn]] inline void stuck(const Block& block) {
  std::string message = "block " + std::to_string(block.linear) + " is stuck: " + std::to_string(block.done) +
                        " threads returned, " + std::to_string(block.at_barrier) + " wait at a barrier";
  for (const Thread& thread : block.threads)
    if (thread.state == State::at_barrier || thread.state == State::at_collective) {
      message += "; thread " + std::to_string(thread.linear) + " waits at line " + std::to_string(thread.line);
      break;
    }
  throw std::runtime_error(message);
}

// Runs the block's threads, warp by warp, until all are done or sleep. Returns whether anything but sleeping happened.
NO_RACE_CHECK inline bool run(Block& block) {
  Machine& m = machine();
  const auto [shared, shared_bytes] = static_shared();
  const unsigned count = m.block_size.x * m.block_size.y * m.block_size.z;
  std::memcpy(shared, block.statics.data(), shared_bytes);
  current = nullptr;  // it lies there too
  std::vector<unsigned> warps(block.warps.size()), lanes(kLanes);
  std::iota(warps.begin(), warps.end(), 0);
  std::iota(lanes.begin(), lanes.end(), 0);
  if (m.order == Order::reverse) {
    std::reverse(warps.begin(), warps.end());
    std::reverse(lanes.begin(), lanes.end());
  }
  bool advanced = false;
  while (block.done < count) {
    bool progress = false, asleep = false;
    if (m.order == Order::shuffled) {
      std::shuffle(warps.begin(), warps.end(), m.random);
      std::shuffle(lanes.begin(), lanes.end(), m.random);
    }
    for (unsigned w : warps)
      for (bool any = true; any;) {
        any = false;
        for (unsigned lane : lanes) {
          const unsigned i = w * kLanes + lane;
          if (i >= count || block.threads[i].state != State::ready) continue;
          any = progress = true;
          resume(block.threads[i]);
        }
      }
    for (Thread& thread : block.threads) asleep = asleep || thread.state == State::sleeping;
    advanced = advanced || (progress && !asleep);
    if (asleep) {
      for (Thread& thread : block.threads)
        if (thread.state == State::sleeping) thread.state = State::ready;
      break;
    }
    if (progress || block.done == count) continue;
    if (block.at_barrier < count) stuck(block);
    block.at_barrier = 0;
    ++block.epoch;
    for (const auto& [other, epoch] : std::exchange(block.pending, {}))
      block.known[other] = std::max(block.known[other], epoch);
    for (unsigned i = 0; i < count; ++i) {
      Thread& thread = block.threads[i];
      thread.state = State::ready;
      thread.vote = block.vote;
      thread.fenced = false;
    }
    block.vote = true;
  }
  std::memcpy(block.statics.data(), shared, shared_bytes);
  return advanced || block.done == count;
}

inline void run_resident(const std::vector<size_t>& ids) {
  Machine& m = machine();
  const size_t threads = size_t(m.block_size.x) * m.block_size.y * m.block_size.z;
  if (threads * ids.size() > m.stack_count) {
    if (m.stacks) munmap(m.stacks, m.stack_count * kStackBytes);
    m.stack_count = threads * ids.size();
    m.stacks = static_cast<char*>(mmap(nullptr, m.stack_count * kStackBytes, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (m.stacks == MAP_FAILED) throw std::bad_alloc();
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(m.stacks, threads * ids.size() * kStackBytes);  // those of these blocks
#endif
  m.blocks = std::vector<Block>(ids.size());
  for (size_t b = 0; b < ids.size(); ++b) start(m.blocks[b], ids[b], b * threads);
  std::vector<size_t> turns(ids.size());
  std::iota(turns.begin(), turns.end(), 0);
  for (size_t left = ids.size(), idle = 0; left > 0;) {
    if (m.order == Order::shuffled) std::shuffle(turns.begin(), turns.end(), m.random);
    bool advanced = false;
    for (size_t b : turns) {
      Block& block = m.blocks[b];
      if (block.done == threads) continue;
      advanced = run(block) || advanced;
      left -= block.done == threads;
    }
    idle = advanced ? 0 : idle + 1;
    if (idle > 3) throw std::runtime_error("the grid is stuck: every block that still runs waits in __nanosleep");
  }
}

inline void launch(const char* name, const void* kernel, cudaStream_t stream, bool cooperative, dim3 grid, dim3 block,
                   size_t dynamic_bytes, std::function<void()> call) {
  Machine& m = machine();
  if (stream != m.stream) throw std::runtime_error(std::string(name) + ": not on the stream that was given");
  if (cooperative && size_t(grid.x) * grid.y * grid.z > m.multiprocessors)
    throw std::runtime_error(std::string(name) + ": a cooperative launch of more blocks than are resident");
  const size_t blocks = size_t(grid.x) * grid.y * grid.z, threads = size_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024) throw std::runtime_error(std::string(name) + ": invalid block size");
  if (blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error(std::string(name) + ": invalid grid size");
  if (dynamic_bytes > kDefaultSharedBytes && dynamic_bytes > m.shared_limits[kernel])
    throw std::runtime_error(std::string(name) + ": more dynamic shared memory than the kernel's attribute allows");
  m.launches.push_back(name);
  ++m.launch;
  m.random.seed(m.seed + m.launch);
  m.grid_size = grid;
  m.block_size = block;
  m.dynamic_bytes = dynamic_bytes;
  m.kernel = std::move(call);
  std::vector<size_t> ids(blocks);
  std::iota(ids.begin(), ids.end(), 0);
  if (m.order == Order::reverse) std::reverse(ids.begin(), ids.end());
  if (m.order == Order::shuffled) std::shuffle(ids.begin(), ids.end(), m.random);
  if (cooperative) return run_resident(ids);
  for (size_t id : ids) run_resident({id});
}

// ---- atomics: one OS thread runs all fibers, so that they need only be told to the race check

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
#define DYN_SHARED(T, name) T* const name = reinterpret_cast<T*>(cuda_on_cpu::current->block->dynamic.get())

#define threadIdx (cuda_on_cpu::current->index)
#define blockIdx (cuda_on_cpu::current->block->index)
#define blockDim (cuda_on_cpu::machine().block_size)

inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_cpu::barrier(line); }
NO_RACE_CHECK inline int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
  cuda_on_cpu::current->block->vote = cuda_on_cpu::current->block->vote && predicate;
  cuda_on_cpu::barrier(line);
  return cuda_on_cpu::current->vote;
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int line = __builtin_LINE()) {
  return cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::current->lane ^ lanes, "__shfl_xor_sync", line);
}
inline void __threadfence() { cuda_on_cpu::fence(); }
NO_RACE_CHECK inline void __nanosleep(unsigned) {
  cuda_on_cpu::current->state = cuda_on_cpu::State::sleeping;
  cuda_on_cpu::to_scheduler();
}
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
  cuda_on_cpu::machine().shared_limits[(const void*)kernel] = size_t(value);
}
inline void cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t stream) {
  if (stream != cuda_on_cpu::machine().stream)
    throw std::runtime_error("cudaMemsetAsync: not on the stream that was given");
  cuda_on_cpu::machine().launches.push_back("memset");
  std::memset(address, value, bytes);
}

#if defined(CUDA_ON_CPU_RACES)
#include "races.h"
#endif
