// Memory for what a kernel computes on its way.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"

namespace secondorder::cpu {

// Hands out arrays, and frees them all at its own end. Each begins a cache line, so that a row of whole vectors meets
// no line twice: a vector that lies across two lines takes as long as two. Not for several threads at a time.
class Scratch {
 public:
  // An array of `count` numbers that have no values yet.
  template <typename T>
  T* take(int64_t count) {
    const int64_t bytes = ceil_div(count * int64_t(sizeof(T)), kLine) * kLine;
    if (bytes > left_) {
      left_ = std::max(bytes, kBlock);
      blocks_.push_back(c10::GetCPUAllocator()->allocate(left_));
      next_ = static_cast<char*>(blocks_.back().get());
    }
    T* const taken = reinterpret_cast<T*>(next_);
    next_ += bytes;
    left_ -= bytes;
    return taken;
  }

  // An array of zeros.
  template <typename T>
  T* zeros(int64_t count) {
    T* const taken = take<T>(count);
    std::fill_n(taken, count, T(0));
    return taken;
  }

 private:
  static constexpr int64_t kLine = 64;  // bytes of a cache line, which c10's blocks begin
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t kBlock = 0;  // every array has a block of its own: AddressSanitizer sees what passes its end
#else
  static constexpr int64_t kBlock = 1 << 16;  // bytes of a block, at least
#endif

  std::vector<c10::DataPtr> blocks_;
  char* next_ = nullptr;
  int64_t left_ = 0;
};

}  // namespace secondorder::cpu
