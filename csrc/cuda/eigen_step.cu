// EigenAdam's step, all matrices of a net in each launch. secondorder/ops/eigen.py has the mathematics, csrc/eigen.h
// the parts C, R, T, E of a gradient. Between kernels that go over whole matrices stand small ones over what has a side
// of a basis:
//
//   products    G' V, U^T G', |G|^2: one pass over G
//   parts, corner, sides    the parts but E; Adam's rule in them
//   residual    E, Adam's rule in it, N_E V, U^T N_E: one pass over G and the moments
//   whole, corner, sides    Q and Z of S = N_E + U Q + Z V^T
//   update      S, W, S a: one pass over N_E, G and W
//   finish      b, the size of gradients, the control of the step length
//
// From the formulas of the specification, with B = N_E V and A = U^T N_E,
//
//   Q = N_T - A,   M = N_C - U^T (N_R - B) - N_T V,   Z = N_R - B + U M,
//
// where a bias' column of B and of N_T V is zero: the last column of Z is y.
#include <cmath>
#include <cstddef>

#include "eigen_passes.cuh"

namespace secondorder::cuda {
namespace {

// Adam's rule with the floor that the size of the gradients sets.
template <typename T>
__device__ __forceinline__ EigenMoments<T> rule(const EigenStep<T>& in, const Work<T>& work) {
  return {in.beta1, in.beta2, work.scalars[3], work.scalars[4], in.eps * work.scalars[0] + kTiny<T>, in.sizes.apart()};
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
  if (!moments.waits(x)) in.last[place] = result;
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
__global__ void __launch_bounds__(kTileThreads, kResidualBlocks<T>)
    residual_kernel(const Layers<EigenStep<T>> __grid_constant__ layers, const Blocks __grid_constant__ division,
                    const int* __restrict__ refused, double* slopes) {
  __shared__ Tile<T> tile;
  __shared__ SharedPart<EigenStep<T>> part;
  __shared__ double sums[2][kTileThreads];  // of each thread
  __shared__ int64_t samples[kTileRows];    // which a row of the tile is, or -1: none
  __shared__ double partial[2][kWarp];
  if (*refused) return;
  const Part<EigenStep<T>>& at = part.make(layers, division);
  const EigenStep<T>& in = at.in;
  const int64_t n = at.n, rest = in.sizes.rest();
  const Vectors<T> u{in.basis_out, at.ku}, v{in.basis_in, at.kv};
  T *const first = in.first + rest, *const second = in.second + rest, *const last = in.last + rest;
  const bool vectors = aligned(at.p, in.grad_weight, first, second, last, at.work.whole);
  sums[0][threadIdx.x] = sums[1][threadIdx.x] = 0;
  at.each_tile(vectors, [&](const Frame<T>& frame) {
    typename Tile<T>::Elements x;
    frame.read(in.grad_weight, x);
    if (in.grad_bias)
      tile.subtract(frame, x, [&](int64_t i) { return in.grad_bias[i]; }, [&](int64_t j) { return in.mean[j]; });
    tile.add(frame, x, T(-1), u, at.work.top);
    tile.add(frame, x, T(-1), {at.work.right, at.kv}, in.basis_in);
    __syncthreads();  // the samples of the tile before have been used
    if (threadIdx.x < kTileRows) {
      const int64_t scaled = (frame.begin + threadIdx.x) * in.sampled, sample = ceil_div(scaled, n);
      samples[threadIdx.x] = sample * n - scaled < in.sampled ? sample : -1;
    }
    __syncthreads();
    const EigenMoments<T> moments = rule(in, at.work);
#pragma unroll 1
    for (int row = 0; row < kOwnRows; ++row) {
      T m[kOwnColumns<T>], v[kOwnColumns<T>], result[kOwnColumns<T>];
      frame.read(first, row, m);
      frame.read(second, row, v);
#pragma unroll
      for (int k = 0; k < kOwnColumns<T>; ++k) result[k] = moments.normed(x[0][k], m[k], v[k]);
      frame.write(first, row, m);
      frame.write(second, row, v);
      frame.write(at.work.whole, row, result);
      const int64_t sample = samples[Frame<T>::own_row() + row];
      if (sample >= 0 && row < frame.rows) {
        T old[kOwnColumns<T>];
        T* const place = last + sample * at.p + frame.column(Frame<T>::own_place());
        frame.read_row(place, true, old);
#pragma unroll
        for (int k = 0; k < kOwnColumns<T>; ++k) {
          sums[0][threadIdx.x] += double(x[0][k]) * double(result[k]);
          sums[1][threadIdx.x] += double(x[0][k]) * double(old[k]);
          if (!moments.waits(x[0][k])) old[k] = result[k];
        }
        frame.write_row(place, true, old);
      }
      // The next row comes to the front, and N to the back: registers have no index.
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i)
#pragma unroll
        for (int k = 0; k < kOwnColumns<T>; ++k) x[i][k] = i + 1 < kOwnRows ? x[i + 1][k] : result[k];
    }
    tile.column_products(frame, x, u, at.work.column_sums + at.chunk * at.ku * at.p);
    tile.row_products(frame, x, v, at.work.row_sums + at.strip * at.kv * n);
  });
  const double rows = double(n) / double(in.sampled);  // that a sample stands for
  double shares[2] = {rows * sums[0][threadIdx.x], rows * sums[1][threadIdx.x]};
  store_slopes(shares, partial, slopes);
}

// S where the gradient is not zero, W, and S a. Parallel over strips and chunks.
template <typename T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    update_kernel(const Layers<EigenStep<T>> __grid_constant__ layers, const Blocks __grid_constant__ division,
                  const int* __restrict__ refused) {
  __shared__ Tile<T> tile;
  __shared__ SharedPart<EigenStep<T>> part;
  if (*refused) return;
  const Part<EigenStep<T>>& at = part.make(layers, division);
  const EigenStep<T>& in = at.in;
  const double rate = at.work.scalars[1] * in.lr;
  const T lr = T(rate), keep = T(1 - rate * in.decay);
  const bool residual = in.sizes.residual() > 0, top = in.sizes.top() > 0;
  at.each_tile(aligned(at.p, in.grad_weight, in.weight, at.work.whole), [&](const Frame<T>& frame) {
    typename Tile<T>::Elements x = {};
    if (residual) frame.read(at.work.whole, x);
    if (top) tile.add(frame, x, T(1), {in.basis_out, at.ku}, at.work.new_top);
    tile.add(frame, x, T(1), {at.work.new_right, at.kv}, in.basis_in);
#pragma unroll
    for (int row = 0; row < kOwnRows; ++row) {
      T g[kOwnColumns<T>], w[kOwnColumns<T>];
      frame.read(in.grad_weight, row, g);
      frame.read(in.weight, row, w);
#pragma unroll
      for (int k = 0; k < kOwnColumns<T>; ++k) {
        T& s = x[row][k];
        if (g[k] == T(0)) s = T(0);
        w[k] = keep * w[k] - lr * s;
      }
      frame.write(in.weight, row, w);
    }
    if (in.bias) tile.row_products(frame, x, {in.mean, 1}, at.work.row_sums + at.strip * at.n);
  });
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
                       const EigenReplay replay, double* control) {
  __shared__ double partial[2][kWarp];
  if (blockIdx.x == division.first[layers.count]) {
    if (*refused) {  // and no slopes were written
      if (threadIdx.x != 0) return;
      control[kEigenRefused] += 1;
      control[kEigenUnrenewed] = 0;
      return;
    }
    double sums[2] = {};
    for (int64_t k = threadIdx.x; k < count; k += kThreads) {
      sums[0] += slopes[2 * k];
      sums[1] += slopes[2 * k + 1];
    }
    block_sum(sums, partial);
    if (threadIdx.x == 0) eigen_control(control, sums[0], sums[1], renewed && !replay.idle(control));
    return;
  }
  if (*refused) return;
  const Here<EigenStep<T>> at(layers, division);
  const EigenStep<T>& in = at.in;
  const Work<T>& work = at.work;
  const int64_t i = at.block * kThreads + threadIdx.x, n = at.n;
  if (i == 0) *in.size = work.scalars[0];
  if (!in.bias || i >= n) return;
  const double rate = work.scalars[2] * in.lr_bias;
  const T keep = T(1 - rate * in.decay_bias);
  T step = 0;
  if (in.grad_bias[i] != T(0)) step = work.new_right[at.kv * n + i] - ordered_sum(work.row_sums + i, at.strips, n);
  in.bias[i] = keep * in.bias[i] - T(rate) * step;
}

}  // namespace

template <typename T>
size_t eigen_step_workspace(const EigenStep<T>* matrices, int count, const Device& device) {
  return each_plan(matrices, count, nullptr, device, [](const Plan<EigenStep<T>>&) {});
}

template <typename T>
void eigen_step(const EigenStep<T>* matrices, int count, double* control, bool renewed, const EigenReplay& replay,
                void* workspace, const Device& device, cudaStream_t stream) {
  using M = EigenStep<T>;
  cudaMemsetAsync(workspace, 0, sizeof(int), stream);  // the flag comes first in the workspace
  each_plan(matrices, count, workspace, device, [&](const Plan<M>& plan) {
    LAUNCH_DIVIDED((products_kernel<Products::step, M>), tiles, kTileThreads, plan.refused, control, replay);
    LAUNCH_DIVIDED((parts_kernel<Parts::step, M>), slices, kThreads, control, replay, plan.refused);
  });
  each_plan(matrices, count, workspace, device, [&](const Plan<M>& plan) {
    const int l = plan.layers.count;
    double* const corner_slopes = plan.slopes + 2 * plan.first_slope;
    double* const side_slopes = corner_slopes + 2 * int64_t(plan.corners.first[l]);
    double* const residual_slopes = side_slopes + 2 * int64_t(plan.sides.first[l]);
    LAUNCH_DIVIDED((corner_kernel<false, T>), corners, kThreads, plan.refused, corner_slopes);
    LAUNCH_DIVIDED((sides_kernel<false, T>), sides, kThreads, plan.refused, side_slopes);
    LAUNCH_DIVIDED(residual_kernel<T>, residuals, kTileThreads, plan.refused, residual_slopes);
    LAUNCH_DIVIDED(whole_parts_kernel<T>, slices, kThreads, plan.refused);
    LAUNCH_DIVIDED((corner_kernel<true, T>), corners, kThreads, plan.refused, nullptr);
    LAUNCH_DIVIDED((sides_kernel<true, T>), sides, kThreads, plan.refused, nullptr);
    LAUNCH_DIVIDED(update_kernel<T>, tiles, kTileThreads, plan.refused);
    LAUNCH(finish_step_kernel<T>, plan.finish.first[l] + (plan.last ? 1 : 0), kThreads, 0, stream, plan.layers,
           plan.finish, plan.refused, plan.slopes, plan.slope_count, renewed, replay, control);
  });
}

#define INSTANTIATE(T)                                                                                        \
  template size_t eigen_step_workspace(const EigenStep<T>*, int, const Device&);                              \
  template void eigen_step(const EigenStep<T>*, int, double*, bool, const EigenReplay&, void*, const Device&, \
                           cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace secondorder::cuda
