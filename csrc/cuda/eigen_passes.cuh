// What the steps and renewals of EigenAdam begin with: the products of a matrix with its bases, and the parts that are
// made of them; and how the matrices of a net are divided into launches and blocks.
//
// A pass cuts a matrix into strips of columns and chunks of rows, a block each, which leaves sums over its part; they
// are added up in order by whoever reads them. A gradient whose square is not finite sets a flag in the first launches,
// before anything is written, and the others return at once.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "eigen.cuh"
#include "kernels.h"
#include "reduce.cuh"

namespace secondorder::cuda {

// What a renewal adds to the mean at j.
template <typename T>
__device__ __forceinline__ T mean_change(const EigenRenewal<T>& in, const Work<T>& work, int64_t j) {
  if (!in.grad_bias || !in.sketch) return T(0);
  return T(*work.share) * in.sketch[in.sizes.kv * in.sizes.p + j] / T(in.rows);
}

// Which matrix the products are of, and with which vectors.
enum class Products {
  step,         // G' with the bases; |G|^2
  renewal,      // G' with the bases (V only without a sketch, U without a bias Hessian); |G|^2
  iteration,    // G' with G' V and U^T G', likewise
  sketch,       // the shifted inputs with V
  sketch_sums,  // the shifted inputs with their coordinates along V and with 1
};

// Parallel over strips and chunks.
template <Products kProducts, typename M>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    products_kernel(const Layers<M> __grid_constant__ layers, const Blocks __grid_constant__ division,
                    const int* refused, const double* control, const EigenReplay replay) {
  using T = Scalar<M>;
  constexpr bool kSketch = kProducts == Products::sketch || kProducts == Products::sketch_sums;
  constexpr bool kSquares = kProducts == Products::step || kProducts == Products::renewal;
  __shared__ Tile<T> tile;
  __shared__ SharedPart<M> part;
  __shared__ double partial[1][kWarp];
  if (kProducts == Products::iteration && *refused) return;
  if ((kProducts == Products::renewal || kSketch) && replay.idle(control)) return;
  const Part<M>& at = part.make(layers, division);
  const M& in = at.in;
  const EigenSizes& sizes = in.sizes;
  Vectors<T> left{in.basis_out, sizes.ku}, right{in.basis_in, sizes.kv};
  bool centred;  // whether there is a mean
  if constexpr (kSketch) {
    centred = in.mean;
    left = {at.work.right, kProducts == Products::sketch ? 0 : sizes.ku};
    if (kProducts == Products::sketch_sums) right.count = 0;
  } else {
    centred = in.grad_bias;
    if constexpr (kIsRenewal<M>) {
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
  at.each_tile(aligned(at.p, in.grad_weight), [&](const Frame<T>& frame) {
    typename Tile<T>::Elements x;
    frame.read(in.grad_weight, x);
    if constexpr (kSquares) {
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i)
#pragma unroll
        for (int k = 0; k < kOwnColumns<T>; ++k) square[0] += double(x[i][k]) * double(x[i][k]);
    }
    if (centred)
      tile.subtract(
          frame, x, [&](int64_t i) { return kSketch ? T(1) : in.grad_bias[i]; },
          [&](int64_t j) {
            T centre = in.mean[j];
            if constexpr (kIsRenewal<M>) centre += mean_change(in, at.work, j);
            return centre;
          });
    tile.column_products(frame, x, left, column_sums);
    tile.row_products(frame, x, right, row_sums);
  });
  if constexpr (kSquares) {
    block_sum(square, partial);
    if (threadIdx.x == 0) at.work.squares[at.block] = square[0];
  }
}

// out[q, r] = sum over the slice of left[q, .] right[r, .] for r < count, else 0, a warp for kRows pairs of them.
//   left [ku, size], right [count, size], out [ku, c]
template <typename T>
__device__ __forceinline__ void slice_products(const Slice& slice, int64_t size, const T* left, int64_t ku,
                                               const T* right, int64_t count, int64_t c, T* out) {
  constexpr int kWarps = kThreads / kWarp;
  for (int64_t first = threadIdx.x / kWarp; first < ku * c; first += kRows * kWarps) {
    T sum[kRows] = {};
    int64_t q[kRows], r[kRows];
#pragma unroll
    for (int b = 0; b < kRows; ++b) {
      const int64_t pair = first + b * kWarps;
      q[b] = pair / c;
      r[b] = pair < ku * c ? pair % c : count;
    }
    for (int64_t i = slice.begin + threadIdx.x % kWarp; i < slice.end; i += kWarp)
#pragma unroll
      for (int b = 0; b < kRows; ++b)
        if (r[b] < count) sum[b] += left[q[b] * size + i] * right[r[b] * size + i];
#pragma unroll
    for (int b = 0; b < kRows; ++b) sum[b] = warp_sum(sum[b]);
    if (threadIdx.x % kWarp != 0) continue;
#pragma unroll
    for (int b = 0; b < kRows; ++b)
      if (first + b * kWarps < ku * c) out[first + b * kWarps] = sum[b];
  }
}

// What parts_kernel makes of products.
enum class Parts {
  step,     // of the gradient; and the step's scalars, and whether it is refused
  renewal,  // of the gradient; and whether the renewal is refused
  sketch,   // of the inputs
};

// X, U^T G', and the slices' shares of C = U^T X. Parallel over slices of rows and of columns, and one block more.
template <Parts kParts, typename M>
__global__ void __launch_bounds__(kThreads, kBlocks)
    parts_kernel(const Layers<M> __grid_constant__ layers, const Blocks __grid_constant__ division,
                 const double* control, const EigenReplay replay, int* refused) {
  using T = Scalar<M>;
  __shared__ double partial[4][kWarp];
  if (kParts != Parts::step && replay.idle(control)) return;
  const Here<M> at(layers, division);
  const M& in = at.in;
  const EigenSizes& sizes = in.sizes;
  const Work<T>& work = at.work;
  const int64_t n = at.n, p = at.p, ku = at.ku;
  const Slice slice(sizes, at.block);
  int64_t kv = at.kv;
  if constexpr (kParts == Parts::renewal)
    if (in.sketch) kv = 0;  // no G' V was made
  if (slice.rows) {
    slice.each(kv, [&](int64_t v, int64_t i) {
      work.right[v * n + i] = ordered_sum(work.row_sums + v * n + i, at.strips, kv * n);
    });
    if (sizes.bias)
      slice.each(1, [&](int64_t, int64_t i) {
        work.right[sizes.kv * n + i] = kParts == Parts::sketch ? T(1) : in.grad_bias[i];
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
  } else if constexpr (kParts != Parts::sketch) {
    double squares[kParts == Parts::step ? 2 : 4] = {};  // of G and g; of a sketch and a bias Hessian
    for (int64_t k = threadIdx.x; k < at.strips * at.chunks; k += kThreads) squares[0] += work.squares[k];
    if (in.grad_bias)
      for (int64_t i = threadIdx.x; i < n; i += kThreads)
        squares[1] += double(in.grad_bias[i]) * double(in.grad_bias[i]);
    if constexpr (kParts == Parts::renewal) {
      if (in.sketch)
        for (int64_t v = threadIdx.x / kWarp; v <= sizes.kv; v += kThreads / kWarp) {
          double sum = 0;
          for (int64_t j = threadIdx.x % kWarp; j < p; j += kWarp) {
            const double x = double(in.sketch[v * p + j]);
            squares[2] += x * x;
            if (v < sizes.kv) sum += double(in.basis_in[v * p + j]) * double(in.sketch[sizes.kv * p + j]);
          }
          sum = warp_sum(sum);
          if (threadIdx.x % kWarp == 0 && v < sizes.kv) work.along[v] = sum;
        }
      if (in.bias_hessian)
        for (int64_t i = threadIdx.x; i < n; i += kThreads) squares[3] += work.curvature[i];
    }
    block_sum(squares, partial);
    if (threadIdx.x != 0) return;
    bool fine = true;
    for (const double square : squares) fine = fine && square < kLargest<T> / 4;  // which a NaN is not either
    if constexpr (kParts == Parts::step) {
      const double size = std::sqrt(squares[0] / (double(n) * double(p)));
      work.scalars[0] = size > *in.size ? size : *in.size;
      const double length = eigen_length(control), rate = in.rate ? in.rate[0] : 1,
                   bias_rate = in.rate ? in.rate[1] : 1;
      work.scalars[1] = length * rate;
      work.scalars[2] = length * bias_rate;
      const EigenCorrections corrections(in.beta1, in.beta2, in.step + replay.steps(control));
      work.scalars[3] = corrections.first;
      work.scalars[4] = corrections.fresh;
      fine = fine && control[kEigenUnrenewed] == 0 && eigen_is_rate(rate) && eigen_is_rate(bias_rate);
    }
    if (!fine) atomicOr(refused, 1);
  }
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

}  // namespace secondorder::cuda
