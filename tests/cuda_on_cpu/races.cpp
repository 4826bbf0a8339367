// The race check of cuda_on_cpu.h: g++'s -fsanitize=thread calls these functions at every load and store of the
// kernels, in place of its own run-time library. A conflict is found whatever order the fibers ran in.
//
// What orders two accesses: the same thread; a block barrier between them; and between blocks an atomic that the one
// performs after __threadfence and the other before __threadfence, each with a block barrier on its far side. Shuffles
// order nothing, as the CUDA guide says. Different launches are ordered, as on one stream. Memory is watched in words
// of 4 bytes. An access that is not aligned as its type must be ends the launch.
#define CUDA_ON_CPU_RACES

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <set>
#include <unordered_map>
#include <utility>

#include "machine.h"

namespace cuda_on_cpu {
namespace {

enum class Access : uint8_t { read, write, atomic };

struct Event {
  unsigned launch, block, epoch;
  int thread;
  Access access;
  void* code;
};

struct Word {
  Event write, reads[2];
};

constexpr int kPageBits = 12;
constexpr int kWords = (1 << kPageBits) / 4;  // of a page

std::unordered_map<uintptr_t, std::unique_ptr<Word[]>> pages;
std::pair<uintptr_t, Word*> recent[1024];  // pages by number
std::set<std::pair<void*, void*>> reported;
std::vector<std::string> found;
std::string lines;
std::map<std::pair<unsigned, const void*>, std::map<unsigned, unsigned>> released;  // by launch and atomic: epochs

Word& word_at(uintptr_t address) {
  const uintptr_t number = address >> kPageBits;
  auto& [known, words] = recent[number % std::size(recent)];
  if (known != number || !words) {
    std::unique_ptr<Word[]>& page = pages[number];
    if (!page) page.reset(new Word[kWords]{});
    known = number;
    words = page.get();
  }
  return words[address % (1 << kPageBits) / 4];
}

// file:line of an instruction.
std::string source_line(void* code) {
  Dl_info info;
  if (!dladdr(code, &info)) return "?";
  char command[1024];
  std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%zx | grep -v cuda_on_cpu.h | head -1", info.dli_fname,
                size_t(static_cast<char*>(code) - static_cast<char*>(info.dli_fbase)) - 1);
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
bool ordered(const Event& event, const Thread& thread, bool shared) {
  const Block& block = *thread.block;
  if (event.launch != machine.launch) return true;
  if (event.block != block.linear) {
    if (shared) return true;  // another block's shared memory is another memory
    const auto known = block.known.find(event.block);
    return known != block.known.end() && event.epoch < known->second;
  }
  return event.thread == thread.linear || event.epoch != block.epoch;
}

void check_access(const void* address, size_t bytes, Access access, bool aligned, void* code) {
  if (!current || address == &planted) return;  // the scheduler, or a look at which bug is switched on
  const Thread& thread = *current;
  const Block& block = *thread.block;
  const Machine& m = machine;
  const auto within = [address](const void* base, size_t size) { return uintptr_t(address) - uintptr_t(base) < size; };
  // A thread's own stack, and what this emulation itself keeps.
  if (within(m.stacks, m.stack_count * kStackBytes) || within(&current, sizeof current) ||
      within(&block_size, sizeof block_size) || within(block.threads.data(), block.threads.size() * sizeof(Thread)))
    return;
  if (aligned && uintptr_t(address) % bytes)
    fail("an access of " + std::to_string(bytes) + " bytes that is not aligned at " + source_line(code));
  const bool shared = static_shared().holds(address) || within(thread.dynamic, m.dynamic_bytes);
  const Event now{m.launch, block.linear, block.epoch, thread.linear, access, code};
  const uintptr_t begin = uintptr_t(address) & ~uintptr_t(3), end = uintptr_t(address) + bytes;
  for (uintptr_t at = begin; at < end; at += 4) {
    Word& word = word_at(at);
    const Event* conflict = nullptr;
    if (!(access == Access::atomic && word.write.access == Access::atomic) && !ordered(word.write, thread, shared))
      conflict = &word.write;
    if (access != Access::read)
      for (const Event& read : word.reads)
        if (!ordered(read, thread, shared)) conflict = &read;
    if (conflict && reported.insert({conflict->code, code}).second && found.size() < 20) {
      static const char* names[] = {"read", "write", "atomic"};
      const auto describe = [](const Event& e) {
        return std::string(names[int(e.access)]) + " at " + source_line(e.code) + " by block " +
               std::to_string(e.block) + " thread " + std::to_string(e.thread);
      };
      found.push_back(std::string(shared ? "shared" : "global") + " memory: " + describe(now) + " against " +
                      describe(*conflict));
    }
    if (access != Access::read) word.write = now;
    else if (ordered(word.reads[0], thread, shared)) word.reads[0] = now;
    else word.reads[1] = now;  // two readers that nothing orders: a later write misses neither
  }
}

}  // namespace

// An atomic publishes what its block did before its last barrier if a fence stands before it, and learns what others so
// published; a fence after it passes that on to the block, from the next barrier on.
void atomic_access(const void* address, size_t bytes, void* code) {
  check_access(address, bytes, Access::atomic, true, code);
  const Thread& thread = *current;
  Block& block = *thread.block;
  auto& published = released[{machine.launch, address}];
  auto& acquired = block.acquired[thread.linear];
  for (const auto& [other, epoch] : published) acquired[other] = std::max(acquired[other], epoch);
  if (!thread.fenced) return;
  published[block.linear] = block.epoch;
  for (const auto& [other, epoch] : block.known) published[other] = std::max(published[other], epoch);
}

void fence() {
  Block& block = *current->block;
  current->fenced = true;
  for (const auto& [other, epoch] : std::exchange(block.acquired[current->linear], {}))
    block.pending[other] = std::max(block.pending[other], epoch);
}

}  // namespace cuda_on_cpu

using cuda_on_cpu::Access;
using cuda_on_cpu::check_access;

extern "C" {
// The races found so far, a line each; forgets them.
__attribute__((visibility("default"))) const char* races() {
  cuda_on_cpu::lines.clear();
  for (const std::string& line : cuda_on_cpu::found) cuda_on_cpu::lines += line + "\n";
  cuda_on_cpu::found.clear();
  cuda_on_cpu::reported.clear();
  return cuda_on_cpu::lines.c_str();
}

#define HOOKS(n)                                                                                                   \
  void __tsan_read##n(void* p) { check_access(p, n, Access::read, true, __builtin_return_address(0)); }            \
  void __tsan_write##n(void* p) { check_access(p, n, Access::write, true, __builtin_return_address(0)); }          \
  void __tsan_unaligned_read##n(void* p) { check_access(p, n, Access::read, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##n(void* p) { check_access(p, n, Access::write, false, __builtin_return_address(0)); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, size_t n) { check_access(p, n, Access::read, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { check_access(p, n, Access::write, false, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
