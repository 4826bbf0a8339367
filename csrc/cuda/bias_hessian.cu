// bias_hessian: one step of the backward recursion of the bias Hessian (Chen et al., Eq. 6 and 8b),
//
//   G = (W^T H W) * (d1^T d1 / m) + diag(PosEig_gamma(sum_i d2_i * grad_input_i)),   * elementwise
//
// All three products have the form X^T Y with row-major X and Y (H is symmetric), so one tile loop serves them all and
// every load runs along rows. A first launch stores what depends on no other product: H W, the tiles of d1^T d1's lower
// triangle and the diagonal's column sums, the batch divided among blocks where the tiles alone are too few for the
// device. The second gives a block to each tile of G's lower triangle: W^T (H W), multiplied by the sum of the batch's
// parts, always in the same order, finished and stored with the mirror image. d1 and d2 are made from the activation
// where they are loaded: nothing of size [m, n] is ever written.
#include <algorithm>

#include "activation.cuh"
#include "kernels.h"
#include "tensor_cores.cuh"

namespace secondorder::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kOperandBytes = 8 << 10;  // of X and of Y in shared memory at a time, but for padding
constexpr int kPartRows = 128;          // of the batch at least, that a block of the first launch sums over

// A tile of kTile x kTile elements, and how the block loads its operands. Simt and TensorCores say how it computes
// them:
//   kStride               of a row of an operand in shared memory
//   prepare(v)            what an operand's element v is stored as there
//   kCount                elements of the tile that a thread accumulates
//   multiply(x, y, acc)   acc += x^T y over kDepth rows of both operands
//   each(f)               f(i, row, col): where acc[i] stands in the tile
template <typename T_, int kTile_>
struct Tile {
  using T = T_;
  static constexpr int kTile = kTile_;
  static constexpr int kVector = Vector<T>::kSize;
  static constexpr int kDepth = kOperandBytes / (kTile * sizeof(T));  // rows of an operand in shared memory
  static constexpr int kLoadRows = kThreads * kVector / kTile;        // rows that the block loads at once
  static constexpr int kLoads = kDepth / kLoadRows;
  static constexpr int kBlocks = sizeof(T) * kTile * kTile <= 1 << 14 ? 2 : 1;  // on a multiprocessor: bounds registers
  static_assert(kLoads * kLoadRows == kDepth);
};

// Plain multiply-adds, kPer x kPer elements to a thread: kPer / kRun runs of kRun neighbours, apart by the width of all
// threads' runs, so that neighbouring threads read neighbouring words of shared memory.
template <typename T, int kTile>
struct Simt : Tile<T, kTile> {
  using Tile<T, kTile>::kDepth;
  static constexpr int kSide = 16;  // threads along one side of the tile
  static constexpr int kPer = kTile / kSide;
  static constexpr int kRun = 4;
  static constexpr int kStride = kTile;
  static constexpr int kCount = kPer * kPer;
  static_assert(kSide * kSide == kThreads && kPer % kRun == 0);

  static __device__ __forceinline__ T prepare(T v) { return v; }

  static __device__ __forceinline__ int offset(int thread, int i) {
    return i / kRun * (kRun * kSide) + thread * kRun + i % kRun;
  }

  static __device__ __forceinline__ void multiply(const T (&x)[kDepth][kStride], const T (&y)[kDepth][kStride],
                                                  T (&acc)[kCount]) {
    const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      T a[kPer], b[kPer];
#pragma unroll
      for (int i = 0; i < kPer; ++i) a[i] = x[d][offset(ty, i)];
#pragma unroll
      for (int j = 0; j < kPer; ++j) b[j] = y[d][offset(tx, j)];
#pragma unroll
      for (int i = 0; i < kPer; ++i)
#pragma unroll
        for (int j = 0; j < kPer; ++j) acc[i * kPer + j] += a[i] * b[j];
    }
  }

  template <typename F>
  static __device__ __forceinline__ void each(F&& f) {
    const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
#pragma unroll
    for (int i = 0; i < kPer; ++i)
#pragma unroll
      for (int j = 0; j < kPer; ++j) f(i * kPer + j, offset(ty, i), offset(tx, j));
  }
};

// A lane's part of an operand of mma_m16n8k8. kSplit: each number is large + small, to 23 bits at least.
template <int kSize, bool kSplit>
struct Fragment {
  float large[kSize], small[kSize];

  __device__ __forceinline__ void set(int e, float v) {
    if constexpr (kSplit) split_tf32(v, large[e], small[e]);
    else large[e] = v;
  }
};

// Tensor cores in TF32, the tile divided among 2 x 4 warps. Numbers are rounded once, when they are stored in shared
// memory. With kSplit they are split when they are read, for there is no room for both halves there; three products
// make up one of float32's accuracy, a b = large large + large small + small large. The hardware truncates its sums
// where it should round them: they are kept short, and added up outside.
template <int kTile, bool kSplit>
struct TensorCores : Tile<float, kTile> {
  using Tile<float, kTile>::kDepth;
  static constexpr int kWarpRows = 2, kWarpCols = 4;
  static constexpr int kHeight = kTile / kWarpRows, kWidth = kTile / kWarpCols;  // of a warp's part
  static constexpr int kRowTiles = kHeight / 16, kColTiles = kWidth / 8;         // of mma_m16n8k8 in it
  static constexpr int kStride = kTile + 8;  // no two lanes of a fragment's load meet in a bank
  static constexpr int kCount = kRowTiles * kColTiles * 4;
  static constexpr int kSteps = kSplit && kTile > 64 ? 1 : 2;  // unrolled, as registers allow
  static_assert(kWarpRows * kWarpCols * kWarp == kThreads);

  static __device__ __forceinline__ float prepare(float v) { return kSplit ? v : to_tf32(v); }

  static __device__ __forceinline__ void multiply(const float (&x)[kDepth][kStride], const float (&y)[kDepth][kStride],
                                                  float (&acc)[kCount]) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, group = lane / 4, member = lane % 4;
    const int row = warp / kWarpCols * kHeight + group, col = warp % kWarpCols * kWidth + group;
#pragma unroll kSteps
    for (int d = 0; d < kDepth; d += 8) {
      Fragment<2, kSplit> b[kColTiles];
#pragma unroll
      for (int j = 0; j < kColTiles; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) b[j].set(e, y[d + member + e * 4][col + j * 8]);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        Fragment<4, kSplit> a;
#pragma unroll
        for (int e = 0; e < 4; ++e) a.set(e, x[d + member + e / 2 * 4][row + i * 16 + e % 2 * 8]);
#pragma unroll
        for (int j = 0; j < kColTiles; ++j) {
          float* const target = acc + (i * kColTiles + j) * 4;
          if constexpr (kSplit) {
            float sum[4] = {};
            mma_m16n8k8(sum, a.small, b[j].large);
            mma_m16n8k8(sum, a.large, b[j].small);
            mma_m16n8k8(sum, a.large, b[j].large);
#pragma unroll
            for (int e = 0; e < 4; ++e) target[e] += sum[e];
          } else {
            mma_m16n8k8(target, a.large, b[j].large);
          }
        }
      }
    }
  }

  template <typename F>
  static __device__ __forceinline__ void each(F&& f) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, group = lane / 4, member = lane % 4;
    const int row = warp / kWarpCols * kHeight + group, col = warp % kWarpCols * kWidth + member * 2;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < kColTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) f((i * kColTiles + j) * 4 + e, row + i * 16 + e / 2 * 8, col + j * 8 + e % 2);
  }
};

template <typename S>
struct Operands {
  typename S::T x[2][S::kDepth][S::kStride];  // [stage of the double buffer]
  typename S::T y[2][S::kDepth][S::kStride];
};

// v = the elements [row, col .. col + kVector) of a row-major [rows, cols] matrix, 0 outside; `vectors`: aligned.
template <int kVector, typename T>
__device__ __forceinline__ void fetch(const T* matrix, int64_t rows, int64_t cols, bool vectors, int64_t row,
                                      int64_t col, T (&v)[kVector]) {
  const T* p = matrix + row * cols + col;
  if (vectors && row < rows && col < cols) return load(p, v);
#pragma unroll
  for (int e = 0; e < kVector; ++e) v[e] = row < rows && col + e < cols ? p[e] : T(0);
}

// An operand in device memory. `fetch` begins to load the elements [row, col .. col + kVector) into a Raw, and `finish`
// makes the operand's of them: what it computes waits for the loads, so that it comes after the products of the chunk
// before.
template <typename T>
struct Matrix {
  static constexpr int kVector = Vector<T>::kSize;
  const T* matrix;
  int64_t rows, cols;
  bool vectors;
  struct Raw {
    T v[kVector];
  };

  __device__ __forceinline__ void fetch(int64_t row, int64_t col, Raw& raw) const {
    cuda::fetch(matrix, rows, cols, vectors, row, col, raw.v);
  }
  __device__ __forceinline__ void finish(int64_t, int64_t, const Raw& raw, T (&v)[kVector]) const {
#pragma unroll
    for (int e = 0; e < kVector; ++e) v[e] = raw.v[e];
  }
};

template <typename T>
struct FirstDerivative {
  static constexpr int kVector = Vector<T>::kSize;
  const Derivatives<T>& source;
  int64_t rows, cols;
  bool vectors;
  struct Raw {
    T v[kVector];
  };

  __device__ __forceinline__ void fetch(int64_t row, int64_t col, Raw& raw) const {
    cuda::fetch(source.first, rows, cols, vectors, row, col, raw.v);
  }
  __device__ __forceinline__ void finish(int64_t row, int64_t col, const Raw& raw, T (&v)[kVector]) const {
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      v[e] = raw.v[e];
      if (!source.analytic) continue;
      T second;
      derivatives(source.activation, raw.v[e], source.parameter, v[e], second);
      if (row >= rows || col + e >= cols) v[e] = T(0);  // sigma' of the fetched 0 need not be 0
    }
  }
};

// acc += X^T Y over the rows [begin, end), X's columns from x_col and Y's from y_col on. Ends without a barrier.
template <typename S, typename X, typename Y>
__device__ __forceinline__ void multiply(typename S::T (&acc)[S::kCount], Operands<S>& operands, int64_t begin,
                                         int64_t end, const X& x, int64_t x_col, const Y& y, int64_t y_col) {
  const int load_row = threadIdx.x / (S::kTile / S::kVector);
  const int load_col = threadIdx.x % (S::kTile / S::kVector) * S::kVector;
  typename X::Raw raw_x[S::kLoads];
  typename Y::Raw raw_y[S::kLoads];
  const auto fetch_chunk = [&](int64_t k) {
#pragma unroll
    for (int l = 0; l < S::kLoads; ++l) {
      x.fetch(k + load_row + l * S::kLoadRows, x_col + load_col, raw_x[l]);
      y.fetch(k + load_row + l * S::kLoadRows, y_col + load_col, raw_y[l]);
    }
  };
  const auto store_one = [&](const auto& operand, int64_t row, int64_t col, const auto& raw, typename S::T* target) {
    typename S::T v[S::kVector];
    operand.finish(row, col, raw, v);
#pragma unroll
    for (int e = 0; e < S::kVector; ++e) v[e] = S::prepare(v[e]);
    store(target, v);
  };
  const auto store_chunk = [&](int64_t k, int stage) {
#pragma unroll
    for (int l = 0; l < S::kLoads; ++l) {
      const int row = load_row + l * S::kLoadRows;
      store_one(x, k + row, x_col + load_col, raw_x[l], &operands.x[stage][row][load_col]);
      store_one(y, k + row, y_col + load_col, raw_y[l], &operands.y[stage][row][load_col]);
    }
  };
  fetch_chunk(begin);
  int stage = 0;
  for (int64_t k = begin; k < end; k += S::kDepth, stage ^= 1) {
    store_chunk(k, stage);
    __syncthreads();
    if (k + S::kDepth < end) fetch_chunk(k + S::kDepth);  // in flight while this chunk is multiplied
    S::multiply(operands.x[stage], operands.y[stage], acc);
  }
}

// How the work is divided among blocks, and the workspace.
template <typename T>
struct Work {
  int64_t side;         // tiles along a side of G
  int64_t tiles;        // of its lower triangle
  int64_t parts, rows;  // of the batch, and rows of a part
  T* product;           // [k, n] H W
  T* moments;           // [parts, tiles, kTile * kTile] d1^T d1 of a part, each tile as the threads accumulate it
  double* sums;         // [parts, side * kTile] sum_i d2_i * grad_input_i of a part

  __device__ __forceinline__ int64_t end(int64_t part, int64_t m) const {
    return (part + 1) * rows < m ? (part + 1) * rows : m;
  }
};

// Where a tile of the lower triangle stands: it is number row (row + 1) / 2 + col.
struct Position {
  int64_t row, col;
};

__device__ __forceinline__ Position tile_position(int64_t number) {
  int64_t row = int64_t((std::sqrt(8.0 * number + 1.0) - 1.0) / 2.0);  // exact to one
  while (row * (row + 1) / 2 > number) --row;
  while ((row + 1) * (row + 2) / 2 <= number) ++row;
  return {row, number - row * (row + 1) / 2};
}

// The first of a thread's elements of one tile of one part of the moments; it has kVector at every kVector * kThreads.
template <typename S, typename T>
__device__ __forceinline__ T* moment_of(const Work<T>& work, int64_t part, int64_t tile) {
  return work.moments + (part * work.tiles + tile) * (S::kTile * S::kTile) + threadIdx.x * S::kVector;
}

// sums [kTile] = sum_i d2_i * grad_input_i over the rows [begin, end), of the columns from col0 on.
//   parts [kLoadRows, kTile] shared
template <typename S, typename T>
__device__ __forceinline__ void column_sums(const Derivatives<T>& source, int64_t begin, int64_t end, int64_t n,
                                            int64_t col0, double* parts, double* sums) {
  constexpr int kVector = S::kVector;
  const int64_t load_row = threadIdx.x / (S::kTile / kVector);
  const int64_t col = col0 + threadIdx.x % (S::kTile / kVector) * kVector;
  const T* const values = source.analytic ? source.first : source.second;
  const bool vectors = aligned(n, values, source.grad_input);
  double sum[kVector] = {};
#pragma unroll 4
  for (int64_t row = begin + load_row; row < end; row += S::kLoadRows) {
    T value[kVector], grad[kVector];
    fetch(values, end, n, vectors, row, col, value);
    fetch(source.grad_input, end, n, vectors, row, col, grad);
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      T first, second = value[e];
      if (source.analytic) derivatives(source.activation, value[e], source.parameter, first, second);
      sum[e] += double(second) * double(grad[e]);
    }
  }
#pragma unroll
  for (int e = 0; e < kVector; ++e) parts[threadIdx.x * kVector + e] = sum[e];
  __syncthreads();
  if (threadIdx.x >= S::kTile) return;
  double total = 0;
  for (int r = 0; r < S::kLoadRows; ++r) total += parts[r * S::kTile + threadIdx.x];
  sums[threadIdx.x] = total;
}

// product = H^T W = H W, parallel over its tiles; the parts of d1^T d1, parallel over the parts and the tiles of the
// lower triangle; the parts of the diagonal's sums, parallel over the parts and the tiles' columns.
//   hessian [k, k], weight [k, n], derivatives' arrays [m, n]
template <typename S, typename T = typename S::T>
__global__ void __launch_bounds__(kThreads, S::kBlocks)
    products_kernel(int64_t k, int64_t n, int64_t m, const T* __restrict__ hessian, const T* __restrict__ weight,
                    const Derivatives<T> source, const Work<T> work) {
  __shared__ __align__(16) Operands<S> operands;
  T acc[S::kCount] = {};
  int64_t block = blockIdx.x;
  const int64_t product_tiles = ceil_div<int64_t>(k, S::kTile) * work.side;
  if (block < product_tiles) {
    const int64_t row0 = block / work.side * S::kTile, col0 = block % work.side * S::kTile;
    multiply<S>(acc, operands, 0, k, Matrix<T>{hessian, k, k, aligned(k, hessian)}, row0,
                Matrix<T>{weight, k, n, aligned(n, weight)}, col0);
    S::each([&](int i, int row_in_tile, int col_in_tile) {
      const int64_t row = row0 + row_in_tile, col = col0 + col_in_tile;
      if (row < k && col < n) work.product[row * n + col] = acc[i];
    });
    return;
  }
  block -= product_tiles;
  if (block < work.parts * work.tiles) {
    const int64_t part = block / work.tiles, tile = block % work.tiles, end = work.end(part, m);
    const Position position = tile_position(tile);
    const FirstDerivative<T> d1{source, end, n, aligned(n, source.first)};
    multiply<S>(acc, operands, part * work.rows, end, d1, position.row * S::kTile, d1, position.col * S::kTile);
    T* const moments = moment_of<S>(work, part, tile);
#pragma unroll
    for (int i = 0; i < S::kCount; i += S::kVector) {
      T v[S::kVector];
#pragma unroll
      for (int e = 0; e < S::kVector; ++e) v[e] = acc[i + e];
      store(moments + i * kThreads, v);
    }
    return;
  }
  block -= work.parts * work.tiles;
  static_assert(sizeof(operands) >= sizeof(double) * S::kLoadRows * S::kTile);
  const int64_t part = block / work.side, col0 = block % work.side * S::kTile;
  column_sums<S>(source, part * work.rows, work.end(part, m), n, col0, reinterpret_cast<double*>(&operands),
                 work.sums + part * work.side * S::kTile + col0);
}

// G. Parallel over the tiles of its lower triangle.   weight [k, n], out [n, n]
template <typename S, typename T = typename S::T>
__global__ void __launch_bounds__(kThreads, S::kBlocks)
    recursion_kernel(int64_t k, int64_t n, int64_t m, const T* __restrict__ weight, const Work<T> work,
                     bool with_diagonal, T gamma, T* __restrict__ out) {
  __shared__ __align__(16) Operands<S> operands;
  __shared__ T diagonal[S::kTile];
  const Position position = tile_position(blockIdx.x);
  const int64_t row0 = position.row * S::kTile, col0 = position.col * S::kTile;
  const bool with_sums = position.row == position.col && with_diagonal;
  if (with_sums && threadIdx.x < S::kTile) {
    double sum = 0;
    for (int64_t part = 0; part < work.parts; ++part)
      sum += work.sums[part * work.side * S::kTile + row0 + threadIdx.x];
    diagonal[threadIdx.x] = pos_eig(T(sum), gamma);
  }
  T g[S::kCount] = {};  // W^T (H W) first
  multiply<S>(g, operands, 0, k, Matrix<T>{weight, k, n, aligned(n, weight)}, row0,
              Matrix<T>{work.product, k, n, aligned(n, work.product)}, col0);
  __syncthreads();  // the diagonal is there

  const T inverse_batch = T(1) / T(m);
  constexpr int kGroup = 16;                                            // elements at a time
  [[maybe_unused]] constexpr int kUnroll = 256 / (kGroup * sizeof(T));  // parts in flight
#pragma unroll
  for (int i = 0; i < S::kCount; i += kGroup) {
    T moment[kGroup] = {};
#pragma unroll kUnroll
    for (int64_t part = 0; part < work.parts; ++part) {
      const T* const moments = moment_of<S>(work, part, blockIdx.x) + i * kThreads;
#pragma unroll
      for (int j = 0; j < kGroup; j += S::kVector) {
        T v[S::kVector];
        load(moments + j * kThreads, v);
#pragma unroll
        for (int e = 0; e < S::kVector; ++e) moment[j + e] += v[e];
      }
    }
#pragma unroll
    for (int j = 0; j < kGroup; ++j) g[i + j] *= moment[j] * inverse_batch;
  }
  S::each([&](int i, int row_in_tile, int col_in_tile) {
    const int64_t row = row0 + row_in_tile, col = col0 + col_in_tile;
    if (row >= n || col > row) return;
    if (row == col && with_sums) g[i] += diagonal[row_in_tile];
    out[row * n + col] = g[i];
    out[col * n + row] = g[i];
  });
}

constexpr int kCombined = 32;     // rows and columns of a tile of combine_kernel
constexpr int kCombinedRows = 8;  // of threads

// G from whole products, parallel over the tiles of its lower triangle; the mirror image goes through shared memory, so
// that both are stored along rows.   curvature, moment, out [n, n], sums [n] or null
template <typename T>
__global__ void __launch_bounds__(kCombined* kCombinedRows)
    combine_kernel(int64_t n, int64_t m, const T* __restrict__ curvature, const T* __restrict__ moment,
                   const double* __restrict__ sums, T gamma, T* __restrict__ out) {
  __shared__ T tile[kCombined][kCombined + 1];
  const Position position = tile_position(blockIdx.x);
  const int64_t row0 = position.row * kCombined, col0 = position.col * kCombined;
  const int lane = threadIdx.x % kCombined, line = threadIdx.x / kCombined;
  const T inverse_batch = T(1) / T(m);
#pragma unroll
  for (int r = line; r < kCombined; r += kCombinedRows) {
    const int64_t row = row0 + r, col = col0 + lane;
    if (row >= n || col > row) continue;
    T g = curvature[row * n + col] * (moment[row * n + col] * inverse_batch);
    if (row == col && sums) g += pos_eig(T(sums[row]), gamma);
    out[row * n + col] = tile[r][lane] = g;
  }
  __syncthreads();
#pragma unroll
  for (int r = line; r < kCombined; r += kCombinedRows) {
    const int64_t row = col0 + r, col = row0 + lane;
    if (col < n && col > row) out[row * n + col] = tile[lane][r];
  }
}

// Fills in `work` for tiles of shape S; returns the bytes of workspace. `workspace` may be null, to measure.
template <typename S, typename T = typename S::T>
size_t divide(int64_t k, int64_t n, int64_t m, const Device& device, void* workspace, Work<T>& work) {
  work.side = ceil_div<int64_t>(n, S::kTile);
  work.tiles = work.side * (work.side + 1) / 2;
  // Two blocks for each multiprocessor, unless the parts became too short for the loads' latency.
  const int64_t wanted = std::clamp<int64_t>(ceil_div<int64_t>(2 * int64_t(device.multiprocessors), work.tiles), 1,
                                             ceil_div<int64_t>(m, kPartRows));
  work.rows = ceil_div<int64_t>(ceil_div(m, wanted), S::kDepth) * S::kDepth;
  work.parts = ceil_div(m, work.rows);
  size_t used = 0;
  const auto take = [&](auto*& pointer, int64_t elements) {
    pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(reinterpret_cast<uintptr_t>(workspace) + used);
    used += ceil_div<size_t>(elements * sizeof(*pointer), 16) * 16;
  };
  take(work.product, k * n);
  take(work.moments, work.parts * work.tiles * S::kTile * S::kTile);
  take(work.sums, work.parts * work.side * S::kTile);
  return used;
}

// f(shape): how the tiles are computed.
template <typename T, typename F>
auto with_shape(int64_t n, Arithmetic arithmetic, const Device& device, F&& f) {
  if constexpr (sizeof(T) == 4) {
    // The large tile reads shared memory half as often per product, but pays only where there are enough of them.
    // Double's accumulators would not fit the registers.
    const int64_t tiles = ceil_div<int64_t>(n, 128);
    const bool large = tiles * (tiles + 1) / 2 >= device.multiprocessors;
    switch (arithmetic) {
      case Arithmetic::plain: return large ? f(Simt<T, 128>{}) : f(Simt<T, 64>{});
      case Arithmetic::split_tf32: return large ? f(TensorCores<128, true>{}) : f(TensorCores<64, true>{});
      case Arithmetic::tf32: return large ? f(TensorCores<128, false>{}) : f(TensorCores<64, false>{});
    }
  }
  return f(Simt<T, 64>{});
}

}  // namespace

template <typename T>
size_t bias_hessian_workspace(int64_t k, int64_t n, int64_t m, Arithmetic arithmetic, const Device& device) {
  if (n == 0) return 0;
  return with_shape<T>(n, arithmetic, device, [&](auto shape) {
    Work<T> work;
    return divide<decltype(shape)>(k, n, m, device, nullptr, work);
  });
}

template <typename T>
void bias_hessian(int64_t k, int64_t n, int64_t m, const T* hessian, const T* weight, const Derivatives<T>& derivatives,
                  T gamma, Arithmetic arithmetic, void* workspace, T* out, const Device& device, cudaStream_t stream) {
  if (n == 0) return;
  with_shape<T>(n, arithmetic, device, [&](auto shape) {
    using S = decltype(shape);
    Work<T> work;
    divide<S>(k, n, m, device, workspace, work);
    const int64_t columns = derivatives.grad_input ? work.side : 0;
    const int64_t blocks = ceil_div<int64_t>(k, S::kTile) * work.side + work.parts * (work.tiles + columns);
    LAUNCH((products_kernel<S>), unsigned(blocks), kThreads, 0, stream, k, n, m, hessian, weight, derivatives, work);
    LAUNCH((recursion_kernel<S>), unsigned(work.tiles), kThreads, 0, stream, k, n, m, weight, work,
           derivatives.grad_input != nullptr, gamma, out);
  });
}

template <typename T>
void bias_hessian_of_products(int64_t n, int64_t m, const T* curvature, const T* moment, const double* sums, T gamma,
                              T* out, cudaStream_t stream) {
  const int64_t side = ceil_div<int64_t>(n, kCombined);
  if (n == 0) return;
  LAUNCH(combine_kernel<T>, unsigned(side * (side + 1) / 2), kCombined * kCombinedRows, 0, stream, n, m, curvature,
         moment, sums, gamma, out);
}

#define INSTANTIATE(T)                                                                                            \
  template size_t bias_hessian_workspace<T>(int64_t, int64_t, int64_t, Arithmetic, const Device&);                \
  template void bias_hessian(int64_t, int64_t, int64_t, const T*, const T*, const Derivatives<T>&, T, Arithmetic, \
                             void*, T*, const Device&, cudaStream_t);                                             \
  template void bias_hessian_of_products(int64_t, int64_t, const T*, const T*, const double*, T, T*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace secondorder::cuda
