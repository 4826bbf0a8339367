// What the emulation itself keeps of a launch: cuda_on_cpu.cpp runs it, races.cpp checks it, driver.cpp sets it up.
#pragma once

#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_on_cpu.h"

namespace cuda_on_cpu {

constexpr size_t kStackBytes = 256 << 10;

struct Warp {
  Collective collective[kLanes];
  unsigned open;  // the collectives in use
  unsigned gone;  // lanes that have returned, or never existed
};

struct Block {
  unsigned linear;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char, void (*)(void*)> dynamic{nullptr, std::free};
  std::vector<unsigned char> statics;  // its static shared memory while another block runs
  unsigned done, at_barrier, epoch;    // epoch: barriers passed
  bool vote;
  // For races.cpp. Other blocks' epochs that precede, now and after a barrier; by thread: what its atomics have read.
  std::map<unsigned, unsigned> known, pending;
  std::map<int, std::map<unsigned, unsigned>> acquired;
};

enum class Order { forward, reverse, shuffled };

// The process's only grid, its settings and what it has launched.
struct Machine {
  Order order = Order::forward;
  uint64_t seed = 0;
  std::mt19937_64 random;
  std::vector<std::string> launches;
  std::map<const void*, size_t> shared_limits;  // by kernel, from cudaFuncSetAttribute
  std::map<const void*, size_t> static_shared;  // bytes by kernel
  cudaStream_t stream = nullptr;                // that every launch must name
  size_t multiprocessors = ~size_t(0);          // so many blocks of a cooperative launch are resident
  size_t shared_bytes = 227 << 10;              // the most that a block may have
  size_t last_blocks = 0;                       // so many of every launch run, its last; 0: all

  dim3 grid_size;
  size_t dynamic_bytes = 0;
  unsigned launch = 0;
  void (*kernel)(void*) = nullptr;
  void* arguments = nullptr;
  std::vector<Block> blocks;  // the resident ones
  std::string error;
  char* stacks = nullptr;
  size_t stack_count = 0;
};

extern Machine machine;

// Ends the launch from inside a kernel.
[[noreturn]] void fail(const std::string& message);

// The kernels' static shared memory: the thread-local variables of the module that this is linked into.
struct Span {
  char* begin;
  size_t size;

  bool holds(const void* address) const { return address >= begin && address < begin + size; }
};
Span static_shared();

}  // namespace cuda_on_cpu
