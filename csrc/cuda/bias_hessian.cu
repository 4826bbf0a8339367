// bias_hessian: one step of the backward recursion of the bias Hessian (Chen et al., Eq. 6 and 8b),
//
//   G = (W^T H W) * (d1^T d1 / m) + diag(PosEig_gamma(sum_i d2_i * grad_input_i)),   * elementwise
//
// All three products have the form X^T Y with row-major X and Y (H is symmetric), so one tile loop serves them all and
// every load runs along rows. A first launch stores H W; the second gives a block to each tile of G's lower triangle,
// where both products are accumulated side by side in registers, multiplied, finished and stored with the mirror image.
// d1 and d2 are made from the activation while a tile is loaded, and the diagonal's column sums fall off the loads of
// the tiles on the diagonal: nothing of size [m, n] is ever written.
#include "activation.cuh"
#include "kernels.h"
#include "tensor_cores.cuh"

namespace secondorder::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kDepth = 16;  // rows of X and Y in shared memory at a time

// A tile of kTile x kTile elements, and how the block loads its operands. Simt and TensorCores say how it computes them:
//   kStride               of a row of an operand in shared memory
//   kCount                elements of the tile that a thread accumulates
//   multiply(x, y, acc)   acc += x^T y over kDepth rows of both operands
//   each(f)               f(i, row, col): where acc[i] stands in the tile
template <typename T_, int kTile_>
struct Tile {
  using T = T_;
  static constexpr int kTile = kTile_;
  static constexpr int kVector = Vector<T>::kSize;
  static constexpr int kLoadRows = kThreads * kVector / kTile;  // rows that the block loads at once
  static constexpr int kLoads = kDepth / kLoadRows;
  static constexpr int kBlocks = sizeof(T) * kTile * kTile <= 1 << 14 ? 2 : 1;  // on a multiprocessor: bounds registers
  static_assert(kLoads * kLoadRows == kDepth);
};

// Plain multiply-adds, kPer x kPer elements to a thread: kPer / kRun runs of kRun neighbours, apart by the width of all
// threads' runs, so that neighbouring threads read neighbouring words of shared memory.
template <typename T, int kTile>
struct Simt : Tile<T, kTile> {
  static constexpr int kSide = 16;  // threads along one side of the tile
  static constexpr int kPer = kTile / kSide;
  static constexpr int kRun = 4;
  static constexpr int kStride = kTile;
  static constexpr int kCount = kPer * kPer;
  static_assert(kSide * kSide == kThreads && kPer % kRun == 0);

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

// A lane's part of an operand of mma_m16n8k8. kSplit: each number is large + small to 22 bits.
template <int kSize, bool kSplit>
struct Fragment {
  float large[kSize], small[kSize];

  __device__ __forceinline__ void set(int e, float v) {
    large[e] = to_tf32(v);
    if constexpr (kSplit) small[e] = to_tf32(v - large[e]);
  }
};

// Tensor cores in TF32, the tile divided among 2 x 4 warps. With kSplit three products make up one of float32's accuracy,
// a b = large large + large small + small large. The hardware truncates its sums where it should round them: they
// are kept short, and added up outside.
template <int kTile, bool kSplit>
struct TensorCores : Tile<float, kTile> {
  static constexpr int kWarpRows = 2, kWarpCols = 4;
  static constexpr int kHeight = kTile / kWarpRows, kWidth = kTile / kWarpCols;  // of a warp's part
  static constexpr int kRowTiles = kHeight / 16, kColTiles = kWidth / 8;         // of mma_m16n8k8 in it
  static constexpr int kStride = kTile + 8;  // no two lanes of a fragment's load meet in a bank
  static constexpr int kCount = kRowTiles * kColTiles * 4;
  static_assert(kWarpRows * kWarpCols * kWarp == kThreads);

  static __device__ __forceinline__ void multiply(const float (&x)[kDepth][kStride], const float (&y)[kDepth][kStride],
                                                  float (&acc)[kCount]) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, group = lane / 4, member = lane % 4;
    const int row = warp / kWarpCols * kHeight + group, col = warp % kWarpCols * kWidth + group;
#pragma unroll
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
  typename S::T x[2][kDepth][S::kStride];  // [stage of the double buffer]
  typename S::T y[2][kDepth][S::kStride];
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

template <typename T>
struct Matrix {
  const T* matrix;
  int64_t rows, cols;
  bool vectors;

  template <int kVector>
  __device__ __forceinline__ void operator()(int64_t row, int64_t col, T (&v)[kVector]) const {
    fetch(matrix, rows, cols, vectors, row, col, v);
  }
};

// Loads d1; with `summing`, adds the products d2 * grad_input of the same elements to this thread's sums.
template <typename S, typename T = typename S::T>
struct FirstDerivative {
  const Derivatives<T>& source;
  int64_t rows, cols;
  bool vectors, summing;
  double (&sums)[S::kVector];

  template <int kVector>
  __device__ __forceinline__ void operator()(int64_t row, int64_t col, T (&v)[kVector]) const {
    fetch(source.first, rows, cols, vectors, row, col, v);
    if (!source.analytic && !summing) return;
    T second[kVector], grad[kVector] = {};
    if (summing) fetch(source.grad_input, rows, cols, vectors, row, col, grad);
    if (source.analytic) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        // Outside, sigma' of the fetched 0 need not be 0.
        const bool inside = row < rows && col + e < cols;
        derivatives(source.activation, v[e], source.parameter, v[e], second[e]);
        if (!inside) v[e] = second[e] = T(0);
      }
    } else {
      fetch(source.second, rows, cols, vectors, row, col, second);
    }
    if (summing) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) sums[e] += double(second[e]) * double(grad[e]);
    }
  }
};

// acc += X^T Y, X's columns from x_col and Y's from y_col on. Ends with a barrier.
template <typename S, typename X, typename Y>
__device__ __forceinline__ void multiply(typename S::T (&acc)[S::kCount], Operands<S>& operands, int64_t rows, const X& x,
                                         int64_t x_col, const Y& y, int64_t y_col) {
  using T = typename S::T;
  constexpr int kVector = S::kVector;
  const int load_row = threadIdx.x / (S::kTile / kVector), load_col = threadIdx.x % (S::kTile / kVector) * kVector;
  T next_x[S::kLoads][kVector], next_y[S::kLoads][kVector];
  const auto fetch_chunk = [&](int64_t k) {
#pragma unroll
    for (int l = 0; l < S::kLoads; ++l) {
      x(k + load_row + l * S::kLoadRows, x_col + load_col, next_x[l]);
      y(k + load_row + l * S::kLoadRows, y_col + load_col, next_y[l]);
    }
  };
  const auto store_chunk = [&](int stage) {
#pragma unroll
    for (int l = 0; l < S::kLoads; ++l) {
      store(&operands.x[stage][load_row + l * S::kLoadRows][load_col], next_x[l]);
      store(&operands.y[stage][load_row + l * S::kLoadRows][load_col], next_y[l]);
    }
  };
  fetch_chunk(0);
  store_chunk(0);
  __syncthreads();
  int stage = 0;
  for (int64_t k = 0; k < rows; k += kDepth, stage ^= 1) {
    const bool more = k + kDepth < rows;
    if (more) fetch_chunk(k + kDepth);  // in flight while this chunk is multiplied
    S::multiply(operands.x[stage], operands.y[stage], acc);
    if (more) store_chunk(stage ^ 1);
    __syncthreads();
  }
}

// product = H^T W = H W. Parallel over its tiles.   hessian [k, k], weight [k, n], product [k, n]
template <typename S, typename T = typename S::T>
__global__ void __launch_bounds__(kThreads)
    product_kernel(int64_t k, int64_t n, const T* __restrict__ hessian, const T* __restrict__ weight,
                   T* __restrict__ product) {
  __shared__ __align__(16) Operands<S> operands;
  const unsigned tile_cols = unsigned(ceil_div<int64_t>(n, S::kTile));
  const int64_t row0 = int64_t(blockIdx.x / tile_cols) * S::kTile, col0 = int64_t(blockIdx.x % tile_cols) * S::kTile;
  T acc[S::kCount] = {};
  multiply<S>(acc, operands, k, Matrix<T>{hessian, k, k, aligned(k, hessian)}, row0,
              Matrix<T>{weight, k, n, aligned(n, weight)}, col0);
  S::each([&](int i, int row_in_tile, int col_in_tile) {
    const int64_t row = row0 + row_in_tile, col = col0 + col_in_tile;
    if (row < k && col < n) product[row * n + col] = acc[i];
  });
}

// G. Parallel over the tiles of its lower triangle, row by row.
//   weight, product = H W [k, n], derivatives' arrays [m, n], out [n, n]
template <typename S, typename T = typename S::T>
__global__ void __launch_bounds__(kThreads, S::kBlocks)
    recursion_kernel(int64_t k, int64_t n, int64_t m, const T* __restrict__ weight, const T* __restrict__ product,
                     const Derivatives<T> source, T gamma, T* __restrict__ out) {
  __shared__ __align__(16) Operands<S> operands;
  __shared__ double diagonal[S::kTile];
  // Tile (tile_row, tile_col) is number tile_row (tile_row + 1) / 2 + tile_col; the root is exact to one.
  int64_t tile_row = int64_t((std::sqrt(8.0 * blockIdx.x + 1.0) - 1.0) / 2.0);
  while (tile_row * (tile_row + 1) / 2 > blockIdx.x) --tile_row;
  while ((tile_row + 1) * (tile_row + 2) / 2 <= blockIdx.x) ++tile_row;
  const int64_t tile_col = blockIdx.x - tile_row * (tile_row + 1) / 2;
  const int64_t row0 = tile_row * S::kTile, col0 = tile_col * S::kTile;
  const bool on_diagonal = tile_row == tile_col, with_sums = on_diagonal && source.grad_input;

  T curvature[S::kCount] = {}, moment[S::kCount] = {};
  multiply<S>(curvature, operands, k, Matrix<T>{weight, k, n, aligned(n, weight)}, row0,
              Matrix<T>{product, k, n, aligned(n, product)}, col0);
  double sums[S::kVector] = {};
  const bool vectors = aligned(n, source.first, source.second, source.grad_input);
  multiply<S>(moment, operands, m, FirstDerivative<S>{source, m, n, vectors, with_sums, sums}, row0,
              FirstDerivative<S>{source, m, n, vectors, false, sums}, col0);

  if (with_sums) {
    // The threads that loaded one column each have a part of its sum. The operands are done with: `multiply` ended with a
    // barrier.
    static_assert(sizeof(operands) >= sizeof(double) * S::kLoadRows * S::kTile);
    double* parts = reinterpret_cast<double*>(&operands);  // [kLoadRows, kTile]
#pragma unroll
    for (int e = 0; e < S::kVector; ++e) parts[threadIdx.x * S::kVector + e] = sums[e];
    __syncthreads();
    if (threadIdx.x < S::kTile) {
      double sum = 0;
      for (int r = 0; r < S::kLoadRows; ++r) sum += parts[r * S::kTile + threadIdx.x];
      diagonal[threadIdx.x] = sum;
    }
    __syncthreads();
  }

  const T inverse_batch = T(1) / T(m);
  S::each([&](int i, int row_in_tile, int col_in_tile) {
    const int64_t row = row0 + row_in_tile, col = col0 + col_in_tile;
    if (row >= n || col > row) return;
    T g = curvature[i] * (moment[i] * inverse_batch);
    if (row == col && with_sums) g += pos_eig(T(diagonal[row_in_tile]), gamma);
    out[row * n + col] = g;
    out[col * n + row] = g;
  });
}

template <typename S, typename T = typename S::T>
void launch(int64_t k, int64_t n, int64_t m, const T* hessian, const T* weight, const Derivatives<T>& derivatives,
                  T gamma, T* product, T* out, cudaStream_t stream) {
  const int64_t rows = ceil_div<int64_t>(k, S::kTile), cols = ceil_div<int64_t>(n, S::kTile);
  if (k > 0) LAUNCH((product_kernel<S>), unsigned(rows * cols), kThreads, 0, stream, k, n, hessian, weight, product);
  LAUNCH((recursion_kernel<S>), unsigned(cols * (cols + 1) / 2), kThreads, 0, stream, k, n, m, weight, product,
         derivatives, gamma, out);
}

}  // namespace

template <typename T>
void bias_hessian(int64_t k, int64_t n, int64_t m, const T* hessian, const T* weight, const Derivatives<T>& derivatives,
                  T gamma, Arithmetic arithmetic, T* product, T* out, const Device& device, cudaStream_t stream) {
  if (n == 0) return;
  const auto run = [&](auto shape) {
    launch<decltype(shape)>(k, n, m, hessian, weight, derivatives, gamma, product, out, stream);
  };
  if constexpr (sizeof(T) == 4) {
    // The large tile reads shared memory half as often per product, but pays only where there are enough of them. Double's
    // accumulators would not fit the registers, nor would the split numbers beside them.
    const int64_t tiles = ceil_div<int64_t>(n, 128);
    const bool large = tiles * (tiles + 1) / 2 >= device.multiprocessors;
    switch (arithmetic) {
      case Arithmetic::plain: return large ? run(Simt<T, 128>{}) : run(Simt<T, 64>{});
      case Arithmetic::split_tf32: return run(TensorCores<64, true>{});
      case Arithmetic::tf32: return large ? run(TensorCores<128, false>{}) : run(TensorCores<64, false>{});
    }
  }
  run(Simt<T, 64>{});
}

template void bias_hessian(int64_t, int64_t, int64_t, const float*, const float*, const Derivatives<float>&, float,
                           Arithmetic, float*, float*, const Device&, cudaStream_t);
template void bias_hessian(int64_t, int64_t, int64_t, const double*, const double*, const Derivatives<double>&, double,
                           Arithmetic, double*, double*, const Device&, cudaStream_t);

}  // namespace secondorder::cuda
