#include "kernels.h"

#include <cstdlib>
#include <limits>
#include <string_view>
#include <utility>

// Everything that kernels.inc uses is included above, outside of the target regions: an inline function of a
// standard header compiled inside one could be shared with code that must run on older machines.

namespace secondorder::cpu {

// Builtins, which become one instruction of the target region that they are used in.
#define SECONDORDER_INLINE inline __attribute__((always_inline))
SECONDORDER_INLINE float sqrt_of(float x) { return __builtin_sqrtf(x); }
SECONDORDER_INLINE double sqrt_of(double x) { return __builtin_sqrt(x); }
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SECONDORDER_SHUFFLEVECTOR  // clang has it, and GCC from 12 on
#endif
#endif

namespace baseline {
constexpr const char* kName = "baseline";
constexpr int kBytes = 16, kMR = 4;
#if defined(__aarch64__)
constexpr int kNV = 4;  // 32 registers: 16 sums
#else
constexpr int kNV = 2;  // 16 registers: 8 sums
#endif
#include "kernels.inc"
}  // namespace baseline

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SECONDORDER_X86_VARIANTS

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr const char* kName = "avx2";
constexpr int kBytes = 32, kMR = 4, kNV = 3;  // 16 registers: 12 sums
#include "kernels.inc"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,fma,prefer-vector-width=512")
namespace avx512 {
constexpr const char* kName = "avx512";
constexpr int kBytes = 64, kMR = 8, kNV = 2;  // 32 registers: 16 sums
#include "kernels.inc"
}  // namespace avx512
#pragma GCC pop_options
#endif

namespace {

// The widest that the machine has, or what SECONDORDER_VECTORS names if that is narrower (the tests run them all).
template <typename T>
Kernels<T> choose() {
#if defined(SECONDORDER_X86_VARIANTS)
  const char* variable = std::getenv("SECONDORDER_VECTORS");
  const std::string_view limit = variable ? variable : "";
  if (limit.empty() || limit == "avx512")
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw"))
      return avx512::table<T>();
  if (limit != "baseline" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::table<T>();
#endif
  return baseline::table<T>();
}

}  // namespace

template <typename T>
const Kernels<T>& kernels() {
  static const Kernels<T> table = choose<T>();
  return table;
}

template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();

}  // namespace secondorder::cpu
