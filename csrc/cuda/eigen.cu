// EigenAdam, all matrices of a net in each launch. secondorder/ops/eigen.py has the mathematics, csrc/eigen.h the parts
// C, R, T, E of a gradient. Between kernels that go over whole matrices stand small ones over what has a side of a
// basis:
//
//   step     products    G' V, U^T G', |G|^2: one pass over G
//            parts, corner, sides    the parts but E; Adam's rule in them
//            residual    E, Adam's rule in it, N_E V, U^T N_E: one pass over G and the moments
//            whole, corner, sides    Q and Z of S = N_E + U Q + Z V^T
//            update      S, W, S a: one pass over N_E, G and W
//            finish      b, the size of gradients, the control of the step length
//   renewal  products, parts, products, candidates, orthonormal    new bases: two passes over G
//            curvature    of matrices with a bias Hessian: its product with U, in place of G's
//            overlaps, turns, moments    U'^T U and V^T V', which the first moments of C, R, T are turned by
//            finish      what was made in the workspace, to its place
//
// From the formulas of the specification, with B = N_E V and A = U^T N_E,
//
//   Q = N_T - A,   M = N_C - U^T (N_R - B) - N_T V,   Z = N_R - B + U M,
//
// where a bias' column of B and of N_T V is zero: the last column of Z is y.
//
// A pass cuts a matrix into strips of columns and chunks of rows, a block each, which leaves sums over its part; they
// are added up in order by whoever reads them. A gradient that is not finite sets a flag in the first launches, before
// anything is written, and the others return at once.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <type_traits>

#include "eigen.cuh"
#include "kernels.h"
#include "reduce.cuh"

namespace secondorder::cuda {
namespace {

// What a renewal adds to the mean at j.
template <typename T>
__device__ __forceinline__ T mean_change(const EigenRenewal<T>& in, int64_t j) {
  if (!in.grad_bias || !in.sketch) return T(0);
  return T(in.share) * in.sketch[in.sizes.kv * in.sizes.p + j] / T(in.rows);
}

// Which matrix the products are of, and with which vectors.
enum class Products {
  step,         // G' with the bases; |G|^2
  renewal,      // G' with the bases (V only without a sketch, U without a bias Hessian); whether G is finite
  iteration,    // G' with G' V and U^T G', likewise
  sketch,       // the shifted inputs with V
  sketch_sums,  // the shifted inputs with their coordinates along V and with 1
};

// Parallel over strips and chunks.
template <Products kProducts, typename M>
__global__ void __launch_bounds__(kStrip<Scalar<M>>, kTileBlocks)
    products_kernel(const Layers<M> __grid_constant__ layers, const Blocks __grid_constant__ division, int* refused) {
  using T = Scalar<M>;
  constexpr bool kSketch = kProducts == Products::sketch || kProducts == Products::sketch_sums;
  __shared__ Tile<T> tile;
  __shared__ double partial[1][kWarp];
  if (kProducts == Products::iteration && *refused) return;
  const Part<M> at(layers, division);
  const M& in = at.in;
  const EigenSizes& sizes = in.sizes;
  Vectors<T> left{in.basis_out, sizes.ku}, right{in.basis_in, sizes.kv};
  T centre = 0;  // the mean at the thread's column
  if constexpr (kSketch) {
    if (in.mean && at.inside) centre = in.mean[at.column];
    left = {at.work.right, kProducts == Products::sketch ? 0 : sizes.ku};
    if (kProducts == Products::sketch_sums) right.count = 0;
  } else {
    if (in.grad_bias && at.inside) centre = in.mean[at.column];
    if constexpr (kIsRenewal<M>) {
      if (in.grad_bias && at.inside) centre += mean_change(in, at.column);
      if (kProducts == Products::iteration) {
        left = {at.work.right, sizes.kv};
        right = {at.work.top, sizes.ku};
      }
      if (in.sketch) (kProducts == Products::iteration ? left : right).count = 0;
      if (in.bias_hessian) (kProducts == Products::iteration ? right : left).count = 0;
      if (kProducts == Products::iteration && left.count + right.count == 0) return;
    }
  }
  T* const row_sums = at.work.row_sums + at.strip * right.count * at.n;
  T* const column_sums = at.work.column_sums + at.chunk * left.count * at.p;
  double square[1] = {};
  bool finite = true;
  at.each_tile([&](const Frame& frame) {
    tile.fill(frame, [&](int row) {
      const T x = in.grad_weight[frame.place(row)];
      if (kProducts == Products::step) square[0] += double(x) * double(x);
      if (kProducts == Products::renewal) finite = finite && x - x == 0;
      if constexpr (kSketch) return x - centre;
      else return in.grad_bias ? x - in.grad_bias[frame.begin + row] * centre : x;
    });
    tile.column_products(frame, left, column_sums);
    tile.template row_products<kGroup>(frame, right, row_sums);
  });
  if constexpr (kProducts == Products::step) {
    block_sum(square, partial);
    if (threadIdx.x == 0) at.work.squares[at.block] = square[0];
  }
  if constexpr (kProducts == Products::renewal) {
    finite = __syncthreads_and(finite);
    if (threadIdx.x == 0 && !finite) atomicOr(refused, 1);
  }
}

// Adam's rule with the floor that the size of the gradients sets.
template <typename T>
__device__ __forceinline__ EigenMoments<T> rule(const EigenStep<T>& in, const Work<T>& work) {
  EigenMoments<T> moments = in.moments;
  moments.eps = T(double(moments.eps) * work.scalars[0] + kTiny<T>);
  return moments;
}

// N at one of the parts C, R, T, where `place` is in the flat tensors; adds to the slopes along this N and along the
// last.
template <typename T>
__device__ __forceinline__ T normed(const EigenStep<T>& in, const EigenMoments<T>& moments, int64_t place, T x,
                                    double (&slopes)[2]) {
  T m = in.first[place], v = in.second[place];
  const T result = moments.normed(x, m, v);
  in.first[place] = m;
  in.second[place] = v;
  slopes[0] += double(x) * double(result);
  slopes[1] += double(x) * double(in.last[place]);
  in.last[place] = result;
  return result;
}

// Stores a block's share of the slopes, in the place that is its own. Every thread must call it.
__device__ __forceinline__ void store_slopes(double (&slopes)[2], double (*partial)[kWarp], double* out) {
  block_sum(slopes, partial);
  if (threadIdx.x != 0) return;
  out[2 * int64_t(blockIdx.x)] = slopes[0];
  out[2 * int64_t(blockIdx.x) + 1] = slopes[1];
}

// E, Adam's rule in it, and the products of its N with the bases. Parallel over strips and chunks.
//   slopes [blocks, 2]
template <typename T>
__global__ void __launch_bounds__(kStrip<T>, kTileBlocks)
    residual_kernel(const Layers<EigenStep<T>> __grid_constant__ layers, const Blocks __grid_constant__ division,
                    const int* __restrict__ refused, double* slopes) {
  __shared__ Tile<T> tile;
  __shared__ double partial[2][kWarp];
  if (*refused) return;
  const Part<EigenStep<T>> at(layers, division);
  const EigenStep<T>& in = at.in;
  const EigenMoments<T> moments = rule(in, at.work);
  const int64_t n = at.n, rest = at.sizes.rest();
  const Vectors<T> u{in.basis_out, at.ku}, v{in.basis_in, at.kv};
  const T centre = in.grad_bias && at.inside ? in.mean[at.column] : T(0);
  // The next row that is a sample, and which.
  int64_t sample = ceil_div(at.begin * in.sampled, n);
  const auto sampled_row = [&] { return sample < in.sampled ? eigen_sampled_row(sample, in.sampled, n) : n; };
  int64_t next = sampled_row();
  const double weight = double(n) / double(in.sampled);
  double sums[2] = {};
  at.each_tile([&](const Frame& frame) {
    tile.fill(frame, [&](int row) {
      const T x = in.grad_weight[frame.place(row)];
      return in.grad_bias ? x - in.grad_bias[frame.begin + row] * centre : x;
    });
    tile.add(frame, T(-1), u, at.work.top, {at.work.right, at.kv}, in.basis_in);
    for (int row = 0; row < frame.rows; row += kBatch) {
      T first[kBatch], second[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const bool there = at.inside && row + b < frame.rows;
        first[b] = there ? in.first[rest + frame.place(row + b)] : T(0);
        second[b] = there ? in.second[rest + frame.place(row + b)] : T(0);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (row + b >= frame.rows) continue;
        const bool chosen = frame.begin + row + b == next;
        if (at.inside) {
          const int64_t place = frame.place(row + b);
          const T x = tile.own(row + b), result = moments.normed(x, first[b], second[b]);
          in.first[rest + place] = first[b];
          in.second[rest + place] = second[b];
          at.work.whole[place] = tile.own(row + b) = result;
          if (chosen) {
            T* const last = in.last + rest + sample * at.p + at.column;
            sums[0] += weight * double(x) * double(result);
            sums[1] += weight * double(x) * double(*last);
            *last = result;
          }
        }
        if (chosen) {
          ++sample;
          next = sampled_row();
        }
      }
    }
    tile.column_products(frame, u, at.work.column_sums + at.chunk * at.ku * at.p);
    tile.template row_products<kGroup>(frame, v, at.work.row_sums + at.strip * at.kv * n);
  });
  store_slopes(sums, partial, slopes);
}

// S where the gradient is not zero, W, and S a. Parallel over strips and chunks.
template <typename T>
__global__ void __launch_bounds__(kStrip<T>, kTileBlocks)
    update_kernel(const Layers<EigenStep<T>> __grid_constant__ layers, const Blocks __grid_constant__ division,
                  const int* __restrict__ refused) {
  __shared__ Tile<T> tile;
  if (*refused) return;
  const Part<EigenStep<T>> at(layers, division);
  const EigenStep<T>& in = at.in;
  const double rate = at.work.scalars[1] * in.lr;
  const T lr = T(rate), keep = T(1 - rate * in.decay);
  const bool residual = at.sizes.residual() > 0, top = at.sizes.top() > 0;
  at.each_tile([&](const Frame& frame) {
    tile.fill(frame, [&](int row) { return residual ? at.work.whole[frame.place(row)] : T(0); });
    tile.add(frame, T(1), {in.basis_out, top ? at.ku : 0}, at.work.new_top, {at.work.new_right, at.kv}, in.basis_in);
    for (int row = 0; row < frame.rows; row += kBatch) {
      T g[kBatch], w[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const bool there = at.inside && row + b < frame.rows;
        g[b] = there ? in.grad_weight[frame.place(row + b)] : T(0);
        w[b] = there ? in.weight[frame.place(row + b)] : T(0);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (!at.inside || row + b >= frame.rows) continue;
        const T s = g[b] == T(0) ? T(0) : tile.own(row + b);
        tile.own(row + b) = s;
        in.weight[frame.place(row + b)] = keep * w[b] - lr * s;
      }
    }
    if (in.bias) tile.template row_products<1>(frame, {in.mean, 1}, at.work.row_sums + at.strip * at.n);
  });
}

// out[q, r] = sum over the slice of left[q, .] right[r, .] for r < count, else 0, a warp for each.
//   left [ku, size], right [count, size], out [ku, c]
template <typename T>
__device__ __forceinline__ void slice_products(const Slice& slice, int64_t size, const T* left, int64_t ku,
                                               const T* right, int64_t count, int64_t c, T* out) {
  for (int64_t pair = threadIdx.x / kWarp; pair < ku * c; pair += kThreads / kWarp) {
    const int64_t q = pair / c, r = pair % c;
    T sum = 0;
    if (r < count)
      for (int64_t i = slice.begin + threadIdx.x % kWarp; i < slice.end; i += kWarp)
        sum += left[q * size + i] * right[r * size + i];
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) out[pair] = sum;
  }
}

// What parts_kernel makes of products.
enum class Parts {
  step,     // of the gradient; and the step's scalars, and whether it is refused
  renewal,  // of the gradient; and what else of a renewal must be finite
  sketch,   // of the inputs
};

// X, U^T G', and the slices' shares of C = U^T X. Parallel over slices of rows and of columns, and one block more.
template <Parts kParts, typename M>
__global__ void __launch_bounds__(kThreads, kBlocks)
    parts_kernel(const Layers<M> __grid_constant__ layers, const Blocks __grid_constant__ division,
                 const double* control, int* refused) {
  using T = Scalar<M>;
  __shared__ double partial[2][kWarp];
  const Here<M> at(layers, division);
  const M& in = at.in;
  const EigenSizes& sizes = in.sizes;
  const Work<T>& work = at.work;
  const int64_t n = at.n, p = at.p, ku = at.ku;
  const Slice slice(sizes, at.block);
  int64_t kv = at.kv;
  if constexpr (kParts == Parts::renewal)
    if (in.sketch) kv = 0;  // no G' V was made
  bool finite = true;
  if (slice.rows) {
    slice.each(kv, [&](int64_t v, int64_t i) {
      work.right[v * n + i] = ordered_sum(work.row_sums + v * n + i, at.strips, kv * n);
    });
    if (sizes.bias)
      slice.each(1, [&](int64_t, int64_t i) {
        const T g = kParts == Parts::sketch ? T(1) : in.grad_bias[i];
        work.right[sizes.kv * n + i] = g;
        finite = finite && g - g == 0;
      });
    if constexpr (kParts == Parts::step) {
      __syncthreads();
      slice_products(slice, n, in.basis_out, ku, work.right, at.c, at.c, work.corner_sums + slice.index * ku * at.c);
    }
  } else if (slice.columns) {
    bool above = kParts != Parts::sketch;
    if constexpr (kParts == Parts::renewal) above = !in.bias_hessian;  // else no U^T G' was made
    if (above)
      slice.each(ku, [&](int64_t q, int64_t j) {
        work.top[q * p + j] = ordered_sum(work.column_sums + q * p + j, at.chunks, ku * p);
      });
    if constexpr (kParts == Parts::renewal)
      if (in.sketch)
        slice.each(sizes.kv + 1, [&](int64_t v, int64_t j) {
          const T x = in.sketch[v * p + j];
          finite = finite && x - x == 0;
        });
  } else if constexpr (kParts == Parts::step) {
    double squares[2] = {};  // of G and of g
    for (int64_t k = threadIdx.x; k < at.strips * at.chunks; k += kThreads) squares[0] += work.squares[k];
    if (in.grad_bias)
      for (int64_t i = threadIdx.x; i < n; i += kThreads)
        squares[1] += double(in.grad_bias[i]) * double(in.grad_bias[i]);
    block_sum(squares, partial);
    if (threadIdx.x == 0) {
      const double size = std::sqrt(squares[0] / (double(n) * double(p)));
      work.scalars[0] = size > *in.size ? size : *in.size;
      work.scalars[1] = eigen_length(control);
      // A NaN is not below the limit either.
      if (!(squares[0] < kLargest<T> / 4 && squares[1] < kLargest<T> / 4) || control[kEigenUnrenewed] != 0)
        atomicOr(refused, 1);
    }
  } else if constexpr (kParts == Parts::renewal) {
    if (in.sketch)
      for (int64_t v = threadIdx.x / kWarp; v < sizes.kv; v += kThreads / kWarp) {
        double sum = 0;
        for (int64_t j = threadIdx.x % kWarp; j < p; j += kWarp)
          sum += double(in.basis_in[v * p + j]) * double(in.sketch[sizes.kv * p + j]);
        sum = warp_sum(sum);
        if (threadIdx.x % kWarp == 0) work.along[v] = sum;
      }
  }
  if constexpr (kParts == Parts::renewal) {
    finite = __syncthreads_and(finite);
    if (threadIdx.x == 0 && !finite) atomicOr(refused, 1);
  }
}

// N_R - B, N_T - A, and the slices' shares of U^T (N_R - B) and N_T V. Parallel over slices of rows and of columns.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    whole_parts_kernel(const Layers<EigenStep<T>> __grid_constant__ layers, const Blocks __grid_constant__ division,
                       const int* __restrict__ refused) {
  if (*refused) return;
  const Here<EigenStep<T>> at(layers, division);
  const EigenStep<T>& in = at.in;
  const EigenSizes& sizes = in.sizes;
  const Work<T>& work = at.work;
  const int64_t n = at.n, p = at.p, ku = at.ku, kv = at.kv, c = at.c;
  const bool residual = sizes.residual() > 0;
  const Slice slice(sizes, at.block);
  T* const corner_sums = work.corner_sums + slice.index * ku * c;
  if (slice.rows && sizes.right() > 0) {
    slice.each(c, [&](int64_t v, int64_t i) {
      T x = work.new_right[v * n + i];
      if (residual && v < kv) x -= ordered_sum(work.row_sums + v * n + i, at.strips, kv * n);
      work.new_right[v * n + i] = x;
    });
    __syncthreads();
    slice_products(slice, n, in.basis_out, ku, work.new_right, c, c, corner_sums);
  } else if (slice.columns && sizes.top() > 0) {
    slice_products(slice, p, work.new_top, ku, in.basis_in, kv, c, corner_sums);
    __syncthreads();
    if (residual)
      slice.each(ku, [&](int64_t q, int64_t j) {
        work.new_top[q * p + j] -= ordered_sum(work.column_sums + q * p + j, at.chunks, ku * p);
      });
  }
}

// What has a side of a basis, element by element: C, or M with kWhole. Parallel over the elements.
//   slopes [blocks, 2]: a step's, without kWhole
template <bool kWhole, typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    corner_kernel(const Layers<EigenStep<T>> __grid_constant__ layers, const Blocks __grid_constant__ division,
                  const int* __restrict__ refused, double* slopes) {
  __shared__ double partial[2][kWarp];
  if (*refused) return;
  const Here<EigenStep<T>> at(layers, division);
  const EigenStep<T>& in = at.in;
  const EigenSizes& sizes = in.sizes;
  const Work<T>& work = at.work;
  const int64_t k = at.block * kThreads + threadIdx.x, size = sizes.corner();
  const int64_t row_slices = slices(sizes.n), column_slices = slices(sizes.p);
  double sums[2] = {};
  if (k < size) {
    const T* const shares = work.corner_sums + k;
    if constexpr (kWhole) {
      T m = work.new_corner[k];
      if (sizes.right() > 0) m -= ordered_sum(shares, row_slices, size);
      if (sizes.top() > 0) m -= ordered_sum(shares + row_slices * size, column_slices, size);
      work.corner[k] = m;
    } else {
      const T x = ordered_sum(shares, row_slices, size);
      work.corner[k] = x;
      work.new_corner[k] = normed(in, rule(in, work), k, x, sums);
    }
  }
  if constexpr (!kWhole) store_slopes(sums, partial, slopes);
}

// R and T from C; or Z from M with kWhole. Parallel over the elements of R and of T, a thread each.
//   slopes [blocks, 2]: a step's, without kWhole
template <bool kWhole, typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sides_kernel(const Layers<EigenStep<T>> __grid_constant__ layers, const Blocks __grid_constant__ division,
                 const int* __restrict__ refused, double* slopes) {
  __shared__ double partial[2][kWarp];
  if (*refused) return;
  const Here<EigenStep<T>> at(layers, division);
  const EigenStep<T>& in = at.in;
  const EigenSizes& sizes = in.sizes;
  const Work<T>& work = at.work;
  const int64_t n = at.n, p = at.p, ku = at.ku, kv = at.kv, c = at.c;
  const int64_t block = at.block, right_blocks = ceil_div<int64_t>(n * c, kThreads);
  double sums[2] = {};
  if (block < right_blocks) {
    // By rows of R, as the moments have it.
    const int64_t k = block * kThreads + threadIdx.x, i = k / c, v = k % c;
    if (k < n * c && (kWhole || sizes.right() > 0)) {
      T change = 0;
      for (int64_t q = 0; q < ku; ++q) change += in.basis_out[q * n + i] * work.corner[q * c + v];
      if constexpr (kWhole) {
        T& z = work.new_right[v * n + i];
        z = (sizes.right() > 0 ? z : T(0)) + change;
      } else {
        const T x = work.right[v * n + i] - change;
        work.right[v * n + i] = x;
        work.new_right[v * n + i] = normed(in, rule(in, work), sizes.corner() + k, x, sums);
      }
    }
  } else if (!kWhole && sizes.top() > 0) {
    const int64_t k = (block - right_blocks) * kThreads + threadIdx.x, q = k / p, j = k % p;
    if (k < ku * p) {
      T x = work.top[k];
      for (int64_t v = 0; v < kv; ++v) x -= work.corner[q * c + v] * in.basis_in[v * p + j];
      work.new_top[k] = normed(in, rule(in, work), sizes.corner() + sizes.right() + k, x, sums);
    }
  }
  if constexpr (!kWhole) store_slopes(sums, partial, slopes);
}

// b and the size of gradients; and by the block beyond all matrices', where the launch has one, the control of the step
// length from `count` slopes. Parallel over the rows of every matrix, a thread each.
//   slopes [count, 2]
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    finish_step_kernel(const Layers<EigenStep<T>> __grid_constant__ layers, const Blocks __grid_constant__ division,
                       const int* __restrict__ refused, const double* __restrict__ slopes, int64_t count, bool renewed,
                       double* control) {
  __shared__ double partial[2][kWarp];
  if (blockIdx.x == division.first[layers.count]) {
    const bool refuse = *refused || control[kEigenUnrenewed] != 0;
    double sums[2] = {};
    for (int64_t k = threadIdx.x; k < count; k += kThreads) {
      sums[0] += slopes[2 * k];
      sums[1] += slopes[2 * k + 1];
    }
    block_sum(sums, partial);
    if (threadIdx.x != 0) return;
    if (refuse) {
      control[kEigenRefused] += 1;
      control[kEigenUnrenewed] = 0;
    } else {
      eigen_control(control, sums[0], sums[1], renewed);
    }
    return;
  }
  if (*refused) return;
  const Here<EigenStep<T>> at(layers, division);
  const EigenStep<T>& in = at.in;
  const Work<T>& work = at.work;
  const int64_t i = at.block * kThreads + threadIdx.x, n = at.n;
  if (i == 0) *in.size = work.scalars[0];
  if (!in.bias || i >= n) return;
  const double rate = work.scalars[1] * in.lr_bias;
  const T keep = T(1 - rate * in.decay_bias);
  T step = 0;
  if (in.grad_bias[i] != T(0)) step = work.new_right[at.kv * n + i] - ordered_sum(work.row_sums + i, at.strips, n);
  in.bias[i] = keep * in.bias[i] - T(rate) * step;
}

// H U where there is a bias Hessian H, and whether it is finite: a warp for each of its rows.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    curvature_kernel(const Layers<EigenRenewal<T>> __grid_constant__ layers, const Blocks __grid_constant__ division,
                     int* refused) {
  const Here<EigenRenewal<T>> at(layers, division);
  const int64_t n = at.n, i = at.block * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (i >= n) return;
  const T *const row = at.in.bias_hessian + i * n, *const basis = at.in.basis_out;
  const int lane = threadIdx.x % kWarp;
  bool finite = true;
  for (int64_t group = 0; group == 0 || group < at.ku; group += kGroup) {
    T sums[kGroup] = {};
    for (int64_t j = lane; j < n; j += kWarp) {
      const T x = row[j];
      finite = finite && x - x == 0;
#pragma unroll
      for (int e = 0; e < kGroup; ++e)
        if (group + e < at.ku) sums[e] += x * basis[(group + e) * n + j];
    }
#pragma unroll
    for (int e = 0; e < kGroup; ++e) {
      const T sum = warp_sum(sums[e]);
      if (lane == 0 && group + e < at.ku) at.work.next_out[(group + e) * n + i] = sum;
    }
  }
  if (!finite) atomicOr(refused, 1);
}

// (1 - w) S V + w M V of both sides, by vectors. Parallel over slices of rows and of columns.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    candidates_kernel(const Layers<EigenRenewal<T>> __grid_constant__ layers, const Blocks __grid_constant__ division,
                      const int* __restrict__ refused) {
  if (*refused) return;
  const Here<EigenRenewal<T>> at(layers, division);
  const EigenRenewal<T>& in = at.in;
  const Work<T>& work = at.work;
  const int64_t n = at.n, p = at.p, ku = at.ku, kv = at.kv;
  const T w = T(in.share), old = T(1 - in.share);
  const Slice slice(at.sizes, at.block);
  if (slice.rows) {
    slice.each(ku, [&](int64_t q, int64_t i) {
      T& next = work.next_out[q * n + i];  // H U where there is an H
      const T product = in.bias_hessian ? next : ordered_sum(work.row_sums + q * n + i, at.strips, ku * n);
      next = old * in.scale_out[q] * in.basis_out[q * n + i] + w * product;
    });
  } else if (slice.columns) {
    slice.each(kv, [&](int64_t v, int64_t j) {
      T product;
      if (in.sketch) {
        // sum (x - move) (x - move)^T V from the sums over x
        const T move = mean_change(in, j), sum = in.sketch[kv * p + j], rows = T(in.rows);
        const T along = T(work.along[v]);
        const T moved = in.grad_bias ? T(in.share * work.along[v] / double(in.rows)) : T(0);  // V^T of the change
        product = (in.sketch[v * p + j] - moved * sum - along * move + rows * moved * move) / rows;
      } else {
        product = ordered_sum(work.column_sums + v * p + j, at.chunks, kv * p);
      }
      work.next_in[v * p + j] = old * in.scale_in[v] * in.basis_in[v * p + j] + w * product;
    });
  }
}

// f(i) for i < n, shared among a side's threads: an element is one thread's throughout.
template <typename F>
__device__ __forceinline__ void each_element(int64_t n, F&& f) {
  for (int64_t i = threadIdx.x; i < n; i += kSideThreads) f(i);
}

// |row|, squares in double: those of a float may leave its range.   row [n]
template <typename T>
__device__ __forceinline__ double norm(int64_t n, const T* row, double (*partial)[kWarp]) {
  double square[1] = {};
  each_element(n, [&](int64_t i) { square[0] += double(row[i]) * double(row[i]); });
  block_sum(square, partial);
  return std::sqrt(square[0]);
}

// row -= its projection on the q rows of the basis, kGroup at a time.   basis [q, n], row [n]
template <typename T>
__device__ __forceinline__ void strip(int64_t n, int64_t q, const T* basis, T* row, double (*partial)[kWarp]) {
  for (int64_t group = 0; group < q; group += kGroup) {
    T sums[kGroup] = {};
    each_element(n, [&](int64_t i) {
      const T x = row[i];
#pragma unroll
      for (int e = 0; e < kGroup; ++e)
        if (group + e < q) sums[e] += x * basis[(group + e) * n + i];
    });
    double along[kGroup];
#pragma unroll
    for (int e = 0; e < kGroup; ++e) along[e] = double(sums[e]);
    block_sum(along, partial);
    each_element(n, [&](int64_t i) {
      T x = row[i];
#pragma unroll
      for (int e = 0; e < kGroup; ++e)
        if (group + e < q) x -= T(along[e]) * basis[(group + e) * n + i];
      row[i] = x;
    });
  }
}

// Rows made orthonormal in their order, with their lengths before; one that depends on those before it is drawn anew.
// Parallel over both sides of every matrix, a block each.
template <typename T>
__global__ void __launch_bounds__(kSideThreads, 1)
    orthonormal_kernel(const Layers<EigenRenewal<T>> __grid_constant__ layers, const int* __restrict__ refused) {
  __shared__ double partial[kGroup][kWarp];
  if (*refused) return;
  const Here<EigenRenewal<T>> at(layers.layer[blockIdx.x / 2], 0);
  const bool out = blockIdx.x % 2 == 0;
  const int64_t n = out ? at.n : at.p, k = out ? at.ku : at.kv;
  T* const basis = out ? at.work.next_out : at.work.next_in;
  T* const lengths = out ? at.work.length_out : at.work.length_in;
  constexpr double kTolerance = 16 * kRounding<T>;
  double largest = 0;
  for (int64_t q = 0; q < k; ++q) largest = std::fmax(largest, norm(n, basis + q * n, partial));
  for (int64_t q = 0; q < k; ++q) {
    T* const row = basis + q * n;
    const double start = norm(n, row, partial);
    strip(n, q, basis, row, partial);
    double length = norm(n, row, partial);
    const bool kept = length > kTolerance * start && length > kTolerance * largest;
    if (threadIdx.x == 0) lengths[q] = kept ? T(length) : T(0);
    if (!kept) {
      each_element(n, [&](int64_t i) { row[i] = T(eigen_refill(i, q)); });
      strip(n, q, basis, row, partial);
      length = norm(n, row, partial);
    }
    for (int pass = 0; pass < 2; ++pass) {
      const double inverse = 1 / length;
      each_element(n, [&](int64_t i) { row[i] = T(double(row[i]) * inverse); });
      if (pass == 1) break;
      strip(n, q, basis, row, partial);
      length = norm(n, row, partial);
    }
  }
}

// The slices' shares of U'^T U [ku, ku] and of V^T V' [kv, kv]. Parallel over slices of rows and of columns.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    overlaps_kernel(const Layers<EigenRenewal<T>> __grid_constant__ layers, const Blocks __grid_constant__ division,
                    const int* __restrict__ refused) {
  if (*refused) return;
  const Here<EigenRenewal<T>> at(layers, division);
  const Slice slice(at.sizes, at.block);
  const int64_t ku = at.ku, kv = at.kv, row_slices = slices(at.n);
  if (slice.rows) {
    T* const out = at.work.overlaps + slice.index * ku * ku;
    slice_products(slice, at.n, at.work.next_out, ku, at.in.basis_out, ku, ku, out);
  } else if (slice.columns) {
    T* const out = at.work.overlaps + row_slices * ku * ku + (slice.index - row_slices) * kv * kv;
    slice_products(slice, at.p, at.in.basis_in, kv, at.work.next_in, kv, kv, out);
  }
}

// A = U'^T U and B = V^T V'. Parallel over their elements.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    turns_kernel(const Layers<EigenRenewal<T>> __grid_constant__ layers, const Blocks __grid_constant__ division,
                 const int* __restrict__ refused) {
  if (*refused) return;
  const Here<EigenRenewal<T>> at(layers, division);
  const int64_t k = at.block * kThreads + threadIdx.x, outs = at.ku * at.ku, ins = at.kv * at.kv;
  const int64_t row_slices = slices(at.n);
  if (k < outs) {
    at.work.turn_out[k] = ordered_sum(at.work.overlaps + k, row_slices, outs);
  } else if (k < outs + ins) {
    const T* const shares = at.work.overlaps + row_slices * outs + (k - outs);
    at.work.turn_in[k - outs] = ordered_sum(shares, slices(at.p), ins);
  }
}

// The first moments A C B, R B and A T, where B leaves a bias' column as it is; E's stay. Parallel over their elements.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    moments_kernel(const Layers<EigenRenewal<T>> __grid_constant__ layers, const Blocks __grid_constant__ division,
                   const int* __restrict__ refused) {
  if (*refused) return;
  const Here<EigenRenewal<T>> at(layers, division);
  const EigenSizes& sizes = at.sizes;
  const int64_t ku = at.ku, kv = at.kv, c = at.c, p = at.p;
  const T *const a = at.work.turn_out, *const b = at.work.turn_in, *const corner = at.in.first;
  const T *const right = corner + sizes.corner(), *const top = right + sizes.right();
  const auto row_turned = [&](const T* row, int64_t v) {  // (row B)_v   row [c]
    if (v == kv) return row[v];
    T sum = 0;
    for (int64_t w = 0; w < kv; ++w) sum += row[w] * b[w * kv + v];
    return sum;
  };
  const int64_t k = at.block * kThreads + threadIdx.x;
  if (k >= sizes.rest()) return;
  T sum = 0;
  if (k < sizes.corner()) {
    for (int64_t q = 0; q < ku; ++q) sum += a[k / c * ku + q] * row_turned(corner + q * c, k % c);
  } else if (k < sizes.corner() + sizes.right()) {
    const int64_t i = (k - sizes.corner()) / c, v = (k - sizes.corner()) % c;
    sum = row_turned(right + i * c, v);
  } else {
    const int64_t q = (k - sizes.corner() - sizes.right()) / p, j = (k - sizes.corner() - sizes.right()) % p;
    for (int64_t r = 0; r < ku; ++r) sum += a[q * ku + r] * top[r * p + j];
  }
  at.work.turned[k] = sum;
}

// The new mean, bases, scales and moments to their places; or a word in `control` that the renewal was refused.
// Parallel over the elements of every matrix.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    finish_renewal_kernel(const Layers<EigenRenewal<T>> __grid_constant__ layers,
                          const Blocks __grid_constant__ division, const int* __restrict__ refused, double* control) {
  if (*refused) {
    if (blockIdx.x == 0 && threadIdx.x == 0) control[kEigenUnrenewed] = 1;
    return;
  }
  const Here<EigenRenewal<T>> at(layers, division);
  const EigenRenewal<T>& in = at.in;
  const EigenSizes& sizes = in.sizes;
  const Work<T>& work = at.work;
  int64_t k = at.block * kThreads + threadIdx.x;
  if (in.grad_bias && k < sizes.p) in.new_mean[k] += mean_change(in, k);
  const auto copy = [&](const T* from, T* to, int64_t size) {
    if (k >= 0 && k < size) to[k] = from[k];
    k -= size;
  };
  k -= sizes.p;
  copy(work.next_out, in.new_out, sizes.ku * sizes.n);
  copy(work.next_in, in.new_in, sizes.kv * sizes.p);
  copy(work.length_out, in.scale_out, sizes.ku);
  copy(work.length_in, in.scale_in, sizes.kv);
  copy(work.turned, in.first, sizes.rest());
}

// sketch += the sums over all chunks. Parallel over slices of columns.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sketch_kernel(const Layers<SketchMatrix<T>> __grid_constant__ layers) {
  const Here<SketchMatrix<T>> at(layers.layer[0], 0);
  const Slice slice(at.sizes, slices(at.n) + blockIdx.x);
  slice.each(at.ku, [&](int64_t v, int64_t j) {
    at.in.sketch[v * at.p + j] += ordered_sum(at.work.column_sums + v * at.p + j, at.chunks, at.ku * at.p);
  });
}

// One launch's matrices, and how each kernel's blocks are divided among them.
template <typename M>
struct Plan {
  Layers<M> layers;
  Blocks tiles, residuals, slices, corners, sides, curvatures, turns, moments, finish;
  int* refused;
  double* slopes;       // [., 2] of all launches
  int64_t first_slope;  // this one's
  int64_t slope_count;
  bool last;
};

template <typename M>
int64_t corner_blocks(const M& in) {
  return ceil_div<int64_t>(in.sizes.corner(), kThreads);
}

template <typename M>
int64_t side_blocks(const M& in) {
  return ceil_div<int64_t>(in.sizes.n * in.sizes.c(), kThreads) + ceil_div<int64_t>(in.sizes.ku * in.sizes.p, kThreads);
}

template <typename M>
int64_t tile_blocks(const M& in, int64_t chunk) {
  return strip_count<Scalar<M>>(in.sizes) * ceil_div(in.sizes.n, chunk);
}

template <typename M>
int64_t curvature_blocks(const M& in) {
  if constexpr (kIsRenewal<M>)
    if (in.bias_hessian) return ceil_div<int64_t>(in.sizes.n, kThreads / kWarp);
  return 0;
}

template <typename M>
int64_t turn_blocks(const M& in) {
  return ceil_div<int64_t>(in.sizes.ku * in.sizes.ku + in.sizes.kv * in.sizes.kv, kThreads);
}

template <typename M>
int64_t finish_blocks(const M& in) {
  const EigenSizes& sizes = in.sizes;
  if constexpr (kIsStep<M>) return in.bias ? ceil_div<int64_t>(sizes.n, kThreads) : 1;
  const int64_t elements = sizes.p + sizes.ku * (sizes.n + 1) + sizes.kv * (sizes.p + 1) + sizes.rest();
  return ceil_div<int64_t>(elements, kThreads);
}

// Calls f(plan) for every kLayersPerLaunch matrices, or once where there are none; returns the bytes of workspace,
// which may be null, to measure.
template <typename M, typename F>
size_t each_plan(const M* in, int count, void* workspace, const Device& device, F&& f) {
  static_assert(sizeof(Layers<M>) + sizeof(Blocks) + 64 <= 32764, "more than a kernel's parameters may take");
  // Chunks of one tile until the device is full, then of several: fewer sums.
  int64_t tiles = 0;
  for (int l = 0; l < count; ++l) tiles += tile_blocks(in[l], kTileRows);
  const int64_t many = tiles / (int64_t(kTilesPerUnit) * device.multiprocessors);
  const int64_t chunk = kTileRows * std::clamp<int64_t>(many, 1, kMostTiles);
  Plan<M> plan;
  plan.slope_count = 0;
  if constexpr (kIsStep<M>)
    for (int l = 0; l < count; ++l)
      plan.slope_count +=
          corner_blocks(in[l]) + side_blocks(in[l]) + (in[l].sizes.residual() > 0 ? tile_blocks(in[l], chunk) : 0);
  const uintptr_t base = reinterpret_cast<uintptr_t>(workspace);
  plan.refused = reinterpret_cast<int*>(base);
  plan.slopes = reinterpret_cast<double*>(base + 16);
  uintptr_t end = base + 16 + uintptr_t(plan.slope_count) * 2 * sizeof(double);
  plan.first_slope = 0;
  int begin = 0;
  do {
    plan.layers.count = std::min(kLayersPerLaunch, count - begin);
    for (int l = 0; l < plan.layers.count; ++l) {
      const M& matrix = in[begin + l];
      Work<Scalar<M>> work;
      plan.layers.layer[l] = {matrix, end, chunk};
      end += carve(matrix, chunk, end, work);
      const auto divide = [l](Blocks& blocks, int64_t count) {
        blocks.first[l + 1] = blocks.first[l] + unsigned(count);
      };
      divide(plan.tiles, tile_blocks(matrix, chunk));
      divide(plan.residuals, matrix.sizes.residual() > 0 ? tile_blocks(matrix, chunk) : 0);
      divide(plan.slices, slices(matrix.sizes.n) + slices(matrix.sizes.p) + 1);
      divide(plan.corners, corner_blocks(matrix));
      divide(plan.sides, side_blocks(matrix));
      divide(plan.curvatures, curvature_blocks(matrix));
      divide(plan.turns, turn_blocks(matrix));
      divide(plan.moments, ceil_div<int64_t>(matrix.sizes.rest(), kThreads));
      divide(plan.finish, finish_blocks(matrix));
    }
    begin += plan.layers.count;
    plan.last = begin >= count;
    f(plan);
    const int l = plan.layers.count;
    plan.first_slope += plan.corners.first[l] + plan.sides.first[l] + plan.residuals.first[l];
  } while (begin < count);
  return size_t(end - base);
}

// A launch of all blocks of a division, if there are any.
#define LAUNCH_DIVIDED(kernel, division, threads, ...)                 \
  if (const unsigned blocks_ = plan.division.first[plan.layers.count]) \
  LAUNCH(kernel, blocks_, threads, 0, stream, plan.layers, plan.division, __VA_ARGS__)

template <typename T>
SketchMatrix<T> matrix_of(const EigenSketch<T>& sketch) {
  SketchMatrix<T> matrix{};
  matrix.sizes = {sketch.m, sketch.p, sketch.k + 1, sketch.k, true};
  matrix.grad_weight = sketch.inputs;
  matrix.mean = sketch.shift;
  matrix.basis_in = sketch.basis;
  matrix.sketch = sketch.sketch;
  return matrix;
}

}  // namespace

template <typename T>
size_t eigen_sketch_workspace(const EigenSketch<T>& sketch, const Device& device) {
  const SketchMatrix<T> matrix = matrix_of(sketch);
  return each_plan(&matrix, 1, nullptr, device, [](const Plan<SketchMatrix<T>>&) {});
}

template <typename T>
size_t eigen_renew_workspace(const EigenRenewal<T>* matrices, int count, const Device& device) {
  return each_plan(matrices, count, nullptr, device, [](const Plan<EigenRenewal<T>>&) {});
}

template <typename T>
size_t eigen_step_workspace(const EigenStep<T>* matrices, int count, const Device& device) {
  return each_plan(matrices, count, nullptr, device, [](const Plan<EigenStep<T>>&) {});
}

template <typename T>
void eigen_sketch(const EigenSketch<T>& sketch, void* workspace, const Device& device, cudaStream_t stream) {
  using M = SketchMatrix<T>;
  const M matrix = matrix_of(sketch);
  each_plan(&matrix, 1, workspace, device, [&](const Plan<M>& plan) {
    LAUNCH_DIVIDED((products_kernel<Products::sketch, M>), tiles, kStrip<T>, nullptr);
    LAUNCH_DIVIDED((parts_kernel<Parts::sketch, M>), slices, kThreads, nullptr, nullptr);
    LAUNCH_DIVIDED((products_kernel<Products::sketch_sums, M>), tiles, kStrip<T>, nullptr);
    LAUNCH(sketch_kernel<T>, unsigned(slices(sketch.p)), kThreads, 0, stream, plan.layers);
  });
}

template <typename T>
void eigen_renew(const EigenRenewal<T>* matrices, int count, double* control, void* workspace, const Device& device,
                 cudaStream_t stream) {
  using M = EigenRenewal<T>;
  cudaMemsetAsync(workspace, 0, sizeof(int), stream);  // the flag comes first in the workspace
  each_plan(matrices, count, workspace, device, [&](const Plan<M>& plan) {
    LAUNCH_DIVIDED((products_kernel<Products::renewal, M>), tiles, kStrip<T>, plan.refused);
    LAUNCH_DIVIDED((parts_kernel<Parts::renewal, M>), slices, kThreads, nullptr, plan.refused);
    LAUNCH_DIVIDED(curvature_kernel<T>, curvatures, kThreads, plan.refused);
  });
  each_plan(matrices, count, workspace, device, [&](const Plan<M>& plan) {
    LAUNCH_DIVIDED((products_kernel<Products::iteration, M>), tiles, kStrip<T>, plan.refused);
    LAUNCH_DIVIDED(candidates_kernel<T>, slices, kThreads, plan.refused);
    LAUNCH(orthonormal_kernel<T>, 2 * plan.layers.count, kSideThreads, 0, stream, plan.layers, plan.refused);
    LAUNCH_DIVIDED(overlaps_kernel<T>, slices, kThreads, plan.refused);
    LAUNCH_DIVIDED(turns_kernel<T>, turns, kThreads, plan.refused);
    LAUNCH_DIVIDED(moments_kernel<T>, moments, kThreads, plan.refused);
    LAUNCH_DIVIDED(finish_renewal_kernel<T>, finish, kThreads, plan.refused, control);
  });
}

template <typename T>
void eigen_step(const EigenStep<T>* matrices, int count, double* control, bool renewed, void* workspace,
                const Device& device, cudaStream_t stream) {
  using M = EigenStep<T>;
  cudaMemsetAsync(workspace, 0, sizeof(int), stream);  // the flag comes first in the workspace
  each_plan(matrices, count, workspace, device, [&](const Plan<M>& plan) {
    LAUNCH_DIVIDED((products_kernel<Products::step, M>), tiles, kStrip<T>, plan.refused);
    LAUNCH_DIVIDED((parts_kernel<Parts::step, M>), slices, kThreads, control, plan.refused);
  });
  each_plan(matrices, count, workspace, device, [&](const Plan<M>& plan) {
    const int l = plan.layers.count;
    double* const corner_slopes = plan.slopes + 2 * plan.first_slope;
    double* const side_slopes = corner_slopes + 2 * int64_t(plan.corners.first[l]);
    double* const residual_slopes = side_slopes + 2 * int64_t(plan.sides.first[l]);
    LAUNCH_DIVIDED((corner_kernel<false, T>), corners, kThreads, plan.refused, corner_slopes);
    LAUNCH_DIVIDED((sides_kernel<false, T>), sides, kThreads, plan.refused, side_slopes);
    LAUNCH_DIVIDED(residual_kernel<T>, residuals, kStrip<T>, plan.refused, residual_slopes);
    LAUNCH_DIVIDED(whole_parts_kernel<T>, slices, kThreads, plan.refused);
    LAUNCH_DIVIDED((corner_kernel<true, T>), corners, kThreads, plan.refused, nullptr);
    LAUNCH_DIVIDED((sides_kernel<true, T>), sides, kThreads, plan.refused, nullptr);
    LAUNCH_DIVIDED(update_kernel<T>, tiles, kStrip<T>, plan.refused);
    LAUNCH(finish_step_kernel<T>, plan.finish.first[l] + (plan.last ? 1 : 0), kThreads, 0, stream, plan.layers,
           plan.finish, plan.refused, plan.slopes, plan.slope_count, renewed, control);
  });
}

#define INSTANTIATE(T)                                                                                 \
  template size_t eigen_sketch_workspace(const EigenSketch<T>&, const Device&);                        \
  template size_t eigen_renew_workspace(const EigenRenewal<T>*, int, const Device&);                   \
  template size_t eigen_step_workspace(const EigenStep<T>*, int, const Device&);                       \
  template void eigen_sketch(const EigenSketch<T>&, void*, const Device&, cudaStream_t);               \
  template void eigen_renew(const EigenRenewal<T>*, int, double*, void*, const Device&, cudaStream_t); \
  template void eigen_step(const EigenStep<T>*, int, double*, bool, void*, const Device&, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace secondorder::cuda
