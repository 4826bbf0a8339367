// Products X^T Y of row-major matrices that the register kernel multiplies, each packed once into strips of columns.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "parallel.h"

namespace secondorder::cpu {

constexpr int64_t kTileStrips = 4;  // a tile of a result is at most this many strips square
constexpr int64_t kDepth = 256;     // rows of X and Y multiplied at a time: two strips of them fit the L1 cache

// How many strips a tile has: fewer where there would be too few rows of tiles for the threads to finish together.
inline int64_t tile_strips(int64_t strips) {
  return std::clamp<int64_t>(strips / (2 * at::get_num_threads()), 1, kTileStrips);
}

// The columns of a matrix in strips of nr, [strips][rows][nr], the last one padded with zeros.
template <typename T>
struct Strips {
  int64_t rows, cols, nr, count;
  c10::DataPtr storage;

  Strips(int64_t rows, int64_t cols)
      : rows(rows), cols(cols), nr(kernels<T>().nr), count(ceil_div(cols, nr)),
        storage(c10::GetCPUAllocator()->allocate(count * rows * nr * sizeof(T))) {}

  T* strip(int64_t s) const { return static_cast<T*>(storage.get()) + s * stride(); }
  int64_t stride() const { return rows * nr; }
  int64_t width(int64_t s) const { return std::min(nr, cols - s * nr); }

  // Only the last strip has padding; whoever fills it calls this first.
  void clear_padding(int64_t s) const {
    if (width(s) < nr) std::fill_n(strip(s), stride(), T(0));
  }

  // From a row-major matrix [rows, cols].
  void pack(int64_t s, const T* matrix) const {
    clear_padding(s);
    T* out = strip(s);
    const T* in = matrix + s * nr;
    for (int64_t r = 0; r < rows; ++r, out += nr, in += cols) std::memcpy(out, in, sizeof(T) * width(s));
  }

  // From the transpose of a row-major matrix [cols, rows].
  void pack_transposed(int64_t s, const T* matrix) const {
    clear_padding(s);
    T* out = strip(s);
    const T* in = matrix + s * nr * rows;
    const int64_t columns = width(s);
    for (int64_t r = 0; r < rows; ++r, out += nr)
      for (int64_t c = 0; c < columns; ++c) out[c] = in[c * rows + r];
  }
};

// C = X^T Y over `depth` rows, for strips of X and Y that lie a stride apart; C's row r of strip s is at
// c + r * c_row + s * c_strip. With `lower`, X and Y cover the same columns and register tiles wholly above the
// diagonal are left undefined.
template <typename T>
void multiply_strips(const Kernels<T>& kernel, int64_t depth, const T* x, int64_t x_stride, int64_t x_strips,
                     const T* y, int64_t y_stride, int64_t y_strips, T* c, int64_t c_row, int64_t c_strip, bool lower) {
  const int64_t nr = kernel.nr;
  int64_t k = 0;
  do {  // once for no rows at all: C = 0
    const int64_t rows = std::min(kDepth, depth - k);
    for (int64_t ys = 0; ys < y_strips; ++ys)
      for (int64_t xs = lower ? ys : 0; xs < x_strips; ++xs)
        for (int64_t i = 0; i < nr; i += kernel.mr)
          kernel.multiply(rows, x + xs * x_stride + k * nr + i, y + ys * y_stride + k * nr,
                          c + (xs * nr + i) * c_row + ys * c_strip, c_row, k > 0);
    k += kDepth;
  } while (k < depth);
}

}  // namespace secondorder::cpu
