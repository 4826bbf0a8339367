// The emulation's run-time: fibers, barriers, warp collectives, and the blocks of a launch.
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "machine.h"

// There with AddressSanitizer.
extern "C" void __asan_unpoison_memory_region(const volatile void*, size_t) __attribute__((weak));

namespace cuda_on_cpu {

Machine machine;
Thread* current = nullptr;
dim3 block_size;
int planted = -1;

namespace {

constexpr size_t kDefaultSharedBytes = 48 << 10;
void* scheduler = nullptr;  // its stack pointer
thread_local char in_static_shared;

// Saves the running fiber's registers and stack pointer in *from, and goes on where `to` was saved.
__attribute__((naked, noinline)) void switch_stack(void** /*from*/, void* /*to*/) {
  asm volatile(
      "push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15; mov %rsp,(%rdi); mov %rsi,%rsp;"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}

void to_scheduler() { switch_stack(&current->stack_pointer, scheduler); }

void resume(Thread& thread) {
  current = &thread;
  switch_stack(&scheduler, thread.stack_pointer);
  current = nullptr;
  if (!machine.error.empty()) throw std::runtime_error(std::exchange(machine.error, {}));
}

}  // namespace

void fail(const std::string& message) {
  machine.error =
      "block " + std::to_string(current->block->linear) + " thread " + std::to_string(current->linear) + ": " + message;
  to_scheduler();
  std::abort();
}

void barrier(int line) {
  current->state = State::at_barrier;
  current->line = line;
  ++current->block->at_barrier;
  to_scheduler();
}

int barrier_and(int predicate, int line) {
  current->block->vote = current->block->vote && predicate;
  barrier(line);
  return current->vote;
}

void sleep() {
  current->state = State::sleeping;
  to_scheduler();
}

// Complete once every lane of the mask that still runs has come.
static void check_complete(Thread& thread, Collective& c) {
  const unsigned expected = c.mask & ~thread.warp->gone;
  if ((c.arrived & expected) != expected) return;
  c.complete = true;
  c.unread = c.arrived;
  Thread* lanes = &thread.block->threads[thread.linear / kLanes * kLanes];
  for (int lane = 0; lane < kLanes; ++lane)
    if ((c.arrived >> lane & 1) && lanes[lane].state == State::at_collective) lanes[lane].state = State::ready;
}

Collective& meet(unsigned mask, const void* value, size_t bytes, const char* name, int line) {
  Thread& thread = *current;
  Warp& warp = *thread.warp;
  const unsigned self = 1u << thread.lane;
  if (!(mask & self)) fail(std::string(name) + ": the calling lane is not in its mask");
  Collective* c = nullptr;
  for (unsigned open = warp.open; open && !c; open &= open - 1) {
    Collective& candidate = warp.collective[__builtin_ctz(open)];
    if (!candidate.complete && candidate.mask == mask && !(candidate.arrived & self)) c = &candidate;
  }
  if (!c) {
    const int k = __builtin_ctz(~warp.open);
    warp.open |= 1u << k;
    c = &warp.collective[k];
    c->mask = mask;
    c->arrived = c->unread = 0;
    c->line = line;
    c->name = name;
    c->complete = false;
    std::memset(c->value, 0xFF, sizeof c->value);  // what a lane outside gives is no number
  }
  if (c->name != name && std::strcmp(c->name, name))
    fail(std::string("lanes of one warp meet in ") + c->name + " and in " + name);
  std::memcpy(c->value[thread.lane], value, bytes);
  c->arrived |= self;
  thread.line = line;
  check_complete(thread, *c);
  if (!c->complete) {
    thread.state = State::at_collective;
    to_scheduler();
  }
  return *c;
}

void leave(Collective& c) {
  c.unread &= ~(1u << current->lane);
  if (!c.unread) current->warp->open &= ~(1u << (&c - current->warp->collective));
}

// ---- the scheduler

static void enter() {
  machine.kernel(machine.arguments);
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

Span static_shared() {
  static const Span found = [] {
    in_static_shared = 0;  // touched, hence allocated
    Span result{};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
          for (int k = 0; k < info->dlpi_phnum; ++k) {
            const Span span{static_cast<char*>(info->dlpi_tls_data), info->dlpi_phdr[k].p_memsz};
            if (info->dlpi_phdr[k].p_type != PT_TLS || !span.begin || !span.holds(&in_static_shared)) continue;
            *static_cast<Span*>(out) = span;
            return 1;
          }
          return 0;
        },
        &result);
    return result;
  }();
  return found;
}

static void start(Block& block, size_t id, size_t first_stack) {
  Machine& m = machine;
  const dim3 size = block_size;
  const unsigned count = size.x * size.y * size.z, warps = (count + kLanes - 1) / kLanes;
  block.linear = unsigned(id);
  const uint3 index = {unsigned(id % m.grid_size.x), unsigned(id / m.grid_size.x % m.grid_size.y),
                       unsigned(id / (size_t(m.grid_size.x) * m.grid_size.y))};
  block.done = block.at_barrier = block.epoch = 0;
  block.vote = true;
  void* dynamic = nullptr;
  if (posix_memalign(&dynamic, 64, std::max<size_t>(m.dynamic_bytes, 1))) throw std::bad_alloc();
  block.dynamic.reset(static_cast<unsigned char*>(dynamic));  // of exactly its size: AddressSanitizer sees its end
  std::memset(dynamic, 0xFF, m.dynamic_bytes);
  if (m.blocks.size() > 1) block.statics.assign(static_shared().size, 0xFF);
  else std::memset(static_shared().begin, 0xFF, static_shared().size);
  block.known.clear();
  block.pending.clear();
  block.acquired.clear();
  block.warps.resize(warps);
  for (unsigned w = 0; w < warps; ++w) {
    block.warps[w].open = 0;
    block.warps[w].gone = count - w * kLanes >= kLanes ? 0 : ~0u << (count - w * kLanes);
  }
  block.threads.assign(warps * kLanes, Thread{});
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = block.threads[i];
    thread.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    thread.block_index = index;
    thread.block = &block;
    thread.dynamic = block.dynamic.get();
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

[[noreturn]] static void stuck(const Block& block) {
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
static bool run(Block& block) {
  Machine& m = machine;
  const Span shared = static_shared();
  const unsigned count = block_size.x * block_size.y * block_size.z;
  const bool alone = m.blocks.size() == 1;
  if (!alone) std::memcpy(shared.begin, block.statics.data(), shared.size);
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
  if (!alone) std::memcpy(block.statics.data(), shared.begin, shared.size);
  return advanced || block.done == count;
}

static void run_resident(const std::vector<size_t>& ids) {
  Machine& m = machine;
  const size_t threads = size_t(block_size.x) * block_size.y * block_size.z;
  if (threads * ids.size() > m.stack_count) {
    if (m.stacks) munmap(m.stacks, m.stack_count * kStackBytes);
    m.stack_count = threads * ids.size();
    m.stacks = static_cast<char*>(mmap(nullptr, m.stack_count * kStackBytes, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (m.stacks == MAP_FAILED) throw std::bad_alloc();
  }
  // Those of these blocks.
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(m.stacks, threads * ids.size() * kStackBytes);
  m.blocks.resize(ids.size());
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

void launch(const char* name, const void* kernel, cudaStream_t stream, bool cooperative, dim3 grid, dim3 block,
            size_t dynamic_bytes, void (*call)(void*), void* arguments) {
  Machine& m = machine;
  const auto refuse = [name](const char* reason) { throw std::runtime_error(std::string(name) + ": " + reason); };
  const size_t blocks = size_t(grid.x) * grid.y * grid.z, threads = size_t(block.x) * block.y * block.z;
  const size_t static_bytes = m.static_shared[kernel];
  if (stream != m.stream) refuse("not on the stream that was given");
  if (cooperative && blocks > m.multiprocessors) refuse("a cooperative launch of more blocks than are resident");
  if (threads == 0 || threads > 1024) refuse("invalid block size");
  if (blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) refuse("invalid grid size");
  if (static_bytes > kDefaultSharedBytes) refuse("more static shared memory than a block may have");
  if (static_bytes + dynamic_bytes > kDefaultSharedBytes && dynamic_bytes > m.shared_limits[kernel])
    refuse("more dynamic shared memory than the kernel's attribute allows");
  if (static_bytes + dynamic_bytes > std::max(m.shared_bytes, kDefaultSharedBytes))
    refuse("more shared memory, static and dynamic, than the device has for a block");
  m.launches.push_back(name);
  ++m.launch;
  m.random.seed(m.seed + m.launch);
  m.grid_size = grid;
  block_size = block;
  m.dynamic_bytes = dynamic_bytes;
  m.kernel = call;
  m.arguments = arguments;
  std::vector<size_t> ids(m.last_blocks ? std::min(m.last_blocks, blocks) : blocks);
  std::iota(ids.begin(), ids.end(), blocks - ids.size());
  if (m.order == Order::reverse) std::reverse(ids.begin(), ids.end());
  if (m.order == Order::shuffled) std::shuffle(ids.begin(), ids.end(), m.random);
  if (cooperative) return run_resident(ids);
  for (size_t id : ids) run_resident({id});
}

void set_shared_limit(const void* kernel, size_t bytes) { machine.shared_limits[kernel] = bytes; }

void set_memory(void* address, int value, size_t bytes, cudaStream_t stream) {
  if (stream != machine.stream) throw std::runtime_error("cudaMemsetAsync: not on the stream that was given");
  machine.launches.push_back("memset");
  std::memset(address, value, bytes);
}

}  // namespace cuda_on_cpu
