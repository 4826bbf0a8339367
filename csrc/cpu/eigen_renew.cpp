// EigenAdam: the sketch of a layer's inputs, and the renewal of bases from it.
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "../ops/eigen.h"
#include "eigen.h"

namespace secondorder::cpu {
namespace {

void eigen_sketch_(const at::Tensor& sketch, const at::Tensor& inputs, const at::Tensor& basis, const at::Tensor& shift,
                   const std::optional<at::Tensor>& control, int64_t renew_every) {
  check_eigen_sketch(sketch, inputs, basis, shift, control, renew_every);
  if (control && EigenReplay{renew_every}.idle(control->const_data_ptr<double>())) return;
  const at::Tensor h = inputs.contiguous(), v = basis.contiguous(), c = shift.contiguous();
  const int64_t m = h.size(0), p = h.size(1), k = v.size(0);
  if (m * p == 0) return;
  AT_DISPATCH_FLOATING_TYPES(h.scalar_type(), "eigen_sketch_", [&] {
    using T = scalar_t;
    const Kernels<T>& loops = kernels<T>();
    const int64_t blocks = ceil_div(m, block_rows(m, p)), size = (k + 1) * p;
    Scratch scratch;
    T* const sums = scratch.zeros<T>(blocks * size);
    const T *x = h.const_data_ptr<T>(), *directions = optional_data<T>(v), *minus = optional_data<T>(c);
    T* const groups = scratch.take<T>(blocks * kGroup * p);  // of shifted inputs
    T* const places = scratch.take<T>(blocks * 2 * kGroup * (k + 1));
    for_blocks(m, p, [&](int64_t b, int64_t begin, int64_t end) {
      T* const row = groups + b * kGroup * p;
      T *coordinates = places + b * 2 * kGroup * (k + 1), *turned = coordinates + kGroup * (k + 1);
      std::fill_n(coordinates, kGroup * (k + 1), T(1));  // the last coordinate, 1, sums the rows
      for (int64_t i = begin; i < end; i += kGroup) {
        const int64_t rows = std::min(kGroup, end - i);
        const T* shifted = minus ? row : x + i * p;
        for (int64_t r = 0; minus && r < rows; ++r) loops.combine(p, T(1), x + (i + r) * p, T(-1), minus, row + r * p);
        loops.products(rows, p, shifted, k, directions, coordinates, k + 1);
        transpose(rows, k + 1, coordinates, turned);
        T* sum = sums + b * size;
        loops.low_rank(k + 1, p, sum, rows, turned, rows, shifted, sum);
      }
    });
    add_blocks(sums, blocks, size);
    T* target = sketch.mutable_data_ptr<T>();
    for (int64_t i = 0; i < size; ++i) target[i] += sums[i];
  });
  written(sketch);
}

// The rows of x [k, n] made orthonormal in their order; lengths [k] are theirs before, 0 for one that depended on the
// others and was drawn anew.
template <typename T>
void orthonormalize(Scratch& scratch, int64_t k, int64_t n, T* x, T* lengths) {
  const Kernels<T>& loops = kernels<T>();
  const T tolerance = 16 * std::numeric_limits<T>::epsilon();
  T* const along = scratch.take<T>(k);
  const auto length = [&](const T* row) { return T(std::sqrt(loops.dot(n, row, row))); };
  // Rows grow as squares of a gradient: squares of their lengths would leave T's range. A power of 2 rounds nothing.
  T most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < k * n; ++i) most = std::max(most, std::abs(x[i]));
  const int exponent = most > 0 ? std::max(std::ilogb(most), std::numeric_limits<T>::min_exponent) : 0;
  const T unit = std::ldexp(T(1), exponent);
  loops.combine(k * n, 1 / unit, x, T(0), x, x);
  T largest = 0;
  for (int64_t q = 0; q < k; ++q) largest = std::max(largest, length(x + q * n));
  for (int64_t q = 0; q < k; ++q) {
    T* row = x + q * n;
    const auto strip = [&] {
      loops.products(1, n, row, q, x, along, q);
      for (int64_t s = 0; s < q; ++s) along[s] = -along[s];
      loops.low_rank(1, n, row, q, along, q, x, row);
    };
    const auto scale = [&](T factor) { loops.combine(n, factor, row, T(0), row, row); };
    const T start = length(row);
    strip();
    const T left = length(row);
    lengths[q] = left * unit;
    if (!(left > tolerance * start && left > tolerance * largest)) {
      lengths[q] = 0;
      for (int64_t j = 0; j < n; ++j) row[j] = T(eigen_refill(j, q));
      strip();
    }
    scale(1 / length(row));
    strip();
    scale(1 / length(row));
  }
}

// basis, scale <- qr((1 - share) scale basis + share product), [k, n] each
template <typename T>
void renew_side(Scratch& scratch, int64_t k, int64_t n, T share, T* product, T* basis, T* scale) {
  for (int64_t q = 0; q < k; ++q)
    kernels<T>().combine(n, (1 - share) * scale[q], basis + q * n, share, product + q * n, product + q * n);
  orthonormalize(scratch, k, n, product, scale);
  std::copy_n(product, k * n, basis);
}

// The first moments in new bases: C <- A C B, R <- R B, T <- A T with A = U'^T U and B = V^T V', but for the bias'
// column. E stays: what turns into the bases, or out of them, is little from one renewal to the next.
//   old_out, out [ku, n]; old_in, in [kv, p]; first [ku c + n c + ku p + n p], as far as there are C, R, T, E
template <typename T>
void turn(Scratch& scratch, const EigenSizes& size, const T* old_out, const T* old_in, const T* out, const T* in,
          T* first) {
  const Kernels<T>& loops = kernels<T>();
  const int64_t n = size.n, p = size.p, ku = size.ku, kv = size.kv, c = size.c();
  T *a = scratch.take<T>(ku * ku), *b = scratch.zeros<T>(c * c);
  loops.products(ku, n, out, ku, old_out, a, ku);
  loops.products(kv, p, old_in, kv, in, b, c);
  if (size.bias) b[c * c - 1] = 1;
  const auto product = [&](int64_t rows, int64_t inner, int64_t columns, const T* x, const T* y) {
    T* const result = scratch.take<T>(rows * columns);
    loops.low_rank(rows, columns, nullptr, inner, x, inner, y, result);
    return result;
  };
  T *right = first + size.corner(), *top = right + size.right();
  std::copy_n(product(ku, c, c, product(ku, ku, c, a, first), b), size.corner(), first);
  if (size.right()) std::copy_n(product(n, c, c, right, b), size.right(), right);
  if (size.top()) std::copy_n(product(ku, ku, p, a, top), size.top(), top);
}

// The new mean, bases, scales and first moments of a matrix, to their places.
//   mean [p] or null; basis_out [ku, n], basis_in [kv, p]; scale_out [ku], scale_in [kv]; first as in `turn`;
//   sketch [kv + 1, p] of `rows` inputs, or null with rows = 0; hessian [n, n] or null
template <typename T>
void renew(Matrix<T>& matrix, T* mean, T* basis_out, T* basis_in, T* scale_out, T* scale_in, T* first, const T* sketch,
           int64_t rows, const T* hessian, T share) {
  const Kernels<T>& loops = kernels<T>();
  const int64_t n = matrix.size.n, p = matrix.size.p, ku = matrix.size.ku, kv = matrix.size.kv;
  const bool bias = matrix.size.bias;
  Scratch scratch;
  T *old_out = scratch.take<T>(ku * n), *old_in = scratch.take<T>(kv * p);
  std::copy_n(basis_out, ku * n, old_out);
  std::copy_n(basis_in, kv * p, old_in);
  T *inputs = scratch.zeros<T>(kv * p), *outputs = scratch.take<T>(ku * n);
  if (rows) {
    // sum (x - d)(x - d)^T V = sum x x^T V - (sum x)(d^T V) - d (sum x)^T V + rows d (d^T V), d the mean's move
    const T *sum = sketch + kv * p, count = T(rows);
    T *move = scratch.zeros<T>(p), *vd = scratch.take<T>(kv), *vx = scratch.take<T>(kv);
    if (bias)
      for (int64_t j = 0; j < p; ++j) {
        move[j] = share * sum[j] / count;
        mean[j] += move[j];
      }
    loops.products(1, p, move, kv, basis_in, vd, kv);
    loops.products(1, p, sum, kv, basis_in, vx, kv);
    for (int64_t q = 0; q < kv; ++q)
      for (int64_t j = 0; j < p; ++j)
        inputs[q * p + j] = (sketch[q * p + j] - vd[q] * sum[j] - vx[q] * move[j] + count * vd[q] * move[j]) / count;
  }
  // G'^T G' V, where no inputs were seen, and G' G'^T U, where there is no H, with the new mean.
  if (!rows || !hessian) matrix.project();
  if (!rows) {
    T* const turned = scratch.take<T>(kv * n);
    transpose(n, kv, matrix.projected, turned);
    loops.low_rank(kv, p, inputs, n, turned, n, matrix.gradient, inputs);
    if (bias) {  // less (g^T G' V)^T a^T
      T* const along = scratch.take<T>(kv);
      loops.products(kv, n, turned, 1, matrix.bias_gradient, along, 1);
      loops.low_rank(kv, p, inputs, 1, negative(scratch, kv, along), 1, mean, inputs);
    }
  }
  if (hessian) {
    loops.low_rank(ku, n, nullptr, n, basis_out, n, hessian, outputs);
  } else {
    T *along = scratch.take<T>(ku), *product = scratch.take<T>(n * ku);  // G' (U^T G')^T
    loops.products(n, p, matrix.gradient, ku, matrix.above, product, ku);
    if (bias) {
      loops.products(1, p, mean, ku, matrix.above, along, ku);
      loops.low_rank(n, ku, product, 1, negative(scratch, n, matrix.bias_gradient), 1, along, product);
    }
    transpose(n, ku, product, outputs);
  }
  renew_side(scratch, kv, p, share, inputs, basis_in, scale_in);
  renew_side(scratch, ku, n, share, outputs, basis_out, scale_out);
  turn(scratch, matrix.size, old_out, old_in, basis_out, basis_in, first);
}

void eigen_renew_(at::TensorList mean, at::TensorList basis_out, at::TensorList basis_in, at::TensorList scale_out,
                  at::TensorList scale_in, at::TensorList first, const at::Tensor& control, at::TensorList grad_weight,
                  at::TensorList grad_bias, at::TensorList sketch, at::TensorList bias_hessian, at::IntArrayRef rows,
                  at::ArrayRef<double> share, int64_t renew_every, int64_t since, double decay) {
  check_eigen_renew(mean, basis_out, basis_in, scale_out, scale_in, first, control, grad_weight, grad_bias, sketch,
                    bias_hessian, rows, share, renew_every, since, decay);
  double* steps = control.mutable_data_ptr<double>();
  const EigenReplay replay{renew_every, since};
  if (grad_weight.empty() || replay.idle(steps)) return;
  const auto g = contiguous(grad_weight), gb = contiguous(grad_bias), sums = contiguous(sketch),
             h = contiguous(bias_hessian);
  for (const at::TensorList list : {mean, basis_out, basis_in, scale_out, scale_in, first}) own_storage(list);
  AT_DISPATCH_FLOATING_TYPES(g[0].scalar_type(), "eigen_renew_", [&] {
    using T = scalar_t;
    std::vector<Matrix<T>> all = matrices<T>(g, gb, mean, basis_out, basis_in);
    const Kernels<T>& loops = kernels<T>();
    for (size_t l = 0; l < all.size(); ++l) {
      const auto squares = [&](const at::Tensor& t) {
        const T* x = optional_data<T>(t);
        return double(loops.dot(t.numel(), x, x));
      };
      all[l].squares = squares(g[l]);
      all[l].bias_squares = squares(gb[l]);
      if (!all[l].finite() || !finite_square<T>(squares(sums[l])) || !finite_square<T>(squares(h[l]))) {
        steps[kEigenUnrenewed] = 1;
        return;
      }
    }
    parallel_layers(elements(all), 4, [&](int64_t l) {
      renew(all[l], mean[l].mutable_data_ptr<T>(), basis_out[l].mutable_data_ptr<T>(),
            basis_in[l].mutable_data_ptr<T>(), scale_out[l].mutable_data_ptr<T>(), scale_in[l].mutable_data_ptr<T>(),
            first[l].mutable_data_ptr<T>(), optional_data<T>(sums[l]), rows[l], optional_data<T>(h[l]),
            T(replay.share(steps, share[l], decay)));
    });
  });
  for (const at::TensorList list : {mean, basis_out, basis_in, scale_out, scale_in, first}) written(list);
  written(control);
}

}  // namespace

TORCH_LIBRARY_IMPL(secondorder, CPU, m) {
  m.impl("eigen_sketch_", eigen_sketch_);
  m.impl("eigen_renew_", eigen_renew_);
}

}  // namespace secondorder::cpu
