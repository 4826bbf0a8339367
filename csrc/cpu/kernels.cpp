#include "kernels.h"

#include <cstdlib>
#include <limits>
#include <string_view>
#include <utility>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SECONDORDER_X86_VARIANTS
#include <immintrin.h>
#endif

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

// In every namespace: load_part(p, count) reads the first lanes of a vector alone, the others are zero; store_part(p,
// v, count) writes them alone.
namespace baseline {
constexpr const char* kName = "baseline";
constexpr int kBytes = 16, kMR = 4;
#if defined(__aarch64__)
constexpr int kNV = 4;  // 32 registers: 16 sums
#else
constexpr int kNV = 2;  // 16 registers: 8 sums
#endif
template <typename T>
struct Part {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <typename T>
SECONDORDER_INLINE typename Part<T>::type load_part(const T* p, int64_t count) {
  typename Part<T>::type v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
}
template <typename V, typename T>
SECONDORDER_INLINE void store_part(T* p, V v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}
#include "kernels.inc"
}  // namespace baseline

#if defined(SECONDORDER_X86_VARIANTS)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr const char* kName = "avx2";
constexpr int kBytes = 32, kMR = 4, kNV = 3;  // 16 registers: 12 sums
SECONDORDER_INLINE __m256i first_floats(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
SECONDORDER_INLINE __m256i first_doubles(int64_t count) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}
SECONDORDER_INLINE __m256 load_part(const float* p, int64_t count) {
  return _mm256_maskload_ps(p, first_floats(count));
}
SECONDORDER_INLINE __m256d load_part(const double* p, int64_t count) {
  return _mm256_maskload_pd(p, first_doubles(count));
}
SECONDORDER_INLINE void store_part(float* p, __m256 v, int64_t count) {
  _mm256_maskstore_ps(p, first_floats(count), v);
}
SECONDORDER_INLINE void store_part(double* p, __m256d v, int64_t count) {
  _mm256_maskstore_pd(p, first_doubles(count), v);
}
#include "kernels.inc"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,fma,prefer-vector-width=512")
namespace avx512 {
constexpr const char* kName = "avx512";
constexpr int kBytes = 64, kMR = 8, kNV = 2;  // 32 registers: 16 sums
SECONDORDER_INLINE __m512 load_part(const float* p, int64_t count) {
  return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
}
SECONDORDER_INLINE __m512d load_part(const double* p, int64_t count) {
  return _mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), p);
}
SECONDORDER_INLINE void store_part(float* p, __m512 v, int64_t count) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), v);
}
SECONDORDER_INLINE void store_part(double* p, __m512d v, int64_t count) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << count) - 1), v);
}
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
