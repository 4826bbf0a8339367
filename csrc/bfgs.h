// What the CPU and CUDA kernels of K-BFGS share: the bits of an update's status, as secondorder/ops/bfgs.py names them.
#pragma once

#include <cstdint>

namespace secondorder {

constexpr int64_t kUpdated = 1, kDampedS = 2, kDampedY = 4;

}  // namespace secondorder
