// K-BFGS (Goldfarb, Ren & Bahamou): Powell's double damping (Algorithm 3), the BFGS update of an inverse H, its
// Hessian-action form and the limited memory, all layers of a net in each launch; and the middle of L-BFGS's product.
//
// With q = H y, rho = 1/(s.y) and tau = 1/(1 + rho y.q) the update H - rho (s q^T + q s^T) + rho (1 + rho y.q) s s^T,
// its square completed, is
//
//   H + a a^T - b b^T,   a = sqrt(rho/tau) (s - tau q),   b = sqrt(rho tau) q,
//
// symmetric to the bit: every update is some products with H, these factors, and one pass that writes H. The damped q
// is theta2 H y + (1-theta2) H s~ with H s~ = theta1 H s + (1-theta1) H (H y), so one pass over H, for H y and H s
// together, serves both dampings, unless both thetas are below 1.
#include <algorithm>
#include <cmath>

#include "../bfgs.h"
#include "kernels.h"
#include "reduce.cuh"

namespace secondorder::cuda {
namespace {

constexpr int kThreads = 256;  // of the kernels with a block to a layer

// Device memory of one layer.
template <typename T>
struct Work {
  double* theta2;   // [1]
  int64_t* status;  // [1]
  const T* s;       // [n] the pair that the update takes: given or made
  const T* y;       // [n]
  T* damped_s;      // [n] where a pair is made
  T* damped_y;      // [n]
  T* hy;            // [n] H y, then q
  T* hs;            // [n] H s of the given s; then H s~ where both dampings act
  T* a;             // [n]
  T* b;             // [n]
};

template <typename T>
struct Layer {
  BfgsLayer<T> in;
  Work<T> work;
};

template <typename T>
using Layers = Table<Layer<T>>;
static_assert(sizeof(Layers<double>) + 2 * sizeof(Blocks) <= 32764, "what a launch passes by value");

// What products_kernel computes:
enum class Products {
  hy,         // hy = H y
  hy_and_hs,  // hy = H y and hs = H s, in one pass
  hs_damped,  // hs = H s~, for the layers where both dampings act
  action_s,   // s~ = H s
  action_y,   // y~ = (A + damping I) s~
  action_hy,  // hy = H y~
};

// Parallel over the rows of every H, a warp each.
template <Products kProducts, typename T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    products_kernel(const Layers<T> __grid_constant__ layers, const Blocks __grid_constant__ division) {
  const int l = division.layer(layers.count, blockIdx.x);
  const BfgsLayer<T>& in = layers.layer[l].in;
  const Work<T>& work = layers.layer[l].work;
  const int64_t row = int64_t(blockIdx.x - division.first[l]) * kRowsPerBlock + threadIdx.x / kWarp, n = in.n;
  if (row >= n) return;
  const bool leader = threadIdx.x % kWarp == 0;
  if constexpr (kProducts == Products::hy_and_hs) {
    T sums[2];
    row_products(n, aligned(n, in.inverse_hessian, in.s, in.y), in.inverse_hessian + row * n, in.y, in.s, sums);
    if (leader) {
      work.hy[row] = sums[0];
      work.hs[row] = sums[1];
    }
  } else {
    if (kProducts == Products::hs_damped && *work.status != (kDampedS | kDampedY)) return;
    constexpr bool kActionY = kProducts == Products::action_y;
    const T* matrix = kActionY ? in.matrix : in.inverse_hessian;
    constexpr bool kDampedX = kProducts == Products::hs_damped || kActionY;
    const T* x = kProducts == Products::hy         ? in.y
                 : kProducts == Products::action_s ? in.s
                 : kDampedX                        ? work.damped_s
                                                   : work.damped_y;
    T* out = kProducts == Products::hs_damped  ? work.hs
             : kProducts == Products::action_s ? work.damped_s
             : kActionY                        ? work.damped_y
                                               : work.hy;
    T sum[1];
    row_products(n, aligned(n, matrix, x), matrix + row * n, x, x, sum);
    if (leader) out[row] = kActionY ? T(double(sum[0]) + in.damping * double(x[row])) : sum[0];
  }
}

// f(i) for i < n, shared among the block's threads.
template <typename F>
__device__ __forceinline__ void each_element(int64_t n, F&& f) {
  for (int64_t i = threadIdx.x; i < n; i += kThreads) f(i);
}

// Whether a pair with these s.y, y^T H y and s.s is within the bounds.
template <typename T>
__device__ __forceinline__ bool bounded(const BfgsLayer<T>& in, double sy, double yhy, double ss) {
  return within_bound(sy, yhy, in.mu1) && within_bound(sy, ss, in.mu2);
}

// damped_s, damped_y, theta2 and the status' damping bits, from hy; kLimited: also whether a limited memory takes the
// pair. Parallel over layers, a block each.
template <bool kLimited, typename T>
__global__ void __launch_bounds__(kThreads) damping_kernel(const Layers<T> __grid_constant__ layers) {
  __shared__ double partial[4][kWarp];
  const BfgsLayer<T>& in = layers.layer[blockIdx.x].in;
  const Work<T>& work = layers.layer[blockIdx.x].work;
  double first[2] = {}, second[2] = {};  // s.y and y^T H y; s~.y and s~.s~
  each_element(in.n, [&](int64_t i) {
    first[0] += double(in.s[i]) * double(in.y[i]);
    first[1] += double(in.y[i]) * double(work.hy[i]);
  });
  block_sum(first, partial);
  const double theta1 = in.damped ? powell_theta(first[0], first[1], in.mu1) : 1;
  each_element(in.n, [&](int64_t i) {
    // Not by a product with 1 and 0: what is not damped keeps its bits, and a NaN in hy stays out.
    const T s = theta1 == 1 ? in.s[i] : T(theta1 * double(in.s[i]) + (1 - theta1) * double(work.hy[i]));
    work.damped_s[i] = s;
    second[0] += double(s) * double(in.y[i]);
    second[1] += double(s) * double(s);
  });
  block_sum(second, partial);
  const double theta2 = in.damped ? powell_theta(second[0], second[1], in.mu2) : 1;
  double third[4] = {};  // s~.y~, s~.s~, y~.y~, y~^T H y~
  each_element(in.n, [&](int64_t i) {
    const T s = work.damped_s[i];
    const T y = theta2 == 1 ? in.y[i] : T(theta2 * double(in.y[i]) + (1 - theta2) * double(s));
    work.damped_y[i] = y;
    if constexpr (kLimited) {
      third[0] += double(s) * double(y);
      third[1] += double(s) * double(s);
      third[2] += double(y) * double(y);
      if (in.bounded) {
        double q = double(work.hy[i]);  // H y~
        if (theta2 != 1) {
          const double hs = double(in.hs[i]);
          q = theta2 * q + (1 - theta2) * (theta1 == 1 ? hs : theta1 * hs + (1 - theta1) * double(in.hhy[i]));
        }
        third[3] += double(y) * q;
      }
    }
  });
  int64_t status = (theta1 == 1 ? 0 : kDampedS) | (theta2 == 1 ? 0 : kDampedY);
  if constexpr (kLimited) {
    block_sum(third, partial);
    const double rho = 1 / third[0], ss = third[1] / third[0], yy = third[2] / third[0];
    const bool within = !in.bounded || bounded(in, third[0], third[3], third[1]);
    if (third[0] > 0 && rho - rho == 0 && ss - ss == 0 && yy - yy == 0 && within) status |= kUpdated;
  }
  if (threadIdx.x == 0) {
    *work.theta2 = theta2;
    *work.status = status;
    if (kLimited) *in.status = status;
  }
}

// Moves every row of both memories up by one and puts the damped pair in the last, where the status allows. Parallel
// over the columns of every memory, a thread each.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    push_kernel(const Layers<T> __grid_constant__ layers, const Blocks __grid_constant__ division) {
  const int l = division.layer(layers.count, blockIdx.x);
  const BfgsLayer<T>& in = layers.layer[l].in;
  const Work<T>& work = layers.layer[l].work;
  const int64_t column = int64_t(blockIdx.x - division.first[l]) * kThreads + threadIdx.x, n = in.n;
  if (column >= n || !(*work.status & kUpdated)) return;
  T *s = in.s_pairs + column, *y = in.y_pairs + column;
  // Some loads together, for none could pass a store that might change what it reads.
  constexpr int kInFlight = 8;
  const int64_t kept = in.pairs - 1;
  for (int64_t row = 0; row < kept; row += kInFlight) {
    T next_s[kInFlight], next_y[kInFlight];
#pragma unroll
    for (int r = 0; r < kInFlight; ++r) {
      if (row + r >= kept) continue;
      next_s[r] = s[(row + r + 1) * n];
      next_y[r] = y[(row + r + 1) * n];
    }
#pragma unroll
    for (int r = 0; r < kInFlight; ++r) {
      if (row + r >= kept) continue;
      s[(row + r) * n] = next_s[r];
      y[(row + r) * n] = next_y[r];
    }
  }
  s[kept * n] = work.damped_s[column];
  y[kept * n] = work.damped_y[column];
}

// a, b and the status, from the pair and q; kDamped: q is first made from hy and hs. Parallel over layers, a block
// each.
template <bool kDamped, typename T>
__global__ void __launch_bounds__(kThreads) factors_kernel(const Layers<T> __grid_constant__ layers) {
  __shared__ double partial[3][kWarp];
  const BfgsLayer<T>& in = layers.layer[blockIdx.x].in;
  const Work<T>& work = layers.layer[blockIdx.x].work;
  const double theta2 = kDamped ? *work.theta2 : 1;
  double sums[3] = {};  // s.y, y^T H y and s.s
  each_element(in.n, [&](int64_t i) {
    T q = work.hy[i];
    if (theta2 != 1) work.hy[i] = q = T(theta2 * double(q) + (1 - theta2) * double(work.hs[i]));
    sums[0] += double(work.s[i]) * double(work.y[i]);
    sums[1] += double(work.y[i]) * double(q);
    if (kDamped) sums[2] += double(work.s[i]) * double(work.s[i]);
  });
  block_sum(sums, partial);
  const double rho = 1 / sums[0], tau = 1 / (1 + rho * sums[1]);
  bool valid = sums[0] > 0 && rho - rho == 0 && sums[1] >= 0 && tau > 0;
  if (kDamped && in.bounded) valid = valid && bounded(in, sums[0], sums[1], sums[2]);
  const double root_a = std::sqrt(rho / tau), root_b = std::sqrt(rho * tau);
  each_element(in.n, [&](int64_t i) {
    const T q = work.hy[i], a = T(root_a * double(work.s[i]) - root_a * tau * double(q)), b = T(root_b * double(q));
    work.a[i] = a;
    work.b[i] = b;
    // A positive definite matrix has no entry larger than its largest diagonal one, so the diagonal tells of overflow.
    const double entry = double(in.inverse_hessian[i * (in.n + 1)]) + double(a) * double(a) + double(b) * double(b);
    valid = valid && entry <= kLargest<T> / 4;
  });
  valid = __syncthreads_and(valid);
  if (threadIdx.x == 0) {
    const int64_t status = (kDamped ? *work.status : 0) | (valid ? kUpdated : 0);
    *work.status = status;
    if (in.status) *in.status = status;
  }
}

// H += a a^T - b b^T where the status allows. Parallel over the rows of every H, a warp each.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    update_kernel(const Layers<T> __grid_constant__ layers, const Blocks __grid_constant__ division) {
  const int l = division.layer(layers.count, blockIdx.x);
  const BfgsLayer<T>& in = layers.layer[l].in;
  const Work<T>& work = layers.layer[l].work;
  const int64_t row = int64_t(blockIdx.x - division.first[l]) * kRowsPerBlock + threadIdx.x / kWarp, n = in.n;
  if (row >= n || !(*work.status & kUpdated)) return;
  const T a_row = work.a[row], b_row = work.b[row];
  T* h = in.inverse_hessian + row * n;
  each_column<T>(n, aligned(n, in.inverse_hessian, work.a, work.b), [&](int64_t j, auto width) {
    T a[width.value], b[width.value], v[width.value];
    load(work.a + j, a);
    load(work.b + j, b);
    load(h + j, v);
#pragma unroll
    for (int e = 0; e < width.value; ++e) v[e] = v[e] + a_row * a[e] - b_row * b[e];
    store(h + j, v);
  });
}

// The solves with R and with R^T by substitution, and the product between them, kColumns columns to a block, a warp
// each. Of t and z a lane has every kWarp-th element in registers, from its own on; an element that has been found goes
// to all lanes, which take it out of those that are still to come.
//   sy = S Y^T, ys = Y S^T, yy = Y Y^T [p, p]; columns [2p, k]; p <= kWarp kSlots
constexpr int kColumns = kThreads / kWarp, kSlots = 4;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    middle_kernel(int64_t p, int64_t k, const double* __restrict__ sy, const double* __restrict__ ys,
                  const double* __restrict__ yy, T* columns) {
  const int lane = threadIdx.x % kWarp;
  const int64_t column = int64_t(blockIdx.x) * kColumns + threadIdx.x / kWarp;
  if (column >= k) return;
  double t[kSlots], z[kSlots], inverse[kSlots];  // inverse: 1 / the diagonal of R
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const int64_t j = lane + slot * kWarp;
    const double diagonal = j < p ? sy[j * p + j] : 1;
    inverse[slot] = 1 / (diagonal == 0 ? 1 : diagonal);
    t[slot] = j < p ? double(columns[j * k + column]) : 0;
    z[slot] = j < p ? -double(columns[(p + j) * k + column]) : 0;
  }
  // t = R^-1 (S V), from the last row up.
#pragma unroll
  for (int slot = kSlots - 1; slot >= 0; --slot)
    for (int owner = kWarp - 1; owner >= 0; --owner) {
      const int64_t i = owner + slot * kWarp;
      if (i >= p) continue;
      const double found = __shfl_sync(0xffffffffu, t[slot] * inverse[slot], owner);
#pragma unroll
      for (int s = 0; s <= slot; ++s) {
        const int64_t j = lane + s * kWarp;
        if (j < i) t[s] -= ys[i * p + j] * found;
      }
      if (lane == owner) t[slot] = found;
    }
  // z = (D + Y Y^T) t - Y V; Y Y^T is symmetric, so that lanes read neighbours.
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot)
    for (int owner = 0; owner < kWarp; ++owner) {
      const int64_t i = owner + slot * kWarp;
      if (i >= p) break;
      const double at = __shfl_sync(0xffffffffu, t[slot], owner);
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        const int64_t j = lane + s * kWarp;
        if (j < p) z[s] += (yy[i * p + j] + (i == j ? sy[i * p + i] : 0)) * at;
      }
    }
  // z = R^-T z, from the first row down.
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot)
    for (int owner = 0; owner < kWarp; ++owner) {
      const int64_t i = owner + slot * kWarp;
      if (i >= p) break;
      const double found = __shfl_sync(0xffffffffu, z[slot] * inverse[slot], owner);
#pragma unroll
      for (int s = slot; s < kSlots; ++s) {
        const int64_t j = lane + s * kWarp;
        if (j > i && j < p) z[s] -= sy[i * p + j] * found;
      }
      if (lane == owner) z[slot] = found;
    }
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const int64_t j = lane + slot * kWarp;
    if (j >= p) continue;
    columns[j * k + column] = T(z[slot]);
    columns[(p + j) * k + column] = T(-t[slot]);
  }
}

// The same for any p, with t and z in memory.   work [k, 2p]
template <typename T>
__global__ void __launch_bounds__(kThreads)
    long_middle_kernel(int64_t p, int64_t k, const double* __restrict__ sy, const double* __restrict__ yy, T* columns,
                       double* work) {
  const int lane = threadIdx.x % kWarp;
  const int64_t column = int64_t(blockIdx.x) * kColumns + threadIdx.x / kWarp;
  const bool inside = column < k;  // the others only come to the barriers
  double *t = work + column * 2 * p, *z = t + p;
  const auto diagonal = [&](int64_t i) { return sy[i * p + i] == 0 ? 1 : sy[i * p + i]; };
  // t = R^-1 (S V), from the last row up.
  for (int64_t i = p - 1; i >= 0; --i) {
    if (inside) {
      double sum = 0;
      for (int64_t j = i + 1 + lane; j < p; j += kWarp) sum += sy[i * p + j] * t[j];
      sum = warp_sum(sum);
      if (lane == 0) t[i] = (double(columns[i * k + column]) - sum) / diagonal(i);
    }
    __syncthreads();
  }
  // z = (D + Y Y^T) t - Y V; Y Y^T is symmetric, so that lanes read neighbours.
  if (inside)
    for (int64_t i = lane; i < p; i += kWarp) {
      double sum = sy[i * p + i] * t[i] - double(columns[(p + i) * k + column]);
      for (int64_t j = 0; j < p; ++j) sum += yy[j * p + i] * t[j];
      z[i] = sum;
    }
  __syncthreads();
  // z = R^-T z, from the first row down.
  for (int64_t i = 0; i < p; ++i) {
    if (inside) {
      const double solved = z[i] / diagonal(i);
      for (int64_t j = i + 1 + lane; j < p; j += kWarp) z[j] -= sy[i * p + j] * solved;
      if (lane == 0) {
        columns[i * k + column] = T(solved);
        columns[(p + i) * k + column] = T(-t[i]);
      }
    }
    __syncthreads();
  }
}

// Calls f(layers, division of the rows by warps, of the columns by threads) for every kLayersPerLaunch layers; returns
// the bytes of workspace. With `made` the update takes the pair in damped_s and damped_y. `workspace` may be null, to
// measure.
template <typename T, typename F>
size_t each_launch(const BfgsLayer<T>* in, int count, void* workspace, bool made, F&& f) {
  size_t used = 0;
  const auto take = [&](int64_t bytes) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(workspace) + used;
    used += ceil_div<size_t>(bytes, 16) * 16;
    return at;
  };
  Layers<T> layers;
  for (int begin = 0; begin < count; begin += kLayersPerLaunch) {
    layers.count = std::min(kLayersPerLaunch, count - begin);
    Blocks rows, columns;
    for (int l = 0; l < layers.count; ++l) {
      const BfgsLayer<T>& layer = in[begin + l];
      const int64_t bytes = layer.n * int64_t(sizeof(T));
      Work<T> work;
      work.theta2 = reinterpret_cast<double*>(take(sizeof(double)));
      work.status = reinterpret_cast<int64_t*>(take(sizeof(int64_t)));
      T** const vectors[] = {&work.damped_s, &work.damped_y, &work.hy, &work.hs, &work.a, &work.b};
      for (T** vector : vectors) *vector = reinterpret_cast<T*>(take(bytes));
      if (layer.damped_s) work.damped_s = layer.damped_s;
      if (layer.damped_y) work.damped_y = layer.damped_y;
      if (layer.hy) work.hy = layer.hy;
      work.s = made ? work.damped_s : layer.s;
      work.y = made ? work.damped_y : layer.y;
      layers.layer[l] = {layer, work};
      rows.first[l + 1] = rows.first[l] + unsigned(ceil_div<int64_t>(layer.n, kRowsPerBlock));
      columns.first[l + 1] = columns.first[l] + unsigned(ceil_div<int64_t>(layer.n, kThreads));
    }
    f(layers, rows, columns);
  }
  return used;
}

// A launch needs a block, even where no layer has rows.
unsigned total(const Blocks& division, int count) { return std::max(1u, division.first[count]); }

template <Products kProducts, typename T>
void launch_products(const Layers<T>& layers, const Blocks& rows, cudaStream_t stream) {
  LAUNCH((products_kernel<kProducts, T>), total(rows, layers.count), kRowThreads, 0, stream, layers, rows);
}

template <bool kDamped, typename T>
void launch_update(const Layers<T>& layers, const Blocks& rows, cudaStream_t stream) {
  LAUNCH((factors_kernel<kDamped, T>), layers.count, kThreads, 0, stream, layers);
  LAUNCH(update_kernel<T>, total(rows, layers.count), kRowThreads, 0, stream, layers, rows);
}

}  // namespace

template <typename T>
size_t bfgs_workspace(const BfgsLayer<T>* layers, int count) {
  return each_launch(layers, count, nullptr, false, [](const Layers<T>&, const Blocks&, const Blocks&) {});
}

template <typename T>
void double_damping(const BfgsLayer<T>* in, int count, void* workspace, cudaStream_t stream) {
  each_launch(in, count, workspace, true, [&](const Layers<T>& layers, const Blocks& rows, const Blocks&) {
    launch_products<Products::hy>(layers, rows, stream);
    LAUNCH((damping_kernel<false, T>), layers.count, kThreads, 0, stream, layers);
  });
}

template <typename T>
void bfgs_update(const BfgsLayer<T>* in, int count, void* workspace, cudaStream_t stream) {
  each_launch(in, count, workspace, false, [&](const Layers<T>& layers, const Blocks& rows, const Blocks&) {
    launch_products<Products::hy>(layers, rows, stream);
    launch_update<false>(layers, rows, stream);
  });
}

template <typename T>
void damped_bfgs_update(const BfgsLayer<T>* in, int count, void* workspace, cudaStream_t stream) {
  each_launch(in, count, workspace, true, [&](const Layers<T>& layers, const Blocks& rows, const Blocks&) {
    launch_products<Products::hy_and_hs>(layers, rows, stream);
    LAUNCH((damping_kernel<false, T>), layers.count, kThreads, 0, stream, layers);
    launch_products<Products::hs_damped>(layers, rows, stream);
    launch_update<true>(layers, rows, stream);
  });
}

template <typename T>
void hessian_action_update(const BfgsLayer<T>* in, int count, void* workspace, cudaStream_t stream) {
  each_launch(in, count, workspace, true, [&](const Layers<T>& layers, const Blocks& rows, const Blocks&) {
    launch_products<Products::action_s>(layers, rows, stream);
    launch_products<Products::action_y>(layers, rows, stream);
    launch_products<Products::action_hy>(layers, rows, stream);
    launch_update<false>(layers, rows, stream);
  });
}

template <typename T>
void damped_lbfgs_update(const BfgsLayer<T>* in, int count, void* workspace, cudaStream_t stream) {
  each_launch(in, count, workspace, true, [&](const Layers<T>& layers, const Blocks&, const Blocks& columns) {
    LAUNCH((damping_kernel<true, T>), layers.count, kThreads, 0, stream, layers);
    LAUNCH(push_kernel<T>, total(columns, layers.count), kThreads, 0, stream, layers, columns);
  });
}

template <typename T>
void lbfgs_middle(int64_t p, int64_t k, const double* sy, const double* ys, const double* yy, T* columns, double* work,
                  cudaStream_t stream) {
  if (p == 0 || k == 0) return;
  const unsigned blocks = unsigned(ceil_div<int64_t>(k, kColumns));
  if (p <= kSlots * kWarp) LAUNCH(middle_kernel<T>, blocks, kThreads, 0, stream, p, k, sy, ys, yy, columns);
  else LAUNCH(long_middle_kernel<T>, blocks, kThreads, 0, stream, p, k, sy, yy, columns, work);
}

#define INSTANTIATE(T)                                                                \
  template size_t bfgs_workspace(const BfgsLayer<T>*, int);                           \
  template void double_damping(const BfgsLayer<T>*, int, void*, cudaStream_t);        \
  template void bfgs_update(const BfgsLayer<T>*, int, void*, cudaStream_t);           \
  template void damped_bfgs_update(const BfgsLayer<T>*, int, void*, cudaStream_t);    \
  template void hessian_action_update(const BfgsLayer<T>*, int, void*, cudaStream_t); \
  template void damped_lbfgs_update(const BfgsLayer<T>*, int, void*, cudaStream_t);   \
  template void lbfgs_middle(int64_t, int64_t, const double*, const double*, const double*, T*, double*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace secondorder::cuda
