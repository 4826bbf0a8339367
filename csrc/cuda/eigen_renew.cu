// The renewals of EigenAdam's bases, all matrices of a net in each launch, and the sketches of a layer's inputs:
//
//   begin       whether bases are renewed, and with which share
//   products, parts, products, candidates, orthonormal    new bases: two passes over G
//   curvature   before parts, of matrices with a bias Hessian: its product with U, in place of G's
//   overlaps, turns, moments    U'^T U and V^T V', which the first moments of C, R, T are turned by
//   finish      what was made in the workspace, to its place
#include <cmath>
#include <cstddef>

#include "eigen_passes.cuh"

namespace secondorder::cuda {
namespace {

constexpr int kIdle = 2;        // the flag where no bases are to be renewed
constexpr int kSideGroup = 16;  // vectors of a basis that are taken off another together
constexpr int kSideRun = 4;     // of them, and elements of a thread, whose loads are under way together
constexpr double kSure = 0.7;   // of a vector's length, where so much is left once is enough

// The flag of all launches, and w of every matrix. One block, a thread each.
template <typename T>
__global__ void __launch_bounds__(kLayersPerLaunch, 1)
    begin_renewal_kernel(const Layers<EigenRenewal<T>> __grid_constant__ layers, const double* __restrict__ control,
                         const EigenReplay replay, double decay, int* refused) {
  if (threadIdx.x == 0 && refused) *refused = replay.idle(control) ? kIdle : 0;
  if (int(threadIdx.x) >= layers.count) return;
  const Here<EigenRenewal<T>> at(layers.layer[threadIdx.x], 0);
  *at.work.share = replay.share(control, at.in.share, decay);
}

// H U where there is a bias Hessian H, and its rows' squares: a warp for each of them.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    curvature_kernel(const Layers<EigenRenewal<T>> __grid_constant__ layers, const Blocks __grid_constant__ division,
                     const double* control, const EigenReplay replay) {
  if (replay.idle(control)) return;
  const Here<EigenRenewal<T>> at(layers, division);
  const int64_t n = at.n, i = at.block * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (i >= n) return;
  const T *const row = at.in.bias_hessian + i * n, *const basis = at.in.basis_out;
  const int lane = threadIdx.x % kWarp;
  double square = 0;
  for (int64_t group = 0; group == 0 || group < at.ku; group += kGroup) {
    T sums[kGroup] = {};
    square = 0;
    for (int64_t j = lane; j < n; j += kWarp) {
      const T x = row[j];
      square += double(x) * double(x);
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
  square = warp_sum(square);
  if (lane == 0) at.work.curvature[i] = square;
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
  const double share = *work.share;
  const T w = T(share), old = T(1 - share);
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
        const T move = mean_change(in, work, j), sum = in.sketch[kv * p + j], rows = T(in.rows);
        const T along = T(work.along[v]);
        const T moved = in.grad_bias ? T(share * work.along[v] / double(in.rows)) : T(0);  // V^T of the change
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

// What the threads of a side sum in.
struct SideSums {
  double partial[kSideGroup][kSideThreads / kWarp], total[kSideGroup], square[1][kWarp];
};

// Replaces each of kSideGroup values by its sum over the block, with fewer shuffles than block_sum. Every thread must
// call it.
__device__ __forceinline__ void side_sums(double (&v)[kSideGroup], SideSums& memory) {
  constexpr int kWarps = kSideThreads / kWarp;
  static_assert(2 * kSideGroup == kWarp && kWarps <= kWarp, "two lanes have a sum, then a lane a warp's");
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  scatter_sums<kSideGroup, 1, kSideGroup>(v);
  v[0] += __shfl_xor_sync(0xffffffffu, v[0], kSideGroup);
  if (lane < kSideGroup) memory.partial[lane][warp] = v[0];
  __syncthreads();
  for (int c = warp; c < kSideGroup; c += kWarps) {
    const double sum = warp_sum(lane < kWarps ? memory.partial[c][lane] : 0.0);
    if (lane == 0) memory.total[c] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < kSideGroup; ++c) v[c] = memory.total[c];
}

// Goes over a row and up to kSideGroup of `count` vectors, kSideRun elements of a thread at a time: run(x, e, b) with
// those x of the row and b of the kSideRun vectors from e on, of which one behind the last is the last once more; then
// end(x, place, there) with the place of each, and whether it is there. What is not there is zero.
//   vectors [count, n], row [n]
template <typename T, typename Run, typename End>
__device__ __forceinline__ void each_run(int64_t n, int64_t count, const T* vectors, const T* row, Run&& run,
                                         End&& end) {
  for (int64_t i = threadIdx.x; i < n; i += kSideRun * kSideThreads) {
    bool there[kSideRun];
    T x[kSideRun], b[kSideRun][kSideRun];
#pragma unroll
    for (int j = 0; j < kSideRun; ++j) {
      there[j] = i + j * kSideThreads < n;
      x[j] = there[j] ? row[i + j * kSideThreads] : T(0);
    }
#pragma unroll
    for (int e = 0; e < kSideGroup; e += kSideRun) {
      if (e >= count) continue;
      const T* from = vectors + e * n + i;
#pragma unroll
      for (int v = 0; v < kSideRun; ++v) {
#pragma unroll
        for (int j = 0; j < kSideRun; ++j) b[v][j] = there[j] ? from[j * kSideThreads] : T(0);
        if (e + v + 1 < count) from += n;
      }
      run(x, e, b);
    }
#pragma unroll
    for (int j = 0; j < kSideRun; ++j) end(x[j], i + j * kSideThreads, there[j]);
  }
}

// row -= its projection on the q rows of the basis, kSideGroup at a time; returns its length then, of squares in
// double: those of a float may leave its range.   basis [q, n], row [n]
template <typename T>
__device__ __forceinline__ double strip(int64_t n, int64_t q, const T* basis, T* row, SideSums& memory) {
  using Run = T[kSideRun];
  double square[1] = {};
  for (int64_t group = 0; group == 0 || group < q; group += kSideGroup) {
    const int64_t count = q - group;
    const T* const vectors = basis + group * n;
    T sums[kSideGroup] = {};
    if (q > 0) {
      each_run(
          n, count, vectors, row,
          [&](const Run& x, int e, const Run(&b)[kSideRun]) {
#pragma unroll
            for (int v = 0; v < kSideRun; ++v)
#pragma unroll
              for (int j = 0; j < kSideRun; ++j) sums[e + v] += x[j] * b[v][j];
          },
          [](T, int64_t, bool) {});
      double along[kSideGroup];
#pragma unroll
      for (int e = 0; e < kSideGroup; ++e) along[e] = double(sums[e]);
      side_sums(along, memory);
#pragma unroll
      for (int e = 0; e < kSideGroup; ++e) sums[e] = e < count ? T(along[e]) : T(0);
    }
    square[0] = 0;
    each_run(
        n, count, vectors, row,
        [&](Run& x, int e, const Run(&b)[kSideRun]) {
#pragma unroll
          for (int v = 0; v < kSideRun; ++v)
#pragma unroll
            for (int j = 0; j < kSideRun; ++j) x[j] -= sums[e + v] * b[v][j];
        },
        [&](T x, int64_t i, bool there) {
          if (there) row[i] = x;
          square[0] += double(x) * double(x);
        });
  }
  block_sum(square, memory.square);
  return std::sqrt(square[0]);
}

// Rows made orthonormal in their order, with their lengths before; one that depends on those before it is drawn anew.
// Parallel over both sides of every matrix, a block each.
template <typename T>
__global__ void __launch_bounds__(kSideThreads, 1)
    orthonormal_kernel(const Layers<EigenRenewal<T>> __grid_constant__ layers, const int* __restrict__ refused) {
  using Run = T[kSideRun];
  __shared__ SideSums memory;
  if (*refused) return;
  const Here<EigenRenewal<T>> at(layers.layer[blockIdx.x / 2], 0);
  const bool out = blockIdx.x % 2 == 0;
  const int64_t n = out ? at.n : at.p, k = out ? at.ku : at.kv;
  T* const basis = out ? at.work.next_out : at.work.next_in;
  T* const lengths = out ? at.work.length_out : at.work.length_in;
  constexpr double kTolerance = 16 * kRounding<T>;
  double largest = 0;
  for (int64_t group = 0; group < k; group += kSideGroup) {
    double squares[kSideGroup] = {};
    const T* const vectors = basis + group * n;
    each_run(
        n, k - group, vectors, vectors,
        [&](const Run&, int e, const Run(&b)[kSideRun]) {
#pragma unroll
          for (int v = 0; v < kSideRun; ++v)
#pragma unroll
            for (int j = 0; j < kSideRun; ++j) squares[e + v] += double(b[v][j]) * double(b[v][j]);
        },
        [](T, int64_t, bool) {});
    side_sums(squares, memory);
#pragma unroll
    for (int e = 0; e < kSideGroup; ++e) {
      if (group + e >= k) continue;
      const double length = std::sqrt(squares[e]);
      largest = std::fmax(largest, length);
      if (int(threadIdx.x) == e) lengths[group + e] = T(length);
    }
  }
  __syncthreads();
  for (int64_t q = 0; q < k; ++q) {
    T* const row = basis + q * n;
    const double start = double(lengths[q]);
    double before = start;  // its length before the projection is taken off
    bool seen = false;      // whether it was found to depend on those before it or not
    for (;;) {
      const double length = strip(n, q, basis, row, memory);
      if (!seen) {
        seen = true;
        const bool kept = length > kTolerance * start && length > kTolerance * largest;
        if (threadIdx.x == 0) lengths[q] = kept ? T(length) : T(0);
        if (!kept) {
          each_element(n, [&](int64_t i) { row[i] = T(eigen_refill(i, q)); });
          before = kLargest<double>;
          continue;
        }
      }
      // Where most of a row was taken off, rounding is left along those before it, which goes at a second time.
      const bool again = length < kSure * before;
      const double inverse = 1 / length;
      each_element(n, [&](int64_t i) { row[i] = T(double(row[i]) * inverse); });
      if (!again) break;
      before = 0;
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
    if (*refused != kIdle && blockIdx.x == 0 && threadIdx.x == 0) control[kEigenUnrenewed] = 1;
    return;
  }
  const Here<EigenRenewal<T>> at(layers, division);
  const EigenRenewal<T>& in = at.in;
  const EigenSizes& sizes = in.sizes;
  const Work<T>& work = at.work;
  int64_t k = at.block * kThreads + threadIdx.x;
  if (in.grad_bias && k < sizes.p) in.new_mean[k] += mean_change(in, work, k);
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
    sketch_kernel(const Layers<SketchMatrix<T>> __grid_constant__ layers, const double* control,
                  const EigenReplay replay) {
  if (replay.idle(control)) return;
  const Here<SketchMatrix<T>> at(layers.layer[0], 0);
  const Slice slice(at.sizes, slices(at.n) + blockIdx.x);
  slice.each(at.ku, [&](int64_t v, int64_t j) {
    at.in.sketch[v * at.p + j] += ordered_sum(at.work.column_sums + v * at.p + j, at.chunks, at.ku * at.p);
  });
}

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
void eigen_sketch(const EigenSketch<T>& sketch, const double* control, const EigenReplay& replay, void* workspace,
                  const Device& device, cudaStream_t stream) {
  using M = SketchMatrix<T>;
  const M matrix = matrix_of(sketch);
  each_plan(&matrix, 1, workspace, device, [&](const Plan<M>& plan) {
    LAUNCH_DIVIDED((products_kernel<Products::sketch, M>), tiles, kTileThreads, nullptr, control, replay);
    LAUNCH_DIVIDED((parts_kernel<Parts::sketch, M>), slices, kThreads, control, replay, nullptr);
    LAUNCH_DIVIDED((products_kernel<Products::sketch_sums, M>), tiles, kTileThreads, nullptr, control, replay);
    LAUNCH(sketch_kernel<T>, unsigned(slices(sketch.p)), kThreads, 0, stream, plan.layers, control, replay);
  });
}

template <typename T>
void eigen_renew(const EigenRenewal<T>* matrices, int count, double* control, const EigenReplay& replay, double decay,
                 void* workspace, const Device& device, cudaStream_t stream) {
  using M = EigenRenewal<T>;
  bool begun = false;
  each_plan(matrices, count, workspace, device, [&](const Plan<M>& plan) {
    int* const flag = begun ? nullptr : plan.refused;
    LAUNCH(begin_renewal_kernel<T>, 1, kLayersPerLaunch, 0, stream, plan.layers, control, replay, decay, flag);
    begun = true;
    LAUNCH_DIVIDED((products_kernel<Products::renewal, M>), tiles, kTileThreads, plan.refused, control, replay);
    LAUNCH_DIVIDED(curvature_kernel<T>, curvatures, kThreads, control, replay);
    LAUNCH_DIVIDED((parts_kernel<Parts::renewal, M>), slices, kThreads, control, replay, plan.refused);
  });
  each_plan(matrices, count, workspace, device, [&](const Plan<M>& plan) {
    LAUNCH_DIVIDED((products_kernel<Products::iteration, M>), tiles, kTileThreads, plan.refused, control, replay);
    LAUNCH_DIVIDED(candidates_kernel<T>, slices, kThreads, plan.refused);
    LAUNCH(orthonormal_kernel<T>, 2 * plan.layers.count, kSideThreads, 0, stream, plan.layers, plan.refused);
    LAUNCH_DIVIDED(overlaps_kernel<T>, slices, kThreads, plan.refused);
    LAUNCH_DIVIDED(turns_kernel<T>, turns, kThreads, plan.refused);
    LAUNCH_DIVIDED(moments_kernel<T>, moments, kThreads, plan.refused);
    LAUNCH_DIVIDED(finish_renewal_kernel<T>, finish, kThreads, plan.refused, control);
  });
}

#define INSTANTIATE(T)                                                                                              \
  template size_t eigen_sketch_workspace(const EigenSketch<T>&, const Device&);                                     \
  template size_t eigen_renew_workspace(const EigenRenewal<T>*, int, const Device&);                                \
  template void eigen_sketch(const EigenSketch<T>&, const double*, const EigenReplay&, void*, const Device&,        \
                             cudaStream_t);                                                                         \
  template void eigen_renew(const EigenRenewal<T>*, int, double*, const EigenReplay&, double, void*, const Device&, \
                            cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace secondorder::cuda
