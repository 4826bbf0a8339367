// EigenAdam: a step of a whole net in three passes over every matrix (the gradient's projections; the moments; the
// parameters), the renewal of its bases, and the sketch of a layer's inputs.
//
// Skinny products run over groups of rows that stay in the caches, and over blocks of them, each with its own sums,
// which are added in order: the result does not depend on the number of threads.
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <vector>

#include "../eigen.h"
#include "../ops/eigen.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace secondorder::cpu {
namespace {

constexpr int64_t kGroup = 16;  // rows that stay in the caches from one product with them to the next
constexpr int64_t kRows = 4;    // rows of the parameters that move at a time

// Rows of a matrix [n, p] that one block has: small matrices are one block, others at most eight.
int64_t block_rows(int64_t n, int64_t p) {
  return n * p <= kSerialWork ? std::max<int64_t>(1, n) : kGroup * ceil_div(n, 8 * kGroup);
}

// Calls f(block, begin, end) for all blocks of rows of [n, p], over threads.
template <typename F>
void for_blocks(int64_t n, int64_t p, F&& f) {
  const int64_t rows = block_rows(n, p), blocks = ceil_div(n, rows);
  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) f(b, b * rows, std::min(n, (b + 1) * rows));
  });
}

// sum over blocks: x [blocks, size] -> its first row.
template <typename T>
void add_blocks(T* x, int64_t blocks, int64_t size) {
  for (int64_t b = 1; b < blocks; ++b)
    for (int64_t i = 0; i < size; ++i) x[i] += x[b * size + i];
}

// x [rows, columns] -> its transpose
template <typename T>
void transpose(int64_t rows, int64_t columns, const T* x, T* out) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) out[j * rows + i] = x[i * columns + j];
}

// x [n] -> -x
template <typename T>
T* negative(Scratch& scratch, int64_t n, const T* x) {
  T* const minus = scratch.take<T>(n);
  std::transform(x, x + n, minus, [](T value) { return -value; });
  return minus;
}

// A matrix of the net, its bases, and its gradient in the parts that EigenSizes names.
template <typename T>
struct Matrix {
  EigenSizes size{};
  const T *gradient = nullptr, *bias_gradient = nullptr, *mean = nullptr;  // G [n, p], g [n] or null, a [p]
  const T *out = nullptr, *in = nullptr;                                   // U^T [ku, n], V^T [kv, p]
  T* u = nullptr;                                                          // U [n, ku]
  T *projected = nullptr, *above = nullptr;                                // G' V [n, kv], U^T G' [ku, p]
  T *corner = nullptr, *right = nullptr, *top = nullptr;                   // C, R, T
  double squares = 0, bias_squares = 0;                                    // |G|^2, |g|^2
  Scratch scratch;                                                         // has U and all that comes after it

  const Kernels<T>& k = kernels<T>();

  int64_t blocks() const { return ceil_div(size.n, block_rows(size.n, size.p)); }
  // Whether the gradient is finite, and the squares of its elements, too.
  bool finite() const {
    constexpr double limit = double(std::numeric_limits<T>::max()) / 4;
    return squares < limit && bias_squares < limit;
  }

  // C, R, T of the gradient, what they are made of, and its size.
  void project() {
    const int64_t n = size.n, p = size.p, ku = size.ku, kv = size.kv, c = size.c(), count = blocks();
    u = scratch.take<T>(n * ku);
    transpose(ku, n, out, u);
    projected = scratch.take<T>(n * kv);
    above = scratch.zeros<T>(count * ku * p);
    double* const sums = scratch.zeros<double>(count);
    for_blocks(n, p, [&](int64_t b, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i += kGroup) {
        const int64_t rows = std::min(kGroup, end - i);
        const T* x = gradient + i * p;
        sums[b] += double(k.dot(rows * p, x, x));
        k.products(rows, p, x, kv, in, projected + i * kv, kv);
        T* sum = above + b * ku * p;
        k.low_rank(ku, p, sum, rows, out + i, n, x, sum);
      }
    });
    squares = std::accumulate(sums, sums + count, 0.0);
    bias_squares = bias_gradient ? double(k.dot(n, bias_gradient, bias_gradient)) : 0;
    add_blocks(above, count, ku * p);
    if (bias_gradient) {
      T *shift = scratch.take<T>(kv), *along = scratch.zeros<T>(ku);  // a^T V, U^T g
      k.products(1, p, mean, kv, in, shift, kv);
      k.low_rank(n, kv, projected, 1, negative(scratch, n, bias_gradient), 1, shift, projected);
      k.products(ku, n, out, 1, bias_gradient, along, 1);
      k.low_rank(ku, p, above, 1, negative(scratch, ku, along), 1, mean, above);
    }
    right = scratch.take<T>(n * c);
    for (int64_t i = 0; i < n; ++i) {
      std::copy_n(projected + i * kv, kv, right + i * c);
      if (bias_gradient) right[i * c + kv] = bias_gradient[i];
    }
    corner = scratch.take<T>(ku * c);
    k.low_rank(ku, c, nullptr, n, out, n, right, corner);
    if (size.right()) k.low_rank(n, c, right, ku, negative(scratch, n * ku, u), ku, corner, right);
    if (size.top()) {  // U^T G' - C V^T, without the bias' column
      T* const minus = scratch.take<T>(ku * kv);
      for (int64_t q = 0; q < ku; ++q)
        for (int64_t s = 0; s < kv; ++s) minus[q * kv + s] = -corner[q * c + s];
      top = scratch.take<T>(ku * p);
      k.low_rank(ku, p, above, kv, minus, kv, in, top);
    }
  }

  // E = G + l r: l [n, w], r [w, p], with w = (1 with a bias) + kv + ku.
  struct LowRank {
    int64_t width;
    T *l, *r;
  };
  LowRank residual(Scratch& own) const {
    const int64_t n = size.n, p = size.p, ku = size.ku, kv = size.kv, width = size.c() + ku;
    const LowRank f{width, own.take<T>(n * width), own.take<T>(width * p)};
    T* l = f.l;
    for (int64_t i = 0; i < n; ++i) {
      if (size.bias) *l++ = -bias_gradient[i];
      for (int64_t s = 0; s < kv; ++s) *l++ = -projected[i * kv + s];
      for (int64_t q = 0; q < ku; ++q) *l++ = -u[i * ku + q];
    }
    T* r = size.bias ? std::copy_n(mean, p, f.r) : f.r;
    r = std::copy_n(in, kv * p, r);
    std::copy_n(top, ku * p, r);
    return f;
  }

  // S = N_E + l r and y [n] from parts of N: w = ku + kv. nv = N_E V [n, kv] and nu = U^T N_E [ku, p], null without
  // N_E; y is null without a bias.
  LowRank whole(Scratch& own, const T* c_part, const T* r_part, const T* t_part, const T* nv, const T* nu, T* y) const {
    const int64_t n = size.n, p = size.p, ku = size.ku, kv = size.kv, c = size.c(), width = ku + kv;
    // Inside the bases' span of the outputs: N_C - U^T N_R + (U^T N_E V, 0).
    T *inside = own.take<T>(ku * c), *both = own.take<T>(ku * kv);
    std::copy_n(c_part, ku * c, inside);
    if (size.right()) {
      T* const minus = own.take<T>(ku * c);
      k.low_rank(ku, c, nullptr, n, out, n, r_part, minus);
      for (int64_t i = 0; i < ku * c; ++i) inside[i] -= minus[i];
    }
    if (nu) {
      k.products(ku, p, nu, kv, in, both, kv);
      for (int64_t q = 0; q < ku; ++q)
        for (int64_t s = 0; s < kv; ++s) inside[q * c + s] += both[q * kv + s];
    }
    T* const x = own.take<T>(n * c);  // N_R + U inside
    k.low_rank(n, c, size.right() ? r_part : nullptr, ku, u, ku, inside, x);
    const LowRank f{width, own.take<T>(n * width), own.zeros<T>(width * p)};
    T* l = f.l;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t q = 0; q < ku; ++q) *l++ = u[i * ku + q];
      for (int64_t s = 0; s < kv; ++s) *l++ = x[i * c + s] - (nv ? nv[i * kv + s] : T(0));
      if (y) y[i] = x[i * c + kv];
    }
    if (size.top()) {  // N_T (I - V V^T) - U^T N_E
      k.products(ku, p, t_part, kv, in, both, kv);
      k.low_rank(ku, p, t_part, kv, negative(own, ku * kv, both), kv, in, f.r);
      if (nu)
        for (int64_t i = 0; i < ku * p; ++i) f.r[i] -= nu[i];
    }
    std::copy_n(in, kv * p, f.r + ku * p);
    return f;
  }
};

template <typename T>
const T* optional_data(const at::Tensor& t) {
  return t.numel() ? t.const_data_ptr<T>() : nullptr;
}

std::vector<at::Tensor> contiguous(at::TensorList tensors) {
  std::vector<at::Tensor> out;
  for (const at::Tensor& t : tensors) out.push_back(t.contiguous());
  return out;
}

// The matrices of a call. The lists are contiguous and outlive them.
template <typename T>
std::vector<Matrix<T>> matrices(at::TensorList grad_weight, at::TensorList grad_bias, at::TensorList mean,
                                at::TensorList basis_out, at::TensorList basis_in) {
  std::vector<Matrix<T>> all(grad_weight.size());
  for (size_t l = 0; l < all.size(); ++l) {
    all[l].size = {grad_weight[l].size(0), grad_weight[l].size(1), basis_out[l].size(0), basis_in[l].size(0),
                   grad_bias[l].numel() > 0};
    all[l].gradient = grad_weight[l].const_data_ptr<T>();
    all[l].bias_gradient = optional_data<T>(grad_bias[l]);
    all[l].mean = optional_data<T>(mean[l]);
    all[l].out = optional_data<T>(basis_out[l]);
    all[l].in = optional_data<T>(basis_in[l]);
  }
  return all;
}

template <typename T>
std::vector<int64_t> elements(const std::vector<Matrix<T>>& all) {
  std::vector<int64_t> sizes;
  for (const Matrix<T>& matrix : all) sizes.push_back(matrix.size.n * matrix.size.p);
  return sizes;
}

void written(at::TensorList tensors) {
  for (const at::Tensor& each : tensors) each.unsafeGetTensorImpl()->bump_version();
}

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
    lengths[q] = length(row);
    if (!(lengths[q] > tolerance * start && lengths[q] > tolerance * largest)) {
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
      if (!all[l].finite() || !std::isfinite(squares(sums[l])) || !std::isfinite(squares(h[l]))) {
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

// What a step writes of one matrix.
template <typename T>
struct State {
  T *weight, *bias, *first, *second, *last;
  double* size;
  int64_t sampled;  // rows of E in `last`
};

struct Rates {
  double length, lr, lr_bias, decay, decay_bias;
};

// The moments of a projected matrix, and its step. Adds to the slopes (along this step, along the one before).
template <typename T>
void step(Matrix<T>& matrix, const State<T>& state, const Rates& rates, double beta1, double beta2, double eps,
          int64_t t, double slopes[2]) {
  const Kernels<T>& loops = kernels<T>();
  const EigenSizes& size = matrix.size;
  const int64_t n = size.n, p = size.p, ku = size.ku, kv = size.kv, rest = size.rest(), count = matrix.blocks();
  *state.size = std::max(*state.size, std::sqrt(matrix.squares / double(n * p)));
  const EigenCorrections corrections(beta1, beta2, t);
  const EigenMoments<T> rule(beta1, beta2, corrections.first, corrections.fresh,
                             eps * *state.size + double(std::numeric_limits<T>::min()), size.apart());

  // Takes N's elements as the last steps of their coordinates.
  const auto remember = [&](int64_t elements, const T* x, const T* made, T* last) {
    if (!rule.lazy) std::copy_n(made, elements, last);
    for (int64_t i = 0; rule.lazy && i < elements; ++i) last[i] = rule.waits(x[i]) ? last[i] : made[i];
  };
  Scratch scratch;
  T* const normed = scratch.take<T>(rest);  // N's C, R, T
  int64_t at = 0;
  for (const auto& [part, elements] : {std::pair{matrix.corner, size.corner()}, std::pair{matrix.right, size.right()},
                                       std::pair{matrix.top, size.top()}}) {
    if (!elements) continue;
    slopes[1] += double(loops.dot(elements, part, state.last + at));
    slopes[0] += double(loops.moments(elements, part, rule, state.first + at, state.second + at, normed + at));
    remember(elements, part, normed + at, state.last + at);
    at += elements;
  }

  T *residual = nullptr, *nv = nullptr, *nu = nullptr;  // N's E, its products with V and U
  if (size.residual()) {
    residual = scratch.take<T>(n * p);
    nv = scratch.take<T>(n * kv);
    nu = scratch.zeros<T>(count * ku * p);
    std::vector<int64_t> sample(n, -1);  // which of the sampled rows a row is
    for (int64_t s = 0; s < state.sampled; ++s) sample[eigen_sampled_row(s, state.sampled, n)] = s;
    const double share = double(n) / double(state.sampled);
    const auto f = matrix.residual(scratch);
    std::vector<double> along(count, 0.0), along_last(count, 0.0);
    T* const groups = scratch.take<T>(count * kGroup * p);
    for_blocks(n, p, [&](int64_t b, int64_t begin, int64_t end) {
      T* const x = groups + b * kGroup * p;
      for (int64_t i = begin; i < end; i += kGroup) {
        const int64_t rows = std::min(kGroup, end - i);
        loops.low_rank(rows, p, matrix.gradient + i * p, f.width, f.l + i * f.width, f.width, f.r, x);
        for (int64_t r = 0, next; r < rows; r = next) {  // a sampled row, or all up to the next one
          const int64_t s = sample[i + r], here = (i + r) * p;
          for (next = r + 1; s < 0 && next < rows && sample[i + next] < 0;) ++next;
          const T slope = loops.moments((next - r) * p, x + r * p, rule, state.first + rest + here,
                                        state.second + rest + here, residual + here);
          if (s < 0) continue;
          T* last = state.last + rest + s * p;
          along[b] += share * double(slope);
          along_last[b] += share * double(loops.dot(p, x + r * p, last));
          remember(p, x + r * p, residual + here, last);
        }
        loops.products(rows, p, residual + i * p, kv, matrix.in, nv + i * kv, kv);
        T* sum = nu + b * ku * p;
        loops.low_rank(ku, p, sum, rows, matrix.out + i, n, residual + i * p, sum);
      }
    });
    add_blocks(nu, count, ku * p);
    slopes[0] = std::accumulate(along.begin(), along.end(), slopes[0]);
    slopes[1] = std::accumulate(along_last.begin(), along_last.end(), slopes[1]);
  }

  T* const y = size.bias ? scratch.take<T>(n) : nullptr;
  const auto f =
      matrix.whole(scratch, normed, normed + size.corner(), normed + size.corner() + size.right(), nv, nu, y);
  const T keep = T(1 - rates.length * rates.lr * rates.decay), rate = T(rates.length * rates.lr);
  T* const steps = scratch.take<T>(count * kRows * p);
  for_blocks(n, p, [&](int64_t b, int64_t begin, int64_t end) {
    T* const s = steps + b * kRows * p;
    T shift[kRows];
    for (int64_t i = begin; i < end; i += kRows) {
      const int64_t rows = std::min(kRows, end - i);
      loops.low_rank(rows, p, residual ? residual + i * p : nullptr, f.width, f.l + i * f.width, f.width, f.r, s);
      loops.descend(rows * p, keep, rate, matrix.gradient + i * p, s, state.weight + i * p);
      if (!y) continue;
      loops.products(rows, p, s, 1, matrix.mean, shift, 1);
      for (int64_t r = 0; r < rows; ++r) y[i + r] -= shift[r];
    }
  });
  if (size.bias)
    loops.descend(n, T(1 - rates.length * rates.lr_bias * rates.decay_bias), T(rates.length * rates.lr_bias),
                  matrix.bias_gradient, y, state.bias);
}

void eigen_step_(at::TensorList weight, at::TensorList bias, at::TensorList first, at::TensorList second,
                 at::TensorList last, at::TensorList size, const at::Tensor& control, at::TensorList grad_weight,
                 at::TensorList grad_bias, at::TensorList mean, at::TensorList basis_out, at::TensorList basis_in,
                 at::ArrayRef<double> lr, at::ArrayRef<double> lr_bias, at::ArrayRef<double> decay,
                 at::ArrayRef<double> decay_bias, at::IntArrayRef step_, double beta1, double beta2, double eps,
                 bool renewed, int64_t renew_every, int64_t since, const std::optional<at::Tensor>& rate) {
  check_eigen_step(weight, bias, first, second, last, size, control, grad_weight, grad_bias, mean, basis_out, basis_in,
                   lr, lr_bias, decay, decay_bias, step_, beta1, beta2, eps, renew_every, since, rate);
  if (grad_weight.empty()) return;
  const auto g = contiguous(grad_weight), gb = contiguous(grad_bias), a = contiguous(mean), u = contiguous(basis_out),
             v = contiguous(basis_in);
  for (const at::TensorList list : {weight, bias, first, second, last, size}) own_storage(list);
  AT_DISPATCH_FLOATING_TYPES(g[0].scalar_type(), "eigen_step_", [&] {
    using T = scalar_t;
    std::vector<Matrix<T>> all = matrices<T>(g, gb, a, u, v);
    const std::vector<int64_t> sizes = elements(all);
    parallel_layers(sizes, 2, [&](int64_t l) { all[l].project(); });
    double* steps = control.mutable_data_ptr<double>();
    const double* const rates = rate ? rate->const_data_ptr<double>() : nullptr;
    if (steps[kEigenUnrenewed] != 0 ||
        (rate && !std::all_of(rates, rates + rate->numel(), [](double x) { return eigen_is_rate(x); })) ||
        !std::all_of(all.begin(), all.end(), [](const Matrix<T>& each) { return each.finite(); })) {
      steps[kEigenUnrenewed] = 0;
      steps[kEigenRefused] += 1;
      return;
    }
    const EigenReplay replay{renew_every, since};
    const double length = eigen_length(steps);
    const int64_t more = replay.steps(steps);
    std::vector<double> slopes(2 * all.size(), 0.0);
    parallel_layers(sizes, 6, [&](int64_t l) {
      const State<T> state{weight[l].mutable_data_ptr<T>(),
                           bias[l].mutable_data_ptr<T>(),
                           first[l].mutable_data_ptr<T>(),
                           second[l].mutable_data_ptr<T>(),
                           last[l].mutable_data_ptr<T>(),
                           size[l].mutable_data_ptr<double>(),
                           all[l].size.residual() ? (last[l].numel() - all[l].size.rest()) / all[l].size.p : 0};
      step(all[l], state,
           Rates{length, lr[l] * (rates ? rates[2 * l] : 1), lr_bias[l] * (rates ? rates[2 * l + 1] : 1), decay[l],
                 decay_bias[l]},
           beta1, beta2, eps, step_[l] + more, &slopes[2 * l]);
    });
    double sums[2] = {0, 0};
    for (size_t l = 0; l < all.size(); ++l)
      for (int i = 0; i < 2; ++i) sums[i] += slopes[2 * l + i];
    eigen_control(steps, sums[0], sums[1], renewed && !replay.idle(steps));
  });
  for (const at::TensorList list : {weight, bias, first, second, last, size}) written(list);
  written(control);
}

}  // namespace

TORCH_LIBRARY_IMPL(secondorder, CPU, m) {
  m.impl("eigen_sketch_", eigen_sketch_);
  m.impl("eigen_renew_", eigen_renew_);
  m.impl("eigen_step_", eigen_step_);
}

}  // namespace secondorder::cpu
