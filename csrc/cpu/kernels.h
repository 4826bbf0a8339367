// The inner loops of the CPU operators, compiled once per vector width (kernels.inc) and chosen at run time,
// so that one binary runs on every x86-64 and uses the widest vectors that each one has.
#pragma once

#include <cstdint>

#include "../eigen.h"
#include "../formulas.h"

namespace secondorder::cpu {

// A "strip" is kNR columns of a row-major matrix, stored contiguously as [rows, kNR] and padded with zeros.
template <typename T>
struct Kernels {
  const char* name;  // "avx512", "avx2" or "baseline"
  int64_t mr;        // rows of the register tile
  int64_t nr;        // its columns: the width of a strip, a multiple of mr

  // C [mr, nr] (row stride ldc) = A^T B, or += if accumulate.
  //   a [k, mr] (row stride nr), b [k, nr]
  void (*multiply)(int64_t k, const T* a, const T* b, T* c, int64_t ldc, bool accumulate);

  // y1 = M x1, and y2 = M x2 in the same pass where x2 is given.   m [rows, n] contiguous; x1, x2 [n]; y1, y2 [rows]
  void (*matvec)(int64_t rows, int64_t n, const T* m, const T* x1, const T* x2, T* y1, T* y2);

  // y[i] = m_i . x and squares[i] = |m_i|^2 for every row m_i, accumulated in double.
  //   m [rows, n] contiguous; x [n]; y, squares [rows]
  void (*project)(int64_t rows, int64_t n, const T* m, const T* x, double* y, double* squares);

  // out = c b + w a, elementwise over n (c, w scalars)
  void (*combine)(int64_t n, T c, const T* b, T w, const T* a, T* out);

  // One row of the fused update: p = c b + w a; v = momentum v + p where v is given; x = (1 - decay) x + lr (v or p)
  void (*update)(int64_t n, T c, const T* b, T w, const T* a, T lr, T decay, T momentum, T* v, T* x);

  // sums[j] += sum_i x[i, j]   x [rows, cols] with row stride ld
  void (*column_sums)(int64_t rows, int64_t cols, const T* x, int64_t ld, double* sums);

  // x = (1 - share) x + share y, elementwise over n
  void (*average)(int64_t n, T share, const T* y, T* x);

  // sums[j] += sum_i x[i, j] y[i, j]   x, y [rows, cols] with row stride ld
  void (*column_products)(int64_t rows, int64_t cols, const T* x, const T* y, int64_t ld, double* sums);

  // sigma' and sigma'' of a [rows, cols] block. v, e0, e1, g: row stride ld (e0, e1 may be null where the activation
  // has none); d1: row stride d1_ld; d2 (or null): row stride ld; sums (or null):
  // sums[j] += sum_i sigma''[i, j] g[i, j].
  void (*derivatives)(Activation activation, T p, int64_t rows, int64_t cols, const T* v, const T* e0, const T* e1,
                      const T* g, int64_t ld, T* d1, int64_t d1_ld, T* d2, double* sums);

  // One row of H += a a^T - b b^T: h = h + ai a - bi b over n. Every entry is rounded as its mirror image is.
  void (*rank_two)(int64_t n, T ai, const T* a, T bi, const T* b, T* h);

  // out[r, q] = x_r . b_q   x [rows, n] and b [k, n] contiguous; out [rows, k] with row stride ld
  void (*products)(int64_t rows, int64_t n, const T* x, int64_t k, const T* b, T* out, int64_t ld);

  // out = x + l r   x (or null: zero) and out [rows, n], r [k, n] contiguous; l [rows, k] with row stride ld; out may
  // be x
  void (*low_rank)(int64_t rows, int64_t n, const T* x, int64_t k, const T* l, int64_t ld, const T* r, T* out);

  // x . y over n
  T (*dot)(int64_t n, const T* x, const T* y);

  // Adam's rule, as EigenMoments has it, elementwise over n; returns x . normed
  T (*moments)(int64_t n, const T* x, const EigenMoments<T>& rule, T* first, T* second, T* normed);

  // step = 0 where mask is 0; w = keep w - rate step, elementwise over n
  void (*descend)(int64_t n, T keep, T rate, const T* mask, T* step, T* w);

  // out[i, j] = sum_u x[u][i] y[u][j] over count u   out [a, b] contiguous; every x[u] [a], every y[u] [b]
  void (*outer_sum)(int64_t count, int64_t a, int64_t b, const T* const* x, const T* const* y, T* out);
};

// The table for this machine's widest supported vectors.
template <typename T>
const Kernels<T>& kernels();

}  // namespace secondorder::cpu
