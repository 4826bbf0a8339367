// The race check of cuda_on_cpu.h: g++'s -fsanitize=thread calls these functions at every load and store of the
// kernels, in place of its own run-time library. A conflict is found whatever order the fibers ran in.
//
// What orders two accesses: the same thread; a block barrier between them; and between blocks an atomic that the one
// performs after __threadfence and the other before __threadfence, each with a block barrier on its far side. Shuffles
// order nothing, as the CUDA guide says. Different launches are ordered, as on one stream.
#pragma once

#include <dlfcn.h>

#include <cstdio>
#include <set>
#include <unordered_map>

namespace cuda_on_cpu {

enum class Access : uint8_t { read, write, atomic };

struct Event {
  unsigned launch, block, epoch;
  int thread;
  Access access;
  void* code;
};

struct Races {
  struct Byte {
    Event write{}, reads[2]{};
  };
  std::unordered_map<uintptr_t, std::unique_ptr<Byte[]>> pages;
  std::set<std::pair<void*, void*>> reported;
  std::vector<std::string> found;
  std::map<std::pair<unsigned, const void*>, std::map<unsigned, unsigned>> released;  // by launch and atomic: epochs
  bool busy = false;  // this check's own accesses are instrumented too
};

inline Races the_races;  // not local to a function: its construction is instrumented too

NO_RACE_CHECK inline Races& races() { return the_races; }

struct Busy {
  NO_RACE_CHECK Busy() { races().busy = true; }
  NO_RACE_CHECK ~Busy() { races().busy = false; }
};

// file:line of an instruction.
NO_RACE_CHECK inline std::string source_line(void* code) {
  Dl_info info;
  if (!dladdr(code, &info)) return "?";
  char command[1024];
  std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%zx | grep -v -e cuda_on_cpu.h -e races.h | head -1",
                info.dli_fname, size_t(static_cast<char*>(code) - static_cast<char*>(info.dli_fbase)) - 1);
  std::string line;
  if (FILE* pipe = popen(command, "r")) {
    char buffer[512];
    if (std::fgets(buffer, sizeof buffer, pipe)) line = buffer;
    pclose(pipe);
  }
  line = line.substr(0, line.find('\n'));
  return line.substr(line.rfind('/') + 1);
}

// Whether `event` precedes everything that `thread` does now.
NO_RACE_CHECK inline bool ordered(const Event& event, const Thread& thread, bool shared) {
  const Block& block = *thread.block;
  if (event.launch != machine().launch) return true;
  if (event.block != block.linear) {
    if (shared) return true;  // another block's shared memory is another memory
    const auto known = block.known.find(event.block);
    return known != block.known.end() && event.epoch < known->second;
  }
  return event.thread == thread.linear || event.epoch != block.epoch;
}

NO_RACE_CHECK inline void check_access(const void* address, size_t bytes, Access access, void* code) {
  Races& r = races();
  if (!current || r.busy) return;  // the scheduler, or this check
  Busy busy;
  const Thread& thread = *current;
  const Block& block = *thread.block;
  const char* begin = static_cast<const char*>(address);
  Machine& m = machine();
  const auto within = [&](const void* base, size_t size) {
    return begin >= static_cast<const char*>(base) && begin < static_cast<const char*>(base) + size;
  };
  // A thread's own stack, and what this emulation itself keeps.
  if (within(m.stacks, m.stack_count * kStackBytes) || within(&m, sizeof m) || within(&current, sizeof current) ||
      within(m.blocks.data(), m.blocks.size() * sizeof(Block)) ||
      within(block.threads.data(), block.threads.size() * sizeof(Thread)))
    return;
  const bool shared =
      within(static_shared().first, static_shared().second) || within(block.dynamic.get(), m.dynamic_bytes);
  const Event now{m.launch, block.linear, block.epoch, thread.linear, access, code};
  for (size_t k = 0; k < bytes; ++k) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(begin) + k;
    auto& page = r.pages[at >> 12];
    if (!page) page.reset(new Races::Byte[4096]);
    Races::Byte& byte = page[at & 4095];
    const Event* conflict = nullptr;
    if (!(access == Access::atomic && byte.write.access == Access::atomic) && !ordered(byte.write, thread, shared))
      conflict = &byte.write;
    if (access != Access::read)
      for (const Event& read : byte.reads)
        if (!ordered(read, thread, shared)) conflict = &read;
    if (conflict && r.reported.insert({conflict->code, code}).second && r.found.size() < 20) {
      static const char* names[] = {"read", "write", "atomic"};
      const auto describe = [](const Event& e) {
        return std::string(names[int(e.access)]) + " at " + source_line(e.code) + " by block " +
               std::to_string(e.block) + " thread " + std::to_string(e.thread);
      };
      r.found.push_back(std::string(shared ? "shared" : "global") + " memory: " + describe(now) + " against " +
                        describe(*conflict));
    }
    if (access != Access::read) byte.write = now;
    else if (ordered(byte.reads[0], thread, shared)) byte.reads[0] = now;
    else byte.reads[1] = now;  // two readers that nothing orders: a later write misses neither
  }
}

// An atomic publishes what its block did before its last barrier if a fence stands before it, and learns what others so
// published; a fence after it passes that on to the block, from the next barrier on.
NO_RACE_CHECK inline void atomic_access(const void* address, size_t bytes, void* code) {
  check_access(address, bytes, Access::atomic, code);
  Busy busy;
  Thread& thread = *current;
  Block& block = *thread.block;
  auto& released = races().released[{machine().launch, address}];
  for (const auto& [other, epoch] : released) thread.acquired[other] = std::max(thread.acquired[other], epoch);
  if (!thread.fenced) return;
  released[block.linear] = block.epoch;
  for (const auto& [other, epoch] : block.known) released[other] = std::max(released[other], epoch);
}

NO_RACE_CHECK inline void fence() {
  Busy busy;
  Thread& thread = *current;
  thread.fenced = true;
  for (const auto& [other, epoch] : std::exchange(thread.acquired, {}))
    thread.block->pending[other] = std::max(thread.block->pending[other], epoch);
}

}  // namespace cuda_on_cpu

extern "C" {
#define HOOK NO_RACE_CHECK __attribute__((used, weak, noinline))
#define HOOKS(n)                                                                              \
  HOOK void __tsan_read##n(void* p) {                                                         \
    cuda_on_cpu::check_access(p, n, cuda_on_cpu::Access::read, __builtin_return_address(0));  \
  }                                                                                           \
  HOOK void __tsan_write##n(void* p) {                                                        \
    cuda_on_cpu::check_access(p, n, cuda_on_cpu::Access::write, __builtin_return_address(0)); \
  }                                                                                           \
  HOOK void __tsan_unaligned_read##n(void* p) {                                               \
    cuda_on_cpu::check_access(p, n, cuda_on_cpu::Access::read, __builtin_return_address(0));  \
  }                                                                                           \
  HOOK void __tsan_unaligned_write##n(void* p) {                                              \
    cuda_on_cpu::check_access(p, n, cuda_on_cpu::Access::write, __builtin_return_address(0)); \
  }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
HOOK void __tsan_read_range(void* p, size_t n) {
  cuda_on_cpu::check_access(p, n, cuda_on_cpu::Access::read, __builtin_return_address(0));
}
HOOK void __tsan_write_range(void* p, size_t n) {
  cuda_on_cpu::check_access(p, n, cuda_on_cpu::Access::write, __builtin_return_address(0));
}
HOOK void __tsan_init() {}
HOOK void __tsan_func_entry(void*) {}
HOOK void __tsan_func_exit() {}
HOOK void __tsan_vptr_update(void**, void*) {}
HOOK void __tsan_vptr_read(void**) {}
// The standard library's reference counts and once-flags; kernels' atomics do not come here.
#define ATOMIC_HOOKS(n, T)                                                                                  \
  HOOK T __tsan_atomic##n##_load(const volatile T* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); } \
  HOOK void __tsan_atomic##n##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); } \
  HOOK T __tsan_atomic##n##_fetch_add(volatile T* p, T v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
ATOMIC_HOOKS(8, uint8_t)
ATOMIC_HOOKS(32, uint32_t)
ATOMIC_HOOKS(64, uint64_t)
#undef ATOMIC_HOOKS
#undef HOOKS
#undef HOOK
}
