// precondition: L G R of a gradient G [k, n], with the inverse Kronecker factors L [k, k] and R [n, n], both symmetric.
//
// In the form X^T Y of the register kernel that is (G^T L)^T R: the first product is written as the strips that the
// second one reads, so that nothing is packed twice. Where G is thin, packing L and R would cost more than the
// products.
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "../ops/precondition.h"
#include "../tensors.h"
#include "kernels.h"
#include "parallel.h"
#include "strips.h"

namespace secondorder::cpu {
namespace {

constexpr int64_t kThin = 24;  // rows or columns of G; from 32 on the register kernel is ahead of MKL's products

// X^T Y tile by tile: f(worker, first strip of X, strips, first strip of Y, strips) for every tile.
template <typename T, typename F>
void for_tiles(int64_t depth, const Strips<T>& x, const Strips<T>& y, F&& f) {
  const int64_t x_step = tile_strips(x.count), y_step = tile_strips(y.count);
  const int64_t down = ceil_div(x.count, x_step), across = ceil_div(y.count, y_step);
  parallel_items(down * across, depth * x.cols * y.cols / kProductsPerElement, [&](int64_t worker, int64_t item) {
    const int64_t xs = item / across * x_step, ys = item % across * y_step;
    f(worker, xs, std::min(x_step, x.count - xs), ys, std::min(y_step, y.count - ys));
  });
}

// out [x.cols, y.cols] = X^T Y; the strips of X lie x_stride apart.
template <typename T>
void multiply(const Strips<T>& x, int64_t x_stride, const Strips<T>& y, T* out) {
  const Kernels<T>& kernel = kernels<T>();
  const int64_t nr = kernel.nr, row = kTileStrips * nr;
  std::vector<std::vector<T>> scratch(at::get_num_threads());
  for_tiles(y.rows, x, y, [&](int64_t worker, int64_t xs, int64_t x_strips, int64_t ys, int64_t y_strips) {
    std::vector<T>& tile = scratch[worker];
    tile.resize(row * row);
    multiply_strips(kernel, y.rows, x.strip(0) + xs * x_stride, x_stride, x_strips, y.strip(ys), y.stride(), y_strips,
                    tile.data(), row, nr, false);
    const int64_t rows = std::min(x_strips * nr, x.cols - xs * nr), cols = std::min(y_strips * nr, y.cols - ys * nr);
    for (int64_t i = 0; i < rows; ++i)
      std::memcpy(out + (xs * nr + i) * y.cols + ys * nr, tile.data() + i * row, sizeof(T) * cols);
  });
}

template <typename T>
void pack(const Strips<T>& strips, const T* matrix, bool transposed) {
  parallel_items(strips.count, strips.rows * strips.cols,
                 [&](int64_t, int64_t s) { transposed ? strips.pack_transposed(s, matrix) : strips.pack(s, matrix); });
}

at::Tensor precondition(const std::optional<at::Tensor>& left_, const at::Tensor& gradient_,
                        const std::optional<at::Tensor>& right_) {
  check_precondition(left_, gradient_, right_);
  const Unrecorded guard;
  const auto contiguous = [](const std::optional<at::Tensor>& t) { return t ? t->contiguous() : at::Tensor(); };
  const at::Tensor gradient = gradient_.contiguous(), left = contiguous(left_), right = contiguous(right_);
  const int64_t k = gradient.size(0), n = gradient.size(1);
  if (!left_ && !right_) return gradient_.clone(at::MemoryFormat::Contiguous);
  if (std::min(k, n) < kThin) {
    const at::Tensor half = left_ ? left.mm(gradient) : gradient;
    return right_ ? half.mm(right) : half;
  }
  at::Tensor out = at::empty({k, n}, gradient.options());
  AT_DISPATCH_FLOATING_TYPES(gradient.scalar_type(), "precondition", [&] {
    using T = scalar_t;
    const Kernels<T>& kernel = kernels<T>();
    const int64_t nr = kernel.nr;
    const T* g = gradient.const_data_ptr<T>();
    T* result = out.mutable_data_ptr<T>();
    if (!right.defined()) {
      const Strips<T> x(k, k), y(k, n);
      pack(x, left.const_data_ptr<T>(), false);
      pack(y, g, false);
      return multiply(x, x.stride(), y, result);
    }
    const Strips<T> r(n, n);
    pack(r, right.const_data_ptr<T>(), false);
    if (!left.defined()) {
      const Strips<T> x(n, k);
      pack(x, g, true);
      return multiply(x, x.stride(), r, result);
    }
    const Strips<T> x(k, n), y(k, k), half(x.count * nr, k);  // half: G^T L, of whose rows n are used
    pack(x, g, false);
    pack(y, left.const_data_ptr<T>(), false);
    for_tiles(k, x, y, [&](int64_t, int64_t xs, int64_t x_strips, int64_t ys, int64_t y_strips) {
      multiply_strips(kernel, k, x.strip(xs), x.stride(), x_strips, y.strip(ys), y.stride(), y_strips,
                      half.strip(ys) + xs * nr * nr, nr, half.stride(), false);
    });
    multiply(half, half.stride(), r, result);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(secondorder, CPU, m) { m.impl("precondition", precondition); }

}  // namespace secondorder::cpu
