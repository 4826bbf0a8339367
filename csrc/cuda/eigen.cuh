// What the kernels of EigenAdam stand on: where a matrix' memory lies, which part of it a block has, and a tile of it
// in shared memory with the skinny products.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels.h"
#include "launch.cuh"

namespace secondorder::cuda {

constexpr int kTileRows = kWarp;    // the lanes of a warp have a column each of a tile, then a row each
constexpr int kGroup = 8;           // vectors of a basis that a kernel without tiles takes at a time
constexpr int kRows = 4;            // of a tile, or pairs of vectors, that are computed with together
constexpr int kBatch = 8;           // rows of it whose loads are under way together
constexpr int kTileBlocks = 3;      // with tiles that fit a multiprocessor, at least: 168 registers for each thread
constexpr int kResidualBlocks = 2;  // of the kernel that needs more
constexpr int kThreads = 256;       // of the kernels without tiles
constexpr int kBlocks = 2;          // of them that fit a multiprocessor, at least
constexpr int kSideThreads = 512;   // of a block that makes a basis orthonormal
constexpr int kSlice = 64;          // rows or columns of a block without tiles, at least
constexpr int kSlices = 64;         // that a side is cut into, at most
constexpr int kMostTiles = 8;       // of a chunk
constexpr int kTilesPerUnit = 8;    // tiles for each multiprocessor, from which on chunks take more than one

// Columns of a tile, a thread each: a tile takes 16 KB.
template <typename T>
constexpr int kStrip = 512 / int(sizeof(T));

template <typename T>
constexpr double kTiny = double(std::numeric_limits<T>::min());
template <typename T>
constexpr double kRounding = double(std::numeric_limits<T>::epsilon());

// The inputs [m, p] of a sketch as a matrix: k and one for the sums are its vectors.
template <typename T>
struct SketchMatrix : EigenMatrix<T> {
  T* sketch;  // [k + 1, p]
};

template <typename M>
struct Layer {
  M in;
  uintptr_t work;
  int64_t chunk;  // rows of a chunk
};

template <typename M>
using Layers = Table<Layer<M>>;

template <typename T>
T scalar_of(const EigenMatrix<T>&);
template <typename M>
using Scalar = decltype(scalar_of(std::declval<M>()));

template <typename M>
constexpr bool kIsStep = std::is_same_v<M, EigenStep<Scalar<M>>>;
template <typename M>
constexpr bool kIsRenewal = std::is_same_v<M, EigenRenewal<Scalar<M>>>;

// How many blocks of one kernel a matrix takes.
template <typename T>
__host__ __device__ inline int64_t strip_count(const EigenSizes& sizes) {
  return ceil_div<int64_t>(sizes.p, kStrip<T>);
}

__host__ __device__ inline int64_t slice(int64_t n) { return kSlice * ceil_div<int64_t>(n, kSlice * kSlices); }

__host__ __device__ inline int64_t slices(int64_t n) { return ceil_div(n, slice(n)); }

// Device memory of one matrix. What has n elements is stored by vectors of them, as bases are.
template <typename T>
struct Work {
  T* row_sums;      // [strips, vectors, n] products of the rows of each strip
  T* column_sums;   // [chunks, vectors, p] products of the columns of each chunk
  T* right;         // [c, n] X^T, then R^T
  T* top;           // [ku, p] U^T G'
  T* corner_sums;   // [slices of rows and of columns, ku, c]
  T* corner;        // [ku, c] C, then M
  T* new_corner;    // [ku, c] N_C
  T* new_right;     // [c, n] N_R^T, then Z^T
  T* new_top;       // [ku, p] N_T, then Q
  T* whole;         // [n, p] N_E
  double* squares;  // [strips chunks] of G, by blocks
  double* scalars;  // [5] the size of gradients; the step lengths of W and b; the moments' corrections
  double* share;    // [1] w
  T* next_out;      // [ku, n] the rows that become a basis
  T* next_in;       // [kv, p]
  T* length_out;    // [ku]
  T* length_in;     // [kv]
  double* along;    // [kv] V^T of a sketch's sums
  T* overlaps;      // [slices of rows, ku, ku] of U'^T U, then [slices of columns, kv, kv] of V^T V'
  T* turn_out;      // [ku, ku] U'^T U
  T* turn_in;       // [kv, kv] V^T V'
  T* turned;        // [rest] the first moments of C, R, T by the new bases
};

// The memory of a matrix at `base`; returns its bytes.
template <typename M>
__host__ __device__ inline int64_t carve(const M& in, int64_t chunk, uintptr_t base, Work<Scalar<M>>& work) {
  using T = Scalar<M>;
  const EigenSizes& sizes = in.sizes;
  const int64_t n = sizes.n, p = sizes.p, ku = sizes.ku, kv = sizes.kv, c = sizes.c();
  const int64_t vectors = ku > kv ? (ku > 1 ? ku : 1) : (kv > 1 ? kv : 1), chunks = ceil_div(n, chunk);
  uintptr_t end = base;
  const auto take = [&](auto*& pointer, int64_t elements) {
    pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(end);
    end += ceil_div<int64_t>(elements * int64_t(sizeof(*pointer)), 16) * 16;
  };
  take(work.row_sums, strip_count<T>(sizes) * vectors * n);
  take(work.column_sums, chunks * vectors * p);
  take(work.right, c * n);
  if constexpr (kIsStep<M> || kIsRenewal<M>) take(work.top, ku * p);
  if constexpr (kIsStep<M>) {
    take(work.corner_sums, (slices(n) + slices(p)) * ku * c);
    take(work.corner, ku * c);
    take(work.new_corner, ku * c);
    take(work.new_right, c * n);
    take(work.new_top, ku * p);
    take(work.whole, sizes.residual());
    take(work.squares, strip_count<T>(sizes) * chunks);
    take(work.scalars, 5);
  }
  if constexpr (kIsRenewal<M>) {
    take(work.share, 1);
    take(work.next_out, ku * n);
    take(work.next_in, kv * p);
    take(work.length_out, ku);
    take(work.length_in, kv);
    take(work.along, kv);
    take(work.overlaps, slices(n) * ku * ku + slices(p) * kv * kv);
    take(work.turn_out, ku * ku);
    take(work.turn_in, kv * kv);
    take(work.turned, sizes.rest());
  }
  return int64_t(end - base);
}

// Vectors of a basis, or of what is used like one: [count, n] or [count, p].
template <typename T>
struct Vectors {
  const T* data;
  int64_t count;
};

// Where a tile lies: kTileRows rows from `begin` on, of which `rows` are there, and the thread's column.
struct Frame {
  int64_t n, p, begin, column;
  int rows;
  bool inside;  // whether the column is there
  bool first;   // whether the tile is its chunk's first

  __device__ __forceinline__ int64_t place(int row) const { return (begin + row) * p + column; }
  __device__ __forceinline__ bool there(int row) const { return inside && row < rows; }
  // The matrix' element at a row of the tile, or the nearest one beside the matrix: loads behind no branch are under
  // way together.
  template <typename T>
  __device__ __forceinline__ T near(const T* matrix, int row) const {
    return matrix[(begin + (row < rows ? row : rows - 1)) * p + (inside ? column : p - 1)];
  }
};

// A vector's elements [n] at the rows of a tile, one in each lane of every warp; zeros where there is no vector.
template <typename T>
struct RowValues {
  T mine = 0;

  __device__ __forceinline__ RowValues(const Frame& at, const T* vector) {
    const int lane = threadIdx.x % kWarp;
    if (vector) mine = vector[at.begin + (lane < at.rows ? lane : at.rows - 1)];
  }

  // Every lane must call it.
  __device__ __forceinline__ T operator[](int row) const { return __shfl_sync(0xffffffffu, mine, row); }
};

// The matrix of a block, and which of its blocks that is.
template <typename M>
struct Here {
  using T = Scalar<M>;
  const M& in;
  const EigenSizes& sizes;
  Work<T> work;
  int64_t n, p, ku, kv, c, strips, chunk_rows, chunks, block;

  __device__ __forceinline__ Here(const Layer<M>& layer, int64_t block_)
      : in(layer.in), sizes(in.sizes), n(sizes.n), p(sizes.p), ku(sizes.ku), kv(sizes.kv), c(sizes.c()),
        strips(strip_count<T>(sizes)), chunk_rows(layer.chunk), chunks(ceil_div(n, chunk_rows)), block(block_) {
    carve(in, chunk_rows, layer.work, work);
  }

  __device__ __forceinline__ Here(const Layers<M>& layers, const Blocks& division)
      : Here(layers, division, division.layer(layers.count, blockIdx.x)) {}

 private:
  __device__ __forceinline__ Here(const Layers<M>& layers, const Blocks& division, int l)
      : Here(layers.layer[l], int64_t(blockIdx.x) - division.first[l]) {}
};

// A block's part of a matrix in a pass: a strip of columns, a thread each, and a chunk of rows.
template <typename M>
struct Part : Here<M> {
  int64_t strip, chunk, begin, end, column;
  bool inside;

  __device__ __forceinline__ Part(const Layers<M>& layers, const Blocks& division) : Here<M>(layers, division) {
    strip = this->block % this->strips;
    chunk = this->block / this->strips;
    begin = chunk * this->chunk_rows;
    end = begin + this->chunk_rows < this->n ? begin + this->chunk_rows : this->n;
    column = strip * kStrip<Scalar<M>> + threadIdx.x;
    inside = column < this->p;
  }

  // f(frame) for every tile.
  template <typename F>
  __device__ __forceinline__ void each_tile(F&& f) const {
    for (int64_t row = begin; row < end; row += kTileRows) {
      const int rows = int(end - row < kTileRows ? end - row : kTileRows);
      f(Frame{this->n, this->p, row, column, rows, inside, row == begin});
    }
  }
};

// kCount elements, as vectors where they make whole ones, for which p must be aligned.
template <int kCount, typename T>
__device__ __forceinline__ void load_many(const T* p, T (&v)[kCount]) {
  constexpr int kSize = kCount % Vector<T>::kSize == 0 ? Vector<T>::kSize : 1;
#pragma unroll
  for (int e = 0; e < kCount; e += kSize) {
    T piece[kSize];
    load(p + e, piece);
#pragma unroll
    for (int f = 0; f < kSize; ++f) v[e + f] = piece[f];
  }
}

template <int kCount, typename T>
__device__ __forceinline__ void store_many(T* p, const T (&v)[kCount]) {
  constexpr int kSize = kCount % Vector<T>::kSize == 0 ? Vector<T>::kSize : 1;
#pragma unroll
  for (int e = 0; e < kCount; e += kSize) {
    T piece[kSize];
#pragma unroll
    for (int f = 0; f < kSize; ++f) piece[f] = v[e + f];
    store(p + e, piece);
  }
}

// A tile of a matrix in shared memory and the skinny products with it. Each thread writes a column of its own, and each
// lane reads a row of its warp's columns. Every thread must call every function.
template <typename T>
struct Tile {
  static constexpr int kWarps = kStrip<T> / kWarp;
  static constexpr int kVectors = 32 / int(sizeof(T));             // that are taken at a time
  static constexpr int kShare = kTileRows * kVectors / kStrip<T>;  // of a thread in a group's elements of `left`

  T element[kWarps][kTileRows][kTileRows + 1];  // one more, so that neither rows nor columns share banks
  alignas(16) T left[kTileRows][kVectors];
  alignas(16) T right[kStrip<T>][kVectors];
  alignas(16) T sums[kWarps][kTileRows][kVectors];

  __device__ __forceinline__ T& own(int row) { return element[threadIdx.x / kWarp][row][threadIdx.x % kWarp]; }

  // own(row) = f(row, the matrix' element there), zero beside the matrix. Every lane of a warp calls f, for every row
  // of the tile.
  template <typename F>
  __device__ __forceinline__ void fill(const Frame& at, const T* matrix, F&& f) {
#pragma unroll 1
    for (int row = 0; row < at.rows; row += kBatch) {
      T x[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) x[b] = at.near(matrix, row + b);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const T y = f(row + b, x[b]);
        own(row + b) = at.there(row + b) ? y : T(0);
      }
    }
  }

  // The thread's share of the tile's rows of kVectors vectors from `group` on: on the way while the group before is
  // used.
  //   vectors [count, n]
  __device__ __forceinline__ void fetch_left(const Frame& at, const Vectors<T>& vectors, int64_t group,
                                             T (&share)[kShare]) {
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int k = threadIdx.x + i * kStrip<T>, row = k % kTileRows;
      const int64_t v = group + k / kTileRows;
      share[i] = vectors.data[(v < vectors.count ? v : 0) * at.n + at.begin + (row < at.rows ? row : 0)];
    }
  }

  // Likewise the elements at the thread's column, zeros beside the matrix and behind the last vector.
  //   vectors [count, p]
  template <int kCount>
  __device__ __forceinline__ void fetch_right(const Frame& at, const Vectors<T>& vectors, int64_t group,
                                              T (&right)[kCount]) {
    const T* next = vectors.data + (at.inside ? group * at.p + at.column : 0);
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      right[e] = *next;
      if (!at.inside || group + e >= vectors.count) right[e] = T(0);
      else if (group + e + 1 < vectors.count) next += at.p;
    }
  }

  __device__ __forceinline__ void store_left(const T (&share)[kShare]) {
    __syncthreads();  // what was there has been used
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int k = threadIdx.x + i * kStrip<T>;
      left[k % kTileRows][k / kTileRows] = share[i];
    }
    __syncthreads();
  }

  // tile += sign left^T right   left [count, n], right [count, p]
  __device__ __forceinline__ void add(const Frame& at, T sign, const Vectors<T>& left_vectors, const T* right_data) {
    const Vectors<T> right_vectors{right_data, left_vectors.count};
    if (right_vectors.count == 0) return;
    T share[kShare], next[kVectors];
    fetch_left(at, left_vectors, 0, share);
    fetch_right(at, right_vectors, 0, next);
#pragma unroll 1
    for (int64_t group = 0; group < right_vectors.count; group += kVectors) {
      T r[kVectors], l[kVectors];
#pragma unroll
      for (int e = 0; e < kVectors; ++e) r[e] = sign * next[e];
      store_left(share);
      if (group + kVectors < right_vectors.count) {
        fetch_left(at, left_vectors, group + kVectors, share);
        fetch_right(at, right_vectors, group + kVectors, next);
      }
#pragma unroll 1
      for (int row = 0; row < at.rows; row += kRows) {
        T x[kRows];
#pragma unroll
        for (int b = 0; b < kRows; ++b) {
          x[b] = own(row + b);
          load_many(left[row + b], l);
#pragma unroll
          for (int e = 0; e < kVectors; ++e) x[b] += l[e] * r[e];
        }
#pragma unroll
        for (int b = 0; b < kRows; ++b) own(row + b) = x[b];
      }
    }
  }

  // out[v, column] = sum over the chunk's rows of vectors[v, row] tile[row, column]   vectors [count, n], out [count,
  // p]
  __device__ __forceinline__ void column_products(const Frame& at, const Vectors<T>& vectors, T* out) {
    if (vectors.count == 0) return;
    T share[kShare];
    fetch_left(at, vectors, 0, share);
#pragma unroll 1
    for (int64_t group = 0; group < vectors.count; group += kVectors) {
      store_left(share);
      if (group + kVectors < vectors.count) fetch_left(at, vectors, group + kVectors, share);
      T sum[kVectors] = {}, l[kVectors];
#pragma unroll 4
      for (int row = 0; row < at.rows; ++row) {
        const T x = own(row);
        load_many(left[row], l);
#pragma unroll
        for (int e = 0; e < kVectors; ++e) sum[e] += l[e] * x;
      }
#pragma unroll
      for (int e = 0; e < kVectors; ++e) {
        if (!at.inside || group + e >= vectors.count) continue;
        T* const target = out + (group + e) * at.p + at.column;
        *target = at.first ? sum[e] : *target + sum[e];
      }
    }
  }

  // out[v, row] = sum over the strip's columns of vectors[v, column] tile[row, column], kCount vectors at a time.
  //   vectors [count, p], out [count, n]
  template <int kCount>
  __device__ __forceinline__ void row_products(const Frame& at, const Vectors<T>& vectors, T* out) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if (vectors.count == 0) return;
    T next[kCount];
    fetch_right(at, vectors, 0, next);
#pragma unroll 1
    for (int64_t group = 0; group < vectors.count; group += kCount) {
      T sum[kCount] = {}, r[kCount];
      store_many(right[threadIdx.x], next);
      __syncthreads();  // the tile and `right` are written, and the sums of the group before read
      if (group + kCount < vectors.count) fetch_right(at, vectors, group + kCount, next);
#pragma unroll 4
      for (int k = 0; k < kWarp; ++k) {
        const T x = element[warp][lane][k];
        load_many(right[warp * kWarp + k], r);
#pragma unroll
        for (int e = 0; e < kCount; ++e) sum[e] += x * r[e];
      }
      store_many(sums[warp][lane], sum);
      __syncthreads();
      for (int k = threadIdx.x; k < kTileRows * kCount; k += kStrip<T>) {
        const int row = k % kTileRows, e = k / kTileRows;
        if (row >= at.rows || group + e >= vectors.count) continue;
        T total = sums[0][row][e];
#pragma unroll
        for (int w = 1; w < kWarps; ++w) total += sums[w][row][e];
        out[(group + e) * at.n + at.begin + row] = total;
      }
    }
  }
};

// sum over s < count of sums[s stride], in order
template <typename T>
__device__ __forceinline__ T ordered_sum(const T* sums, int64_t count, int64_t stride) {
  T sum = 0;
#pragma unroll 8
  for (int64_t s = 0; s < count; ++s) sum += sums[s * stride];
  return sum;
}

// A block's slice of the rows or of the columns of a matrix; or neither: the last block of every matrix.
struct Slice {
  int64_t index, begin, end;  // of rows, then of columns
  bool rows, columns;

  __device__ __forceinline__ Slice(const EigenSizes& sizes, int64_t block) {
    const int64_t row_slices = slices(sizes.n);
    rows = block < row_slices;
    columns = !rows && block < row_slices + slices(sizes.p);
    index = block;
    const int64_t size = rows ? sizes.n : sizes.p, step = slice(size);
    begin = (rows ? block : block - row_slices) * step;
    end = begin + step < size ? begin + step : size;
  }

  // f(vector, element) over `count` vectors' elements of the slice, shared among the block's threads.
  template <typename F>
  __device__ __forceinline__ void each(int64_t count, F&& f) const {
    const int64_t length = end - begin;
    for (int64_t k = threadIdx.x; k < count * length; k += kThreads) f(k / length, begin + k % length);
  }
};

}  // namespace secondorder::cuda
