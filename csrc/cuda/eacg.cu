// EA-CG (Chen et al., Eq. 9 to 11b): ((1-alpha) H P a a^T + alpha P) = -B and ((1-alpha) H + alpha I) d = -g, for all
// layers of a net in three launches:
//
//   products    u = B a, s = a^T a, the largest entry of every row of B, and for the truncated form and where
//               directions are bounded its squares: one pass over every B
//   directions  conjugate gradients of every layer and of both right-hand sides, all iterations
//   update      W += lr (c B + w a^T), or the direction alone: one pass over every B and W
//
// The mathematics is that of csrc/cpu/eacg.cpp: P = c B + w a^T, found from (alpha I + (1-alpha) s H) v = -u/sqrt(s),
// with one more coordinate of length |B'| in the truncated form.
//
// A layer's group of blocks shares the rows of H, each block keeping its own rows in shared memory where they fit. All
// blocks of a group carry every vector and compute every scalar alike, to the bit, so that an iteration exchanges
// nothing but H p, and waits for the group once.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "kernels.h"
#include "reduce.cuh"

namespace secondorder::cuda {
namespace {

constexpr int kGroupThreads = 512;
constexpr int kSystems = 2;             // the weight's and the bias's
constexpr int kVectors = 4 * kSystems;  // x, r, p, A p of each
constexpr int kSums = 4;                // that one block_sum of directions_kernel takes, at most

// Device memory of one layer.
template <typename T>
struct Work {
  double* scalars;    // [2] s = a^T a; then c
  double* squares;    // [n_out] |B_i|^2, where |B'| is needed
  T* largest;         // [n_out] max_j |B_ij|
  T* u;               // [n_out] B a
  T* w;               // [n_out] P = c B + w a^T
  T* d;               // [n_out] the bias direction
  T* hp;              // [2, kSystems, n_out] H p, of even and of odd iterations
  T* vectors;         // [blocks of the group, kVectors, n_out], or null: they are in shared memory
  unsigned* arrived;  // [1] arrivals at the group's barrier, from 0
};

template <typename T>
struct Layer {
  EacgLayer<T> in;
  Work<T> work;
};

template <typename T>
using Layers = Table<Layer<T>>;

// Of one row b, the same in every lane of the warp.
template <typename T>
struct Projection {
  T u, largest;    // b.x, max_j |b_j|
  double squares;  // |b|^2, or 0
};

//   b, x [n]
template <bool kSquares, typename T>
__device__ __forceinline__ Projection<T> project_row(int64_t n, bool vectors, const T* b, const T* x) {
  Projection<T> sums{};
  each_column<T>(n, vectors, [&](int64_t j, auto width) {
    T m[width.value], a[width.value];
    load(b + j, m);
    load(x + j, a);
#pragma unroll
    for (int e = 0; e < width.value; ++e) {
      sums.u += m[e] * a[e];
      sums.largest = std::fmax(sums.largest, std::abs(m[e]));
      if constexpr (kSquares) sums.squares += double(m[e]) * double(m[e]);
    }
  });
  return {warp_sum(sums.u), warp_max(sums.largest), kSquares ? warp_sum(sums.squares) : 0};
}

// u, s, the rows' largest entries and (if asked for) squares. Parallel over the rows of every B, a warp each.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    products_kernel(const Layers<T> __grid_constant__ layers, const Blocks __grid_constant__ division, bool squares) {
  const int l = division.layer(layers.count, blockIdx.x);
  const EacgLayer<T>& in = layers.layer[l].in;
  const Work<T>& work = layers.layer[l].work;
  const int64_t row = int64_t(blockIdx.x - division.first[l]) * kRowsPerBlock + threadIdx.x / kWarp, n = in.n_in;
  if (row >= in.n_out) return;
  const T* b = in.grad_weight + row * n;
  const bool vectors = aligned(n, in.grad_weight, in.mean_input), leader = threadIdx.x % kWarp == 0;
  const Projection<T> products =
      squares ? project_row<true>(n, vectors, b, in.mean_input) : project_row<false>(n, vectors, b, in.mean_input);
  if (leader) {
    work.u[row] = products.u;
    work.largest[row] = products.largest;
    if (squares) work.squares[row] = products.squares;
  }
  if (row == 0) {
    const double s = project_row<true>(n, vectors, in.mean_input, in.mean_input).squares;
    if (leader) work.scalars[0] = s;
  }
}

// Waits until every block of the group has arrived `generation` times, and makes what they wrote before visible.
__device__ __forceinline__ void group_barrier(unsigned* arrived, unsigned blocks, unsigned generation) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1u);
    while (atomicAdd(arrived, 0u) < blocks * generation) __nanosleep(64);
    __threadfence();
  }
  __syncthreads();
}

// The scalars of conjugate gradients for (shift I + scale H) x = rhs, with one more, uncoupled coordinate (extra) whose
// matrix is `shift`; as csrc/cpu/eacg.cpp has it. One thread computes them, in its registers: double divisions are slow
// on many devices, and 512 threads doing them alike would wait for each other. The block reads a copy in shared memory.
struct Scalars {
  double shift, scale, rr, stop, extra_x, extra_r, extra_p, step, beta;
  int iterations;
  bool active, finite;

  __device__ void start(double shift_, double scale_, double square, double extra, double tol) {
    shift = shift_;
    scale = scale_;
    extra_x = 0;
    extra_r = extra_p = extra;
    rr = square + extra * extra;
    stop = tol * tol * rr;
    iterations = 0;
    // Even from a residual of zero: one product, whatever its scale, shows whether H is finite.
    active = true;
    if (rr <= 0) scale = 1;
    finite = true;
  }

  // Stops where p^T A p <= 0, which only an indefinite H can give, and where a number is not finite: the solution is
  // then NaN.
  __device__ void found_curvature(double curvature) {
    if (!active) return;
    curvature += shift * extra_p * extra_p;
    finite = curvature - curvature == 0;  // NaN where it is not
    active = finite && curvature > 0;
    if (!active) return;
    step = rr / curvature;
    extra_x += step * extra_p;
    extra_r -= step * shift * extra_p;
  }

  __device__ void found_residual(double square) {
    if (!active) return;
    square += extra_r * extra_r;
    beta = square / rr;
    extra_p = extra_r + beta * extra_p;
    rr = square;
    ++iterations;
    finite = rr - rr == 0;
    active = finite && rr > stop;
  }
};

// f(i) for i < n, shared among the group's threads. Not unrolled: vectors are short, registers scarce.
template <typename F>
__device__ __forceinline__ void each_element(int64_t n, F&& f) {
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < n; i += kGroupThreads) f(i);
}

// to[i] = from[i] for i < n, shared among the group's threads, in accesses of kWidth elements. The loads come first,
// for none could pass a store that might change what it reads.
template <int kWidth, typename T>
__device__ __forceinline__ void copy_elements(int64_t n, const T* from, T* to) {
  constexpr int kInFlight = 8, kStep = kGroupThreads * kWidth;
  for (int64_t i = threadIdx.x * kWidth; i < n; i += kInFlight * kStep) {
    T v[kInFlight][kWidth] = {};
#pragma unroll
    for (int l = 0; l < kInFlight; ++l)
      if (i + l * kStep < n) load(from + i + l * kStep, v[l]);
#pragma unroll
    for (int l = 0; l < kInFlight; ++l)
      if (i + l * kStep < n) store(to + i + l * kStep, v[l]);
  }
}

// Whether the directions of a layer are bounded.
template <typename T>
__host__ __device__ bool bounded(const EacgLayer<T>& layer) {
  return layer.max_norm < HUGE_VAL;
}

// What the blocks of a group know of their layer, and the two systems that they solve.
template <typename T>
struct Group {
  const EacgLayer<T>& in;
  const Work<T>& work;
  const int64_t n;
  const unsigned blocks, rank;  // of the group, and which of them this one is
  const int64_t row_begin, row_end;
  Scalars (&system)[kSystems];  // shared
  double (*const partial)[kWarp];
  T* vectors;  // [kVectors, n]: of the group's own for each block
  const T* h;  // this block's rows of H
  bool wide;   // whether rows of H and vectors can be read as Vectors
  // The first thread of warp k leads system k, and stores all of it after every change. Between the barriers around
  // that nothing is loaded from it, not even speculatively: what the leader needs is in its registers.
  Scalars led{};

  // shared: of shared_bytes, for the vectors and then the rows of H, as each fits
  __device__ __forceinline__ Group(const Layer<T>& layer, unsigned blocks_, unsigned rank_, T* shared, int shared_bytes,
                                   Scalars (&system_)[kSystems], double (*partial_)[kWarp])
      : in(layer.in), work(layer.work), n(in.n_out), blocks(blocks_), rank(rank_), row_begin(n * rank / blocks),
        row_end(n * (rank + 1) / blocks), system(system_), partial(partial_),
        vectors(work.vectors ? work.vectors + rank * kVectors * n : shared), h(in.bias_hessian + row_begin * n),
        wide(aligned(n, in.bias_hessian, vectors)) {
    const int64_t used = work.vectors ? 0 : kVectors * n, rows = (row_end - row_begin) * n;
    if ((used + rows) * int64_t(sizeof(T)) > shared_bytes) return;
    if (aligned(rows, h, shared + used)) copy_elements<Vector<T>::kSize>(rows, h, shared + used);
    else copy_elements<1>(rows, h, shared + used);
    h = shared + used;
    wide = aligned(n, h, vectors);
  }

  // x, r, p, A p (0 to 3) of a system.
  __device__ __forceinline__ T* vector(int which, int k) const { return vectors + (which * kSystems + k) * n; }

  // change(k) by the leader of each system.
  template <typename F>
  __device__ __forceinline__ void lead(F&& change) {
#pragma unroll
    for (int k = 0; k < kSystems; ++k) {
      if (int(threadIdx.x) != k * kWarp) continue;
      change(k);
      system[k] = led;
    }
    __syncthreads();
  }

  // The right-hand sides: x = 0, r = p = rhs. Returns |B'|, where it is needed.
  __device__ __forceinline__ double start(const EacgSettings& settings) {
    const bool measured = settings.truncated || bounded(in);
    const double s = n > 0 ? work.scalars[0] : 0, root = sqrt(s);
    double sums[kSums] = {};  // |u|^2, |B|^2, |rhs|^2 of either system
    each_element(n, [&](int64_t i) {
      const T u = work.u[i];
      // With a = 0 nothing is along it, and u = 0; but a NaN in B then stands in u alone, and must reach the solution.
      const T rhs[kSystems] = {s > 0 ? T(-double(u) / root) : u, in.grad_bias ? -in.grad_bias[i] : T(0)};
      sums[0] += double(u) * double(u);
      if (measured) sums[1] += work.squares[i];
#pragma unroll
      for (int k = 0; k < kSystems; ++k) {
        vector(0, k)[i] = T(0);
        vector(1, k)[i] = vector(2, k)[i] = rhs[k];
        sums[2 + k] += double(rhs[k]) * double(rhs[k]);
      }
    });
    block_sum(sums, partial);
    double across = 0;
    if (measured) {
      across = s > 0 ? sums[1] - sums[0] / s : sums[1];
      // Rounding can leave a small negative number where B is all along a; NaN must stay.
      across = across < 0 ? 0 : sqrt(across);
    }
    lead([&](int k) {
      led.start(in.alpha, k == 0 ? (1 - in.alpha) * s : 1 - in.alpha, sums[2 + k],
                k == 0 && settings.truncated ? -across : 0, settings.tol);
    });
    return across;
  }

  // One iteration of both systems.
  __device__ __forceinline__ void iterate(int iteration) {
    // The two halves of hp alternate: a block may write the next products while another still reads these.
    T* const hp = work.hp + (iteration & 1) * kSystems * n;
    for (int64_t row = row_begin + threadIdx.x / kWarp; row < row_end; row += kGroupThreads / kWarp) {
      T products[kSystems];
      row_products(n, wide, h + (row - row_begin) * n, vector(2, 0), vector(2, 1), products);
      if (threadIdx.x % kWarp == 0) {
        hp[row] = products[0];
        hp[n + row] = products[1];
      }
    }
    group_barrier(work.arrived, blocks, iteration + 1);

    double curvature[kSystems] = {}, residual[kSystems] = {};
#pragma unroll
    for (int k = 0; k < kSystems; ++k) {
      if (!system[k].active) continue;
      each_element(n, [&](int64_t i) {
        const T p = vector(2, k)[i], ap = T(system[k].scale) * hp[k * n + i] + T(system[k].shift) * p;
        vector(3, k)[i] = ap;
        curvature[k] += double(p) * double(ap);
      });
    }
    block_sum(curvature, partial);
    lead([&](int k) { led.found_curvature(curvature[k]); });
    const bool stepping[kSystems] = {system[0].active, system[1].active};
#pragma unroll
    for (int k = 0; k < kSystems; ++k) {
      if (!stepping[k]) continue;
      each_element(n, [&](int64_t i) {
        vector(0, k)[i] += T(system[k].step) * vector(2, k)[i];
        const T r = vector(1, k)[i] - T(system[k].step) * vector(3, k)[i];
        vector(1, k)[i] = r;
        residual[k] += double(r) * double(r);
      });
    }
    block_sum(residual, partial);
    lead([&](int k) { led.found_residual(residual[k]); });
#pragma unroll
    for (int k = 0; k < kSystems; ++k) {
      if (!stepping[k]) continue;
      const T beta = T(system[k].beta);
      each_element(n, [&](int64_t i) { vector(2, k)[i] = vector(1, k)[i] + beta * vector(2, k)[i]; });
    }
    __syncthreads();
  }

  // c, w and d from the solutions, shortened where they are too long; the iterations. By one block of the group.
  __device__ __forceinline__ void finish(bool truncated, double across, int* not_finite) const {
    const double s = n > 0 ? work.scalars[0] : 0, root = sqrt(s);
    // -1/alpha in the closed form; the extra coordinate, undone from its length |B'|, in the truncated one.
    double c = truncated ? (across == 0 ? 0 : system[0].extra_x / across) : -1 / in.alpha;
    // |P_ij| <= |c| max_j |B_ij| + |w_i| |a|, and |V| <= max |P| / (1 - mu): neither momentum mu V + P nor update lr V
    // may overflow, now or later. What is not finite is not below the bound either.
    const double reach = std::fmax(1.0, std::abs(in.lr)) / std::fmax(1e-3, 1 - in.momentum);
    bool finite = std::abs(c) <= kLargest<T>;
    double squares[1] = {};  // |v|^2 + |d|^2
    each_element(n, [&](int64_t i) {
      const T x = system[0].finite ? vector(0, 0)[i] : T(NAN), d = system[1].finite ? vector(0, 1)[i] : T(NAN);
      const T w = s > 0 ? T((double(x) * root - c * double(work.u[i])) / s) : x;
      work.w[i] = w;
      work.d[i] = d;
      squares[0] += double(x) * double(x) + double(d) * double(d);
      const double bound = std::abs(c) * double(work.largest[i]) + std::abs(double(w)) * std::fmax(1.0, root);
      finite = finite && bound * reach <= kLargest<T> / 8 && std::abs(double(d)) * reach <= kLargest<T> / 8;
    });
    finite = __syncthreads_and(finite);
    if (bounded(in)) {
      block_sum(squares, partial);
      // c B' and v a^T / sqrt(s) are orthogonal.
      const double norm = sqrt(c * c * across * across + squares[0]);
      if (norm > in.max_norm) {
        const double factor = in.max_norm / norm;
        c *= factor;
        each_element(n, [&](int64_t i) {
          work.w[i] = T(factor * work.w[i]);
          work.d[i] = T(factor * work.d[i]);
        });
      }
    }
    if (threadIdx.x == 0) {
      work.scalars[1] = c;
      *in.iterations = finite || !not_finite ? system[0].iterations : -1;
      if (!finite && not_finite) atomicOr(not_finite, 1);
    }
  }
};

// The solve, from rhs to P's factors c and w and to the bias direction, shortened where they are too long. Parallel
// over layers, a group of blocks each, that must all be resident.
//   not_finite [1] or null; dynamic shared memory: [kVectors, n_out] vectors, then this block's rows of H, as each fits
template <typename T>
__global__ void __launch_bounds__(kGroupThreads, 1)
    directions_kernel(const Layers<T> __grid_constant__ layers, const Blocks __grid_constant__ division,
                      EacgSettings settings, int shared_bytes, int* not_finite) {
  DYN_SHARED(T, shared);
  __shared__ double partial[kSums][kWarp];
  __shared__ Scalars system[kSystems];
  const int l = division.layer(layers.count, blockIdx.x);
  Group<T> group(layers.layer[l], division.first[l + 1] - division.first[l], blockIdx.x - division.first[l], shared,
                 shared_bytes, system, partial);
  const double across = group.start(settings);
  for (int iteration = 0; iteration < settings.max_iter && (system[0].active || system[1].active); ++iteration)
    group.iterate(iteration);
  if (group.rank == 0) group.finish(settings.truncated, across, not_finite);
}

// Elements [j, j + width) of a row: p = c b + w a; v = momentum v + p where v is given; x = keep x + lr (v or p).
//   b, a, v, x [width], from the row's j-th element on
template <bool kUpdate, typename T, typename Width>
__device__ __forceinline__ void apply(Width width, T c, const T* b, T w, const T* a, T lr, T keep, T momentum, T* v,
                                      T* x) {
  T p[width.value], t[width.value];
  load(b, p);
  load(a, t);
#pragma unroll
  for (int e = 0; e < width.value; ++e) p[e] = c * p[e] + w * t[e];
  if constexpr (kUpdate) {
    if (v) {
      load(v, t);
#pragma unroll
      for (int e = 0; e < width.value; ++e) p[e] = momentum * t[e] + p[e];
      store(v, p);
    }
    load(x, t);
#pragma unroll
    for (int e = 0; e < width.value; ++e) p[e] = keep * t[e] + lr * p[e];
  }
  store(x, p);
}

// kUpdate: weight and bias += lr * direction; else they become the direction. Parallel over the rows of every weight.
//   not_finite [1] or null: the update of no layer, where it is not 0
template <bool kUpdate, typename T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    update_kernel(const Layers<T> __grid_constant__ layers, const Blocks __grid_constant__ division,
                  const int* __restrict__ not_finite) {
  if (kUpdate && *not_finite) return;
  const int l = division.layer(layers.count, blockIdx.x);
  const EacgLayer<T>& in = layers.layer[l].in;
  const Work<T>& work = layers.layer[l].work;
  const int64_t row = int64_t(blockIdx.x - division.first[l]) * kRowsPerBlock + threadIdx.x / kWarp, n = in.n_in;
  if (row >= in.n_out) return;
  const T c = T(work.scalars[1]), w = work.w[row];
  const T lr = T(in.lr), keep = T(1) - T(in.lr * in.weight_decay), momentum = T(in.momentum);
  const T* b = in.grad_weight + row * n;
  T *x = in.weight + row * n, *v = in.weight_momentum ? in.weight_momentum + row * n : nullptr;
  each_column<T>(
      n, aligned(n, in.grad_weight, in.mean_input, in.weight, in.weight_momentum), [&](int64_t j, auto width) {
        apply<kUpdate>(width, c, b + j, w, in.mean_input + j, lr, keep, momentum, v ? v + j : nullptr, x + j);
      });
  if (in.bias && threadIdx.x % kWarp == 0) {
    const T* d = work.d + row;
    T* const bias_momentum = in.bias_momentum ? in.bias_momentum + row : nullptr;
    apply<kUpdate>(Width<1>{}, T(1), d, T(0), d, lr, keep, momentum, bias_momentum, in.bias + row);
  }
}

// One launch's layers with their groups and memory. The plan depends on the layers' sizes and the device alone, so that
// every launcher that is given them lays the workspace out alike.
template <typename T>
struct Plan {
  Layers<T> layers;
  Blocks groups;  // of directions_kernel
  Blocks rows;    // of the kernels that give a warp to a row
  int shared_bytes;
};

// H takes at least this many bytes for each block of a group: with less the group's barrier costs more than the
// products.
constexpr int64_t kBytesPerBlock = 32 << 10;

// The dynamic shared memory that a block of directions_kernel may have.
int shared_limit(const Device& device) {
  return std::max(0, device.shared_bytes - int(sizeof(double) * kSums * kWarp + sizeof(Scalars) * kSystems));
}

// Calls f(plan) for every kLayersPerLaunch layers; returns the bytes of workspace. `workspace` may be null, to measure.
template <typename T, typename F>
size_t each_plan(const EacgLayer<T>* layers, int count, void* workspace, const Device& device, F&& f) {
  size_t used = 0;
  const auto take = [&](auto*& pointer, int64_t elements) {
    pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(reinterpret_cast<uintptr_t>(workspace) + used);
    used += ceil_div<size_t>(elements * sizeof(*pointer), 16) * 16;
  };
  unsigned* arrived;
  take(arrived, count);
  const int most = std::min(kLayersPerLaunch, device.multiprocessors);  // one block on a multiprocessor is resident
  Plan<T> plan;
  for (int begin = 0; begin < count; begin += most) {
    const int end = std::min(count, begin + most);
    plan.layers.count = end - begin;
    // The finest division of the matrices for which all blocks are resident.
    std::vector<unsigned> blocks(end - begin);
    for (int64_t bytes = kBytesPerBlock;; bytes *= 2) {
      unsigned total = 0;
      for (int l = begin; l < end; ++l) {
        const int64_t n = layers[l].n_out, matrix = n * n * int64_t(sizeof(T));
        total += blocks[l - begin] = unsigned(std::clamp<int64_t>(ceil_div(matrix, bytes), 1, device.multiprocessors));
      }
      if (total <= unsigned(device.multiprocessors)) break;
    }
    plan.shared_bytes = 0;
    const int64_t limit = shared_limit(device);
    for (int l = 0; l < end - begin; ++l) {
      const EacgLayer<T>& in = layers[begin + l];
      const int64_t n = in.n_out, vectors = kVectors * n, rows = ceil_div<int64_t>(n, blocks[l]) * n;
      Work<T> work{};
      take(work.scalars, 2);
      take(work.squares, n);
      take(work.largest, n);
      take(work.u, n);
      take(work.w, n);
      take(work.d, n);
      take(work.hp, 2 * kSystems * n);
      const auto fits = [&](int64_t elements) { return elements * int64_t(sizeof(T)) <= limit; };
      if (!fits(vectors)) take(work.vectors, blocks[l] * vectors);
      const int64_t kept = fits(vectors) ? vectors : 0, elements = fits(kept + rows) ? kept + rows : kept;
      plan.shared_bytes = std::max(plan.shared_bytes, int(elements * int64_t(sizeof(T))));
      work.arrived = arrived + begin + l;
      plan.layers.layer[l] = {in, work};
      plan.groups.first[l + 1] = plan.groups.first[l] + blocks[l];
      plan.rows.first[l + 1] = plan.rows.first[l] + unsigned(ceil_div<int64_t>(n, kRowsPerBlock));
    }
    f(plan);
  }
  return used;
}

template <bool kUpdate, typename T>
void launch_updates(const EacgLayer<T>* layers, int count, void* workspace, const int* not_finite, const Device& device,
                    cudaStream_t stream) {
  each_plan(layers, count, workspace, device, [&](const Plan<T>& plan) {
    if (const unsigned blocks = plan.rows.first[plan.layers.count])
      LAUNCH((update_kernel<kUpdate, T>), blocks, kRowThreads, 0, stream, plan.layers, plan.rows, not_finite);
  });
}

}  // namespace

template <typename T>
size_t eacg_workspace(const EacgLayer<T>* layers, int count, const Device& device) {
  return each_plan(layers, count, nullptr, device, [](const Plan<T>&) {});
}

template <typename T>
void eacg_directions(const EacgLayer<T>* layers, int count, const EacgSettings& settings, void* workspace,
                     int* not_finite, const Device& device, cudaStream_t stream) {
  cudaMemsetAsync(workspace, 0, count * sizeof(unsigned), stream);  // the barriers' counts come first in the workspace
  const bool squares = settings.truncated || std::any_of(layers, layers + count, bounded<T>);
  // The same for all calls, since other host threads may be between this and their launch.
  cudaFuncSetAttribute(directions_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_limit(device));
  each_plan(layers, count, workspace, device, [&](const Plan<T>& plan) {
    if (const unsigned blocks = plan.rows.first[plan.layers.count])
      LAUNCH(products_kernel<T>, blocks, kRowThreads, 0, stream, plan.layers, plan.rows, squares);
    LAUNCH_COOPERATIVE(directions_kernel<T>, plan.groups.first[plan.layers.count], kGroupThreads, plan.shared_bytes,
                       stream, plan.layers, plan.groups, settings, plan.shared_bytes, not_finite);
  });
}

template <typename T>
void eacg_write(const EacgLayer<T>* layers, int count, void* workspace, const Device& device, cudaStream_t stream) {
  launch_updates<false>(layers, count, workspace, nullptr, device, stream);
}

template <typename T>
void eacg_update(const EacgLayer<T>* layers, int count, void* workspace, const int* not_finite, const Device& device,
                 cudaStream_t stream) {
  launch_updates<true>(layers, count, workspace, not_finite, device, stream);
}

#define INSTANTIATE(T)                                                                                     \
  template size_t eacg_workspace(const EacgLayer<T>*, int, const Device&);                                 \
  template void eacg_directions(const EacgLayer<T>*, int, const EacgSettings&, void*, int*, const Device&, \
                                cudaStream_t);                                                             \
  template void eacg_write(const EacgLayer<T>*, int, void*, const Device&, cudaStream_t);                  \
  template void eacg_update(const EacgLayer<T>*, int, void*, const int*, const Device&, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace secondorder::cuda
