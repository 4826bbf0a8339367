// What the kernels of EigenAdam stand on: where a matrix' memory lies, which part of it a block has, and the skinny
// products with a tile of it, whose elements are in registers.
#pragma once

#include <cstdint>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

#include "kernels.h"
#include "launch.cuh"

namespace secondorder::cuda {

// A tile is shared among 2 x 2 warps, a warp's part among 4 x 8 lanes: 8 rows of 32 bytes each.
constexpr int kTileWarps = 2, kRowLanes = 4, kColumnLanes = kWarp / kRowLanes, kOwnRows = 8;
constexpr int kTileThreads = kTileWarps * kTileWarps * kWarp;
constexpr int kTileRows = kTileWarps * kRowLanes * kOwnRows;
constexpr int kVectors = 16;       // of a basis that tiles take at a time
constexpr int kTileBlocks = 4;     // with tiles that fit a multiprocessor, at least: 128 registers for each thread
constexpr int kGroup = 8;          // vectors of a basis that a kernel without tiles takes at a time
constexpr int kRows = 4;           // pairs of vectors whose dot products a warp computes together
constexpr int kThreads = 256;      // of the kernels without tiles
constexpr int kBlocks = 2;         // of them that fit a multiprocessor, at least
constexpr int kSideThreads = 512;  // of a block that makes a basis orthonormal
constexpr int kSlice = 64;         // rows or columns of a block without tiles, at least
constexpr int kSlices = 64;        // that a side is cut into, at most
constexpr int kMostTiles = 8;      // of a chunk
constexpr int kTilesPerUnit = 8;   // tiles for each multiprocessor, from which on chunks take more than one

template <typename T>
constexpr int kOwnColumns = 2 * Vector<T>::kSize;
template <typename T>
constexpr int kStrip = kTileWarps * kColumnLanes * kOwnColumns<T>;  // columns of a tile
// Blocks of the kernel that takes the most registers.
template <typename T>
constexpr int kResidualBlocks = sizeof(T) < 8 ? kTileBlocks : kTileBlocks - 1;

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
  T* row_sums;        // [strips, vectors, n] products of the rows of each strip
  T* column_sums;     // [chunks, vectors, p] products of the columns of each chunk
  T* right;           // [c, n] X^T, then R^T
  T* top;             // [ku, p] U^T G'
  T* corner_sums;     // [slices of rows and of columns, ku, c]
  T* corner;          // [ku, c] C, then M
  T* new_corner;      // [ku, c] N_C
  T* new_right;       // [c, n] N_R^T, then Z^T
  T* new_top;         // [ku, p] N_T, then Q
  T* whole;           // [n, p] N_E
  double* squares;    // [strips chunks] of G, by blocks
  double* curvature;  // [n] of a bias Hessian, by rows
  double* scalars;    // [5] the size of gradients; the step lengths of W and b; the moments' corrections
  double* share;      // [1] w
  T* next_out;        // [ku, n] the rows that become a basis
  T* next_in;         // [kv, p]
  T* length_out;      // [ku]
  T* length_in;       // [kv]
  double* along;      // [kv] V^T of a sketch's sums
  T* overlaps;        // [slices of rows, ku, ku] of U'^T U, then [slices of columns, kv, kv] of V^T V'
  T* turn_out;        // [ku, ku] U'^T U
  T* turn_in;         // [kv, kv] V^T V'
  T* turned;          // [rest] the first moments of C, R, T by the new bases
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
  if constexpr (kIsStep<M> || kIsRenewal<M>) {
    take(work.top, ku * p);
    take(work.squares, strip_count<T>(sizes) * chunks);
  }
  if constexpr (kIsStep<M>) {
    take(work.corner_sums, (slices(n) + slices(p)) * ku * c);
    take(work.corner, ku * c);
    take(work.new_corner, ku * c);
    take(work.new_right, c * n);
    take(work.new_top, ku * p);
    take(work.whole, sizes.residual());
    take(work.scalars, 5);
  }
  if constexpr (kIsRenewal<M>) {
    take(work.curvature, in.bias_hessian ? n : 0);
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

// A tile of a matrix and the thread's elements in it. Of each kRun columns the thread has one Vector where `vectors`,
// else every kColumnLanes-th column: either way lanes read whole sectors together. In shared memory, where columns
// have places, what a thread has of each kRun stands together.
template <typename T>
struct Frame {
  static constexpr int kSize = Vector<T>::kSize, kRun = kColumnLanes * kSize;

  int64_t n, p, begin, strip;  // the matrix, and the tile's first row and column
  int height;                  // rows of the tile that are there
  bool vectors;                // whether rows of all matrices can be read as Vectors
  bool first;                  // whether the tile is its chunk's first
  int64_t place;               // of the thread's first element in the matrix
  int rows, columns;           // that are there from this element on; neither, where they are not positive

  __device__ __forceinline__ Frame(int64_t n_, int64_t p_, int64_t begin_, int64_t strip_, int height_, bool vectors_,
                                   bool first_)
      : n(n_), p(p_), begin(begin_), strip(strip_), height(height_), vectors(vectors_), first(first_) {
    const int64_t column = this->column(own_place());
    place = (begin + own_row()) * p + column;
    rows = height - own_row();
    columns = int(p - column < kStrip<T> ? p - column : kStrip<T>);
  }

  // The thread's first row in the tile.
  static __device__ __forceinline__ int own_row() {
    return (threadIdx.x / kWarp / kTileWarps * kRowLanes + threadIdx.x % kWarp / kColumnLanes) * kOwnRows;
  }
  // The place of the thread's k-th column.
  static __device__ __forceinline__ int own_place(int k = 0) {
    const int warp = threadIdx.x / kWarp % kTileWarps, lane = threadIdx.x % kColumnLanes;
    return warp * (kStrip<T> / kTileWarps) + k / kSize * kRun + lane * kSize + k % kSize;
  }
  // The matrix' column at a place.
  __device__ __forceinline__ int64_t column(int at) const {
    const int k = at % kRun;
    return strip + at - k + (vectors ? k : k % kSize * kColumnLanes + k / kSize);
  }
  // How far the thread's k-th column is from its first.
  __device__ __forceinline__ int step(int k) const {
    return k / kSize * kRun + k % kSize * (vectors ? 1 : kColumnLanes);
  }

  // The thread's elements in a row of a matrix, whose first is at `from`; zeros beside the matrix, or where the row is
  // not there.
  __device__ __forceinline__ void read_row(const T* from, bool there, T (&x)[kOwnColumns<T>]) const {
    if (vectors) {
#pragma unroll
      for (int k = 0; k < kOwnColumns<T>; k += kSize) {
        T piece[kSize] = {};
        if (there && step(k) < columns) load(from + k / kSize * kRun, piece);
#pragma unroll
        for (int e = 0; e < kSize; ++e) x[k + e] = piece[e];
      }
    } else {
#pragma unroll
      for (int k = 0; k < kOwnColumns<T>; ++k) x[k] = there && step(k) < columns ? from[step(k)] : T(0);
    }
  }

  __device__ __forceinline__ void write_row(T* to, bool there, const T (&x)[kOwnColumns<T>]) const {
    if (vectors) {
#pragma unroll
      for (int k = 0; k < kOwnColumns<T>; k += kSize) {
        T piece[kSize];
#pragma unroll
        for (int e = 0; e < kSize; ++e) piece[e] = x[k + e];
        if (there && step(k) < columns) store(to + k / kSize * kRun, piece);
      }
    } else {
#pragma unroll
      for (int k = 0; k < kOwnColumns<T>; ++k)
        if (there && step(k) < columns) to[step(k)] = x[k];
    }
  }

  // The thread's elements in one of its rows.
  __device__ __forceinline__ void read(const T* matrix, int row, T (&x)[kOwnColumns<T>]) const {
    read_row(matrix + place + row * p, row < rows, x);
  }
  __device__ __forceinline__ void write(T* matrix, int row, const T (&x)[kOwnColumns<T>]) const {
    write_row(matrix + place + row * p, row < rows, x);
  }

  // All of the thread's elements.
  __device__ __forceinline__ void read(const T* matrix, T (&x)[kOwnRows][kOwnColumns<T>]) const {
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) read(matrix, i, x[i]);
  }
};

// The matrix of a block, or a copy of it, and which of its blocks that is.
template <typename M, typename In = const M&>
struct Here {
  using T = Scalar<M>;
  In in;
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

// A block's part of a matrix in a pass: a strip of columns and a chunk of rows.
template <typename M>
struct Part : Here<M, M> {
  using T = Scalar<M>;
  int64_t strip, chunk;

  __device__ __forceinline__ Part(const Layers<M>& layers, const Blocks& division) : Here<M, M>(layers, division) {
    strip = this->block % this->strips;
    chunk = this->block / this->strips;
  }

  // f(frame) for every tile; `vectors` as `aligned` found.
  template <typename F>
  __device__ __forceinline__ void each_tile(bool vectors, F&& f) const {
    const int64_t begin = chunk * this->chunk_rows, stop = begin + this->chunk_rows;
    const int64_t end = stop < this->n ? stop : this->n;
    for (int64_t row = begin; row < end; row += kTileRows) {
      const int height = int(end - row < kTileRows ? end - row : kTileRows);
      f(Frame<T>(this->n, this->p, row, strip * kStrip<T>, height, vectors, row == begin));
    }
  }
};

// A block's Part in shared memory, which barriers keep the compiler from holding in registers: those are the tile's.
template <typename M>
struct SharedPart {
  alignas(Part<M>) unsigned char bytes[sizeof(Part<M>)];

  // Every thread must call it.
  __device__ __forceinline__ const Part<M>& make(const Layers<M>& layers, const Blocks& division) {
    if (threadIdx.x == 0) new (bytes) Part<M>(layers, division);
    __syncthreads();
    return *reinterpret_cast<const Part<M>*>(bytes);
  }
};

// Sums over kLanes lanes, kStep apart, of the first kHeld values: each keeps its share of them, in v[0], v[1], ... The
// lanes of a warp must all call it.
template <int kLanes, int kStep, int kHeld, int kCount, typename T>
__device__ __forceinline__ void scatter_sums(T (&v)[kCount]) {
  if constexpr (kLanes > 1) {
    constexpr int kHalf = kHeld / 2, kApart = kLanes / 2 * kStep;
    const bool upper = threadIdx.x & kApart;
#pragma unroll
    for (int k = 0; k < kHalf; ++k) {
      const T kept = upper ? v[kHalf + k] : v[k], given = upper ? v[k] : v[kHalf + k];
      v[k] = kept + __shfl_xor_sync(0xffffffffu, given, kApart);
    }
    scatter_sums<kLanes / 2, kStep, kHalf>(v);
  }
}

// The skinny products with a tile, and the shared memory that they take: kVectors vectors at a time. Each of these a
// thread reads for all of its elements at once, 16 bytes in a load. Every thread must call every function.
template <typename T>
struct Tile {
  using Elements = T[kOwnRows][kOwnColumns<T>];
  static constexpr int kLonger = kTileRows > kStrip<T> ? kTileRows : kStrip<T>;

  alignas(16) T left[kVectors][kTileRows];
  alignas(16) T right[kVectors][kStrip<T>];
  alignas(16) T sums[kTileWarps][kVectors][kLonger];

  static __device__ __forceinline__ int in_group(const Vectors<T>& vectors, int64_t group) {
    return int(vectors.count - group < kVectors ? vectors.count - group : kVectors);
  }

  // Some vectors on their way to [kVectors, kWidth] in shared memory: a thread has one element of so many of them.
  template <int kWidth>
  struct Share {
    static constexpr int kStep = kTileThreads / kWidth, kCount = kVectors / kStep;
    T element[kCount];

    // vectors [count, size] from `group` on, at `index`, or zeros where the thread is beside them
    __device__ __forceinline__ Share(const Vectors<T>& vectors, int64_t group, int64_t size, int64_t index,
                                     bool there) {
      const int v = threadIdx.x / kWidth, count = there ? in_group(vectors, group) : 0;
      const T* from = vectors.data + (group + v) * size + index;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        element[i] = v + i * kStep < count ? *from : T(0);
        from += kStep * size;
      }
    }

    __device__ __forceinline__ void put(T (*shared)[kWidth], T sign) const {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        shared[threadIdx.x / kWidth + i * kStep][threadIdx.x % kWidth] = sign * element[i];
    }
  };

  // The share in vectors of rows, [count, n].
  static __device__ __forceinline__ Share<kTileRows> of_rows(const Frame<T>& at, const Vectors<T>& vectors,
                                                             int64_t group) {
    const int row = threadIdx.x % kTileRows;
    return Share<kTileRows>(vectors, group, at.n, at.begin + row, row < at.height);
  }

  // The share in vectors of columns, [count, p].
  static __device__ __forceinline__ Share<kStrip<T>> of_columns(const Frame<T>& at, const Vectors<T>& vectors,
                                                                int64_t group) {
    const int64_t column = at.column(threadIdx.x % kStrip<T>);
    return Share<kStrip<T>>(vectors, group, at.p, column, column < at.p);
  }

  // kCount elements, a Vector at every kStep-th place.
  template <int kStep, int kCount>
  static __device__ __forceinline__ void load_apart(const T* from, T (&v)[kCount]) {
    constexpr int kSize = Vector<T>::kSize;
#pragma unroll
    for (int k = 0; k < kCount; k += kSize) {
      T piece[kSize];
      load(from + k / kSize * kStep, piece);
#pragma unroll
      for (int e = 0; e < kSize; ++e) v[k + e] = piece[e];
    }
  }

  // Vector e at the thread's rows.
  __device__ __forceinline__ void own_left(int e, T (&l)[kOwnRows]) const {
    load_apart<Vector<T>::kSize>(&left[e][Frame<T>::own_row()], l);
  }
  // Vector e at the thread's columns.
  __device__ __forceinline__ void own_right(int e, T (&r)[kOwnColumns<T>]) const {
    load_apart<Frame<T>::kRun>(&right[e][Frame<T>::own_place()], r);
  }

  // x -= row column^T   row(i), column(j) of the matrix' indices
  template <typename Row, typename Column>
  __device__ __forceinline__ void subtract(const Frame<T>& at, Elements& x, Row&& row, Column&& column) {
    __syncthreads();  // what was there has been used
    const int i = threadIdx.x % kTileRows, k = threadIdx.x % kStrip<T>;
    const int64_t j = at.column(k);
    if (threadIdx.x < kTileRows) left[0][i] = i < at.height ? row(at.begin + i) : T(0);
    if (threadIdx.x < kStrip<T>) right[0][k] = j < at.p ? column(j) : T(0);
    __syncthreads();
    T l[kOwnRows], r[kOwnColumns<T>];
    own_left(0, l);
    own_right(0, r);
#pragma unroll
    for (int b = 0; b < kOwnRows; ++b)
#pragma unroll
      for (int e = 0; e < kOwnColumns<T>; ++e) x[b][e] -= l[b] * r[e];
  }

  // x += sign left^T right   left [count, n], right [count, p]
  __device__ __forceinline__ void add(const Frame<T>& at, Elements& x, T sign, const Vectors<T>& left_vectors,
                                      const T* right_data) {
    const Vectors<T> right_vectors{right_data, left_vectors.count};
#pragma unroll 1
    for (int64_t group = 0; group < left_vectors.count; group += kVectors) {
      const auto rows = of_rows(at, left_vectors, group);
      const auto columns = of_columns(at, right_vectors, group);
      __syncthreads();  // the group before has been used
      rows.put(left, T(1));
      columns.put(right, sign);
      __syncthreads();
      const int count = in_group(left_vectors, group);
#pragma unroll 1
      for (int e = 0; e < count; ++e) {
        T l[kOwnRows], r[kOwnColumns<T>];
        own_left(e, l);
        own_right(e, r);
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i)
#pragma unroll
          for (int k = 0; k < kOwnColumns<T>; ++k) x[i][k] += l[i] * r[k];
      }
    }
  }

  // out[v, column] = sum over the chunk's rows of vectors[v, row] x[row, column]   vectors [count, n], out [count, p]
  __device__ __forceinline__ void column_products(const Frame<T>& at, const Elements& x, const Vectors<T>& vectors,
                                                  T* out) {
    constexpr int kKept = kOwnColumns<T> / kRowLanes;  // sums of a lane
    const int lane = threadIdx.x % kWarp, half = threadIdx.x / kWarp / kTileWarps;
#pragma unroll 1
    for (int64_t group = 0; group < vectors.count; group += kVectors) {
      const auto rows = of_rows(at, vectors, group);
      __syncthreads();  // the vectors and sums before have been used
      rows.put(left, T(1));
      __syncthreads();
      const int count = in_group(vectors, group);
#pragma unroll 1
      for (int e = 0; e < count; ++e) {
        T l[kOwnRows], sum[kOwnColumns<T>] = {};
        own_left(e, l);
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i)
#pragma unroll
          for (int k = 0; k < kOwnColumns<T>; ++k) sum[k] += l[i] * x[i][k];
        scatter_sums<kRowLanes, kColumnLanes, kOwnColumns<T>>(sum);
        T* const target = &sums[half][e][Frame<T>::own_place(lane / kColumnLanes * kKept)];
#pragma unroll
        for (int k = 0; k < kKept; ++k) target[k] = sum[k];
      }
      __syncthreads();
      const int k = threadIdx.x % kStrip<T>;
      const int64_t column = at.column(k);
      if (column >= at.p) continue;
#pragma unroll 4
      for (int e = threadIdx.x / kStrip<T>; e < count; e += kTileThreads / kStrip<T>) {
        T* const target = out + (group + e) * at.p + column;
        const T sum = sums[0][e][k] + sums[1][e][k];
        *target = at.first ? sum : *target + sum;
      }
    }
  }

  // out[v, row] = sum over the strip's columns of vectors[v, column] x[row, column]   vectors [count, p], out [count,
  // n]
  __device__ __forceinline__ void row_products(const Frame<T>& at, const Elements& x, const Vectors<T>& vectors,
                                               T* out) {
    const int lane = threadIdx.x % kWarp, half = threadIdx.x / kWarp % kTileWarps;
    const int own = threadIdx.x / kWarp / kTileWarps * kWarp + lane;  // the row whose sum the lane keeps
    static_assert(kOwnRows == kColumnLanes, "a lane keeps one sum");
#pragma unroll 1
    for (int64_t group = 0; group < vectors.count; group += kVectors) {
      const auto columns = of_columns(at, vectors, group);
      __syncthreads();  // the vectors and sums before have been used
      columns.put(right, T(1));
      __syncthreads();
      const int count = in_group(vectors, group);
#pragma unroll 1
      for (int e = 0; e < count; ++e) {
        T r[kOwnColumns<T>], sum[kOwnRows] = {};
        own_right(e, r);
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i)
#pragma unroll
          for (int k = 0; k < kOwnColumns<T>; ++k) sum[i] += x[i][k] * r[k];
        scatter_sums<kColumnLanes, 1, kOwnRows>(sum);
        sums[half][e][own] = sum[0];
      }
      __syncthreads();
      const int row = threadIdx.x % kTileRows;
      if (row >= at.height) continue;
      for (int e = threadIdx.x / kTileRows; e < count; e += kTileThreads / kTileRows)
        out[(group + e) * at.n + at.begin + row] = sums[0][e][row] + sums[1][e][row];
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
