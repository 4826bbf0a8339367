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

namespace secondorder::cpu {
namespace {

constexpr int64_t kGroup = 16;  // rows that stay in the caches from one product with them to the next

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
void add_blocks(std::vector<T>& x, int64_t blocks, int64_t size) {
  for (int64_t b = 1; b < blocks; ++b)
    for (int64_t i = 0; i < size; ++i) x[i] += x[b * size + i];
}

// x [rows, columns] -> its transpose
template <typename T>
std::vector<T> transposed(int64_t rows, int64_t columns, const T* x) {
  std::vector<T> out(rows * columns);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) out[j * rows + i] = x[i * columns + j];
  return out;
}

// A matrix of the net, its bases, and its gradient in the parts that EigenSizes names.
template <typename T>
struct Matrix {
  EigenSizes size{};
  const T *gradient = nullptr, *bias_gradient = nullptr, *mean = nullptr;  // G [n, p], g [n] or null, a [p]
  const T *out = nullptr, *in = nullptr;                                   // U^T [ku, n], V^T [kv, p]
  std::vector<T> u;                                                        // U [n, ku]
  std::vector<T> projected, above;                                         // G' V [n, kv], U^T G' [ku, p]
  std::vector<T> corner, right, top;                                       // C, R, T
  double squares = 0, bias_squares = 0;                                    // |G|^2, |g|^2

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
    u = transposed(ku, n, out);
    projected.resize(n * kv);
    above.assign(count * ku * p, T(0));
    std::vector<double> sums(count, 0.0);
    for_blocks(n, p, [&](int64_t b, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i += kGroup) {
        const int64_t rows = std::min(kGroup, end - i);
        const T* x = gradient + i * p;
        sums[b] += double(k.dot(rows * p, x, x));
        k.products(rows, p, x, kv, in, projected.data() + i * kv, kv);
        T* sum = above.data() + b * ku * p;
        k.low_rank(ku, p, sum, rows, out + i, n, x, sum);
      }
    });
    squares = std::accumulate(sums.begin(), sums.end(), 0.0);
    bias_squares = bias_gradient ? double(k.dot(n, bias_gradient, bias_gradient)) : 0;
    add_blocks(above, count, ku * p);
    above.resize(ku * p);
    if (bias_gradient) {
      std::vector<T> shift(kv), along(ku, T(0));  // a^T V, U^T g
      k.products(1, p, mean, kv, in, shift.data(), kv);
      k.low_rank(n, kv, projected.data(), 1, negative(n, bias_gradient).data(), 1, shift.data(), projected.data());
      k.products(ku, n, out, 1, bias_gradient, along.data(), 1);
      k.low_rank(ku, p, above.data(), 1, negative(ku, along.data()).data(), 1, mean, above.data());
    }
    right.resize(n * c);
    for (int64_t i = 0; i < n; ++i) {
      std::copy_n(projected.data() + i * kv, kv, right.data() + i * c);
      if (bias_gradient) right[i * c + kv] = bias_gradient[i];
    }
    corner.assign(ku * c, T(0));
    k.low_rank(ku, c, corner.data(), n, out, n, right.data(), corner.data());
    if (size.right())
      k.low_rank(n, c, right.data(), ku, negative(n * ku, u.data()).data(), ku, corner.data(), right.data());
    if (size.top()) {  // U^T G' - C V^T, without the bias' column
      std::vector<T> minus(ku * kv);
      for (int64_t q = 0; q < ku; ++q)
        for (int64_t s = 0; s < kv; ++s) minus[q * kv + s] = -corner[q * c + s];
      top.resize(ku * p);
      k.low_rank(ku, p, above.data(), kv, minus.data(), kv, in, top.data());
    }
  }

  std::vector<T> negative(int64_t n_, const T* x) const {
    std::vector<T> minus(n_);
    std::transform(x, x + n_, minus.begin(), [](T value) { return -value; });
    return minus;
  }

  // E = G + l r: l [n, w], r [w, p], with w = (1 with a bias) + kv + ku.
  struct LowRank {
    int64_t width;
    std::vector<T> l, r;
  };
  LowRank residual() const {
    const int64_t n = size.n, p = size.p, ku = size.ku, kv = size.kv;
    LowRank f{size.c() + ku, {}, {}};
    f.l.resize(n * f.width);
    for (int64_t i = 0; i < n; ++i) {
      T* l = f.l.data() + i * f.width;
      if (size.bias) *l++ = -bias_gradient[i];
      for (int64_t s = 0; s < kv; ++s) *l++ = -projected[i * kv + s];
      for (int64_t q = 0; q < ku; ++q) *l++ = -u[i * ku + q];
    }
    f.r.reserve(f.width * p);
    if (size.bias) f.r.insert(f.r.end(), mean, mean + p);
    f.r.insert(f.r.end(), in, in + kv * p);
    f.r.insert(f.r.end(), top.begin(), top.end());
    return f;
  }

  // S = N_E + l r and y [n] from parts of N: w = ku + kv. nv = N_E V [n, kv] and nu = U^T N_E [ku, p], null without
  // N_E.
  LowRank whole(const T* c_part, const T* r_part, const T* t_part, const T* nv, const T* nu, std::vector<T>& y) const {
    const int64_t n = size.n, p = size.p, ku = size.ku, kv = size.kv, c = size.c();
    const bool bias = size.bias;
    // Inside the bases' span of the outputs: N_C - U^T N_R + (U^T N_E V, 0).
    std::vector<T> inside(c_part, c_part + ku * c);
    if (size.right()) {
      std::vector<T> minus(ku * c, T(0));
      k.low_rank(ku, c, minus.data(), n, out, n, r_part, minus.data());
      for (int64_t i = 0; i < ku * c; ++i) inside[i] -= minus[i];
    }
    if (nu) {
      std::vector<T> both(ku * kv);
      k.products(ku, p, nu, kv, in, both.data(), kv);
      for (int64_t q = 0; q < ku; ++q)
        for (int64_t s = 0; s < kv; ++s) inside[q * c + s] += both[q * kv + s];
    }
    std::vector<T> x(n * c);  // N_R + U inside
    k.low_rank(n, c, size.right() ? r_part : nullptr, ku, u.data(), ku, inside.data(), x.data());
    LowRank f{ku + kv, std::vector<T>(n * (ku + kv)), std::vector<T>((ku + kv) * p, T(0))};
    y.assign(bias ? n : 0, T(0));
    for (int64_t i = 0; i < n; ++i) {
      T* l = f.l.data() + i * f.width;
      for (int64_t q = 0; q < ku; ++q) *l++ = u[i * ku + q];
      for (int64_t s = 0; s < kv; ++s) *l++ = x[i * c + s] - (nv ? nv[i * kv + s] : T(0));
      if (bias) y[i] = x[i * c + kv];
    }
    if (size.top()) {  // N_T (I - V V^T) - U^T N_E
      std::vector<T> both(ku * kv);
      k.products(ku, p, t_part, kv, in, both.data(), kv);
      for (T& value : both) value = -value;
      k.low_rank(ku, p, t_part, kv, both.data(), kv, in, f.r.data());
      if (nu)
        for (int64_t i = 0; i < ku * p; ++i) f.r[i] -= nu[i];
    }
    std::copy_n(in, kv * p, f.r.data() + ku * p);
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
    std::vector<T> sums(blocks * size, T(0));
    const T *x = h.const_data_ptr<T>(), *directions = optional_data<T>(v), *minus = optional_data<T>(c);
    for_blocks(m, p, [&](int64_t b, int64_t begin, int64_t end) {
      std::vector<T> row(kGroup * p), coordinates(kGroup * (k + 1), T(1));  // the last coordinate, 1, sums the rows
      for (int64_t i = begin; i < end; i += kGroup) {
        const int64_t rows = std::min(kGroup, end - i);
        const T* shifted = minus ? row.data() : x + i * p;
        for (int64_t r = 0; minus && r < rows; ++r)
          loops.combine(p, T(1), x + (i + r) * p, T(-1), minus, row.data() + r * p);
        loops.products(rows, p, shifted, k, directions, coordinates.data(), k + 1);
        const std::vector<T> turned = transposed(rows, k + 1, coordinates.data());
        T* sum = sums.data() + b * size;
        loops.low_rank(k + 1, p, sum, rows, turned.data(), rows, shifted, sum);
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
void orthonormalize(int64_t k, int64_t n, T* x, T* lengths) {
  const Kernels<T>& loops = kernels<T>();
  const T tolerance = 16 * std::numeric_limits<T>::epsilon();
  std::vector<T> along(k);
  const auto length = [&](const T* row) { return T(std::sqrt(loops.dot(n, row, row))); };
  T largest = 0;
  for (int64_t q = 0; q < k; ++q) largest = std::max(largest, length(x + q * n));
  for (int64_t q = 0; q < k; ++q) {
    T* row = x + q * n;
    const auto strip = [&] {
      loops.products(1, n, row, q, x, along.data(), q);
      for (int64_t s = 0; s < q; ++s) along[s] = -along[s];
      loops.low_rank(1, n, row, q, along.data(), q, x, row);
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
void renew_side(int64_t k, int64_t n, T share, std::vector<T>& product, T* basis, T* scale) {
  for (int64_t q = 0; q < k; ++q)
    kernels<T>().combine(n, (1 - share) * scale[q], basis + q * n, share, product.data() + q * n,
                         product.data() + q * n);
  orthonormalize(k, n, product.data(), scale);
  std::copy(product.begin(), product.end(), basis);
}

// The first moments in new bases: C <- A C B, R <- R B, T <- A T with A = U'^T U and B = V^T V', but for the bias'
// column. E stays: what turns into the bases, or out of them, is little from one renewal to the next.
template <typename T>
void turn(const EigenSizes& size, const T* old_out, const T* old_in, const T* out, const T* in, T* first) {
  const Kernels<T>& loops = kernels<T>();
  const int64_t n = size.n, p = size.p, ku = size.ku, kv = size.kv, c = size.c();
  std::vector<T> a(ku * ku), b(c * c, T(0));
  loops.products(ku, n, out, ku, old_out, a.data(), ku);
  loops.products(kv, p, old_in, kv, in, b.data(), c);
  if (size.bias) b[c * c - 1] = 1;
  const auto product = [&](int64_t rows, int64_t inner, int64_t columns, const T* x, const T* y) {
    std::vector<T> result(rows * columns);
    loops.low_rank(rows, columns, nullptr, inner, x, inner, y, result.data());
    return result;
  };
  T *right = first + size.corner(), *top = right + size.right();
  const std::vector<T> corner = product(ku, c, c, product(ku, ku, c, a.data(), first).data(), b.data());
  std::copy(corner.begin(), corner.end(), first);
  if (size.right()) {
    const std::vector<T> turned = product(n, c, c, right, b.data());
    std::copy(turned.begin(), turned.end(), right);
  }
  if (size.top()) {
    const std::vector<T> turned = product(ku, ku, p, a.data(), top);
    std::copy(turned.begin(), turned.end(), top);
  }
}

template <typename T>
void renew(Matrix<T>& matrix, T* mean, T* basis_out, T* basis_in, T* scale_out, T* scale_in, T* first, const T* sketch,
           int64_t rows, const T* hessian, T share) {
  const Kernels<T>& loops = kernels<T>();
  const int64_t n = matrix.size.n, p = matrix.size.p, ku = matrix.size.ku, kv = matrix.size.kv;
  const bool bias = matrix.size.bias;
  const std::vector<T> old_out(basis_out, basis_out + ku * n), old_in(basis_in, basis_in + kv * p);
  std::vector<T> inputs(kv * p, T(0)), outputs(ku * n, T(0));
  if (rows) {
    // sum (x - d)(x - d)^T V = sum x x^T V - (sum x)(d^T V) - d (sum x)^T V + rows d (d^T V), d the mean's move
    const T *sum = sketch + kv * p, count = T(rows);
    std::vector<T> move(p, T(0)), vd(kv), vx(kv);
    if (bias)
      for (int64_t j = 0; j < p; ++j) {
        move[j] = share * sum[j] / count;
        mean[j] += move[j];
      }
    loops.products(1, p, move.data(), kv, basis_in, vd.data(), kv);
    loops.products(1, p, sum, kv, basis_in, vx.data(), kv);
    for (int64_t q = 0; q < kv; ++q)
      for (int64_t j = 0; j < p; ++j)
        inputs[q * p + j] = (sketch[q * p + j] - vd[q] * sum[j] - vx[q] * move[j] + count * vd[q] * move[j]) / count;
  }
  // G'^T G' V, where no inputs were seen, and G' G'^T U, where there is no H, with the new mean.
  if (!rows || !hessian) matrix.project();
  if (!rows) {
    const std::vector<T> turned = transposed(n, kv, matrix.projected.data());
    loops.low_rank(kv, p, inputs.data(), n, turned.data(), n, matrix.gradient, inputs.data());
    if (bias) {  // less (g^T G' V)^T a^T
      std::vector<T> along(kv, T(0));
      loops.products(kv, n, turned.data(), 1, matrix.bias_gradient, along.data(), 1);
      loops.low_rank(kv, p, inputs.data(), 1, matrix.negative(kv, along.data()).data(), 1, mean, inputs.data());
    }
  }
  if (hessian) {
    loops.low_rank(ku, n, nullptr, n, basis_out, n, hessian, outputs.data());
  } else {
    std::vector<T> along(ku, T(0)), product(n * ku);  // G' (U^T G')^T
    loops.products(n, p, matrix.gradient, ku, matrix.above.data(), product.data(), ku);
    if (bias) {
      loops.products(1, p, mean, ku, matrix.above.data(), along.data(), ku);
      loops.low_rank(n, ku, product.data(), 1, matrix.negative(n, matrix.bias_gradient).data(), 1, along.data(),
                     product.data());
    }
    outputs = transposed(n, ku, product.data());
  }
  renew_side(kv, p, share, inputs, basis_in, scale_in);
  renew_side(ku, n, share, outputs, basis_out, scale_out);
  turn(matrix.size, old_out.data(), old_in.data(), basis_out, basis_in, first);
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
  std::vector<T> normed(rest);  // N's C, R, T
  int64_t at = 0;
  for (const auto& [part, elements] : {std::pair{&matrix.corner, size.corner()}, std::pair{&matrix.right, size.right()},
                                       std::pair{&matrix.top, size.top()}}) {
    if (!elements) continue;
    slopes[1] += double(loops.dot(elements, part->data(), state.last + at));
    slopes[0] +=
        double(loops.moments(elements, part->data(), rule, state.first + at, state.second + at, normed.data() + at));
    remember(elements, part->data(), normed.data() + at, state.last + at);
    at += elements;
  }

  at::Tensor memory;  // N's E
  T* residual = nullptr;
  std::vector<T> nv, nu;
  if (size.residual()) {
    memory = at::empty({n, p}, at::CppTypeToScalarType<T>::value);
    residual = memory.mutable_data_ptr<T>();
    nv.resize(n * kv);
    nu.assign(count * ku * p, T(0));
    std::vector<int64_t> sample(n, -1);  // which of the sampled rows a row is
    for (int64_t s = 0; s < state.sampled; ++s) sample[eigen_sampled_row(s, state.sampled, n)] = s;
    const double share = double(n) / double(state.sampled);
    const auto f = matrix.residual();
    std::vector<double> along(count, 0.0), along_last(count, 0.0);
    for_blocks(n, p, [&](int64_t b, int64_t begin, int64_t end) {
      std::vector<T> x(kGroup * p);
      for (int64_t i = begin; i < end; i += kGroup) {
        const int64_t rows = std::min(kGroup, end - i);
        loops.low_rank(rows, p, matrix.gradient + i * p, f.width, f.l.data() + i * f.width, f.width, f.r.data(),
                       x.data());
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t at_row = rest + (i + r) * p, s = sample[i + r];
          const T slope = loops.moments(p, x.data() + r * p, rule, state.first + at_row, state.second + at_row,
                                        residual + (i + r) * p);
          if (s < 0) continue;
          T* last = state.last + rest + s * p;
          along[b] += share * double(slope);
          along_last[b] += share * double(loops.dot(p, x.data() + r * p, last));
          remember(p, x.data() + r * p, residual + (i + r) * p, last);
        }
        loops.products(rows, p, residual + i * p, kv, matrix.in, nv.data() + i * kv, kv);
        T* sum = nu.data() + b * ku * p;
        loops.low_rank(ku, p, sum, rows, matrix.out + i, n, residual + i * p, sum);
      }
    });
    add_blocks(nu, count, ku * p);
    nu.resize(ku * p);
    slopes[0] = std::accumulate(along.begin(), along.end(), slopes[0]);
    slopes[1] = std::accumulate(along_last.begin(), along_last.end(), slopes[1]);
  }

  std::vector<T> y;
  const auto f =
      matrix.whole(normed.data(), normed.data() + size.corner(), normed.data() + size.corner() + size.right(),
                   residual ? nv.data() : nullptr, residual ? nu.data() : nullptr, y);
  const T keep = T(1 - rates.length * rates.lr * rates.decay), rate = T(rates.length * rates.lr);
  for_blocks(n, p, [&](int64_t, int64_t begin, int64_t end) {
    std::vector<T> s(kGroup * p);
    T shift[kGroup];
    for (int64_t i = begin; i < end; i += 4) {
      const int64_t rows = std::min<int64_t>(4, end - i);
      loops.low_rank(rows, p, residual ? residual + i * p : nullptr, f.width, f.l.data() + i * f.width, f.width,
                     f.r.data(), s.data());
      loops.descend(rows * p, keep, rate, matrix.gradient + i * p, s.data(), state.weight + i * p);
      if (!size.bias) continue;
      loops.products(rows, p, s.data(), 1, matrix.mean, shift, 1);
      for (int64_t r = 0; r < rows; ++r) y[i + r] -= shift[r];
    }
  });
  if (size.bias)
    loops.descend(n, T(1 - rates.length * rates.lr_bias * rates.decay_bias), T(rates.length * rates.lr_bias),
                  matrix.bias_gradient, y.data(), state.bias);
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
