// What EigenAdam's steps and renewals begin with: a matrix of the net, and its gradient in the parts of its bases.
//
// Skinny products run over groups of rows that stay in the caches, and over blocks of them, each with its own sums,
// which are added in order: the result does not depend on the number of threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "../eigen.h"
#include "../tensors.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace secondorder::cpu {

constexpr int64_t kGroup = 16;  // rows that stay in the caches from one product with them to the next

// Rows of a matrix [n, p] that one block has: small matrices are one block, others at most eight.
inline int64_t block_rows(int64_t n, int64_t p) {
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

// Whether a sum of squares is finite, with some room, in T.
template <typename T>
bool finite_square(double square) {
  return square < double(std::numeric_limits<T>::max()) / 4;
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
  bool finite() const { return finite_square<T>(squares) && finite_square<T>(bias_squares); }

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

  // S = N_E + l r and y [n] from parts of N: w = ku + kv. c_part [ku, c], r_part [n, c], t_part [ku, p]; nv = N_E V
  // [n, kv] and nu = U^T N_E [ku, p], null without N_E; y is null without a bias.
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

}  // namespace secondorder::cpu
