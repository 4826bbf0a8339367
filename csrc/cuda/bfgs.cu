// K-BFGS (Goldfarb, Ren & Bahamou): Powell's double damping (Algorithm 3) and the BFGS update of an inverse H, all
// layers of a net in each launch.
//
// With q = H y, rho = 1/(s.y) and tau = 1/(1 + rho y.q) the update H - rho (s q^T + q s^T) + rho (1 + rho y.q) s s^T,
// its square completed, is
//
//   H + a a^T - b b^T,   a = sqrt(rho/tau) (s - tau q),   b = sqrt(rho tau) q,
//
// symmetric to the bit. The damped q is theta2 H y + (1-theta2) H s~ with H s~ = theta1 H s + (1-theta1) H (H y), so
// one pass over H, for H y and H s together, serves both dampings, unless both thetas are below 1.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "kernels.h"
#include "reduce.cuh"

namespace secondorder::cuda {
namespace {

constexpr int kThreads = 256;  // of the kernels with a block to a layer
constexpr int64_t kUpdated = 1, kDampedS = 2, kDampedY = 4;

// Device memory of one layer.
template <typename T>
struct Work {
  double* theta2;    // [1]
  int64_t* status;   // [1]
  const T* s;        // [n] the pair that the update takes: given, or damped
  const T* y;        // [n]
  T* damped_s;       // [n] where the damped pair is written
  T* damped_y;       // [n]
  T* hy;             // [n] H y of the given y, then q
  T* hs;             // [n] H s of the given s; then H s~ where both dampings act
  T* a;              // [n]
  T* b;              // [n]
};

template <typename T>
struct Layer {
  BfgsLayer<T> in;
  Work<T> work;
};

template <typename T>
using Layers = Table<Layer<T>>;

enum class Products { hy, hy_and_hs, hs_damped };

// hy = H y; or hy and hs in one pass; or hs = H s~ for the layers where both dampings act.
// Parallel over the rows of every H, a warp each.
template <Products kProducts, typename T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    products_kernel(const Layers<T> __grid_constant__ layers, const Blocks __grid_constant__ division) {
  const int l = division.layer(layers.count, blockIdx.x);
  const BfgsLayer<T>& in = layers.layer[l].in;
  const Work<T>& work = layers.layer[l].work;
  const int64_t row = int64_t(blockIdx.x - division.first[l]) * kRowsPerBlock + threadIdx.x / kWarp, n = in.n;
  if (row >= n) return;
  const T* h = in.inverse_hessian + row * n;
  const bool leader = threadIdx.x % kWarp == 0;
  if constexpr (kProducts == Products::hs_damped) {
    if (*work.status != (kDampedS | kDampedY)) return;
    T sum[1];
    row_products(n, aligned(n, in.inverse_hessian, work.damped_s), h, work.damped_s, work.damped_s, sum);
    if (leader) work.hs[row] = sum[0];
  } else {
    T sums[kProducts == Products::hy ? 1 : 2];
    row_products(n, aligned(n, in.inverse_hessian, in.s, in.y), h, in.y, in.s, sums);
    if (leader) {
      work.hy[row] = sums[0];
      if constexpr (kProducts == Products::hy_and_hs) work.hs[row] = sums[1];
    }
  }
}

// f(i) for i < n, shared among the block's threads.
template <typename F>
__device__ __forceinline__ void each_element(int64_t n, F&& f) {
  for (int64_t i = threadIdx.x; i < n; i += kThreads) f(i);
}

// damped_s, damped_y, theta2 and the status' damping bits, from hy. Parallel over layers, a block each.
template <typename T>
__global__ void __launch_bounds__(kThreads) damping_kernel(const Layers<T> __grid_constant__ layers) {
  __shared__ double partial[2][kWarp];
  const BfgsLayer<T>& in = layers.layer[blockIdx.x].in;
  const Work<T>& work = layers.layer[blockIdx.x].work;
  double first[2] = {}, second[2] = {};  // s.y and y^T H y; s~.y and s~.s~
  each_element(in.n, [&](int64_t i) {
    first[0] += double(in.s[i]) * double(in.y[i]);
    first[1] += double(in.y[i]) * double(work.hy[i]);
  });
  block_sum(first, partial);
  const double theta1 = powell_theta(first[0], first[1], in.mu1);
  each_element(in.n, [&](int64_t i) {
    // Not by a product with 1 and 0: what is not damped keeps its bits, and a NaN in hy stays out.
    const T s = theta1 == 1 ? in.s[i] : T(theta1 * double(in.s[i]) + (1 - theta1) * double(work.hy[i]));
    work.damped_s[i] = s;
    second[0] += double(s) * double(in.y[i]);
    second[1] += double(s) * double(s);
  });
  block_sum(second, partial);
  const double theta2 = powell_theta(second[0], second[1], in.mu2);
  each_element(in.n, [&](int64_t i) {
    const T y = in.y[i];
    work.damped_y[i] = theta2 == 1 ? y : T(theta2 * double(y) + (1 - theta2) * double(work.damped_s[i]));
  });
  if (threadIdx.x == 0) {
    *work.theta2 = theta2;
    *work.status = (theta1 == 1 ? 0 : kDampedS) | (theta2 == 1 ? 0 : kDampedY);
  }
}

// a, b and the status, from the pair and q; kDamped: q is first made from hy and hs. Parallel over layers, a block
// each.
template <bool kDamped, typename T>
__global__ void __launch_bounds__(kThreads) factors_kernel(const Layers<T> __grid_constant__ layers) {
  __shared__ double partial[2][kWarp];
  const BfgsLayer<T>& in = layers.layer[blockIdx.x].in;
  const Work<T>& work = layers.layer[blockIdx.x].work;
  const double theta2 = kDamped ? *work.theta2 : 1;
  double sums[2] = {};  // s.y and y^T H y
  each_element(in.n, [&](int64_t i) {
    T q = work.hy[i];
    if (theta2 != 1) work.hy[i] = q = T(theta2 * double(q) + (1 - theta2) * double(work.hs[i]));
    sums[0] += double(work.s[i]) * double(work.y[i]);
    sums[1] += double(work.y[i]) * double(q);
  });
  block_sum(sums, partial);
  const double rho = 1 / sums[0], tau = 1 / (1 + rho * sums[1]);
  constexpr double most = (sizeof(T) == 4 ? double(FLT_MAX) : DBL_MAX) / 4;
  bool valid = sums[0] > 0 && rho - rho == 0 && sums[1] >= 0 && tau > 0;
  const double root_a = std::sqrt(rho / tau), root_b = std::sqrt(rho * tau);
  each_element(in.n, [&](int64_t i) {
    const T q = work.hy[i], a = T(root_a * double(work.s[i]) - root_a * tau * double(q)), b = T(root_b * double(q));
    work.a[i] = a;
    work.b[i] = b;
    // A positive definite matrix has no entry larger than its largest diagonal one, so the diagonal tells of overflow.
    const double entry = double(in.inverse_hessian[i * (in.n + 1)]) + double(a) * double(a) + double(b) * double(b);
    valid = valid && entry <= most;
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

// Calls f(layers, division of the rows) for every kLayersPerLaunch layers; returns the bytes of workspace. With
// `damped` the update takes the damped pair. `workspace` may be null, to measure.
template <typename T, typename F>
size_t each_launch(const BfgsLayer<T>* in, int count, void* workspace, bool damped, F&& f) {
  size_t used = 0;
  const auto take = [&](int64_t bytes) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(workspace) + used;
    used += ceil_div<size_t>(bytes, 16) * 16;
    return at;
  };
  Layers<T> layers;
  for (int begin = 0; begin < count; begin += kLayersPerLaunch) {
    layers.count = std::min(kLayersPerLaunch, count - begin);
    Blocks rows;
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
      work.s = damped ? work.damped_s : layer.s;
      work.y = damped ? work.damped_y : layer.y;
      layers.layer[l] = {layer, work};
      rows.first[l + 1] = rows.first[l] + unsigned(ceil_div<int64_t>(layer.n, kRowsPerBlock));
    }
    if (rows.first[layers.count] > 0) f(layers, rows, rows.first[layers.count]);
  }
  return used;
}

}  // namespace

template <typename T>
size_t bfgs_workspace(const BfgsLayer<T>* layers, int count) {
  return each_launch(layers, count, nullptr, false, [](const Layers<T>&, const Blocks&, unsigned) {});
}

template <typename T>
void double_damping(const BfgsLayer<T>* in, int count, void* workspace, cudaStream_t stream) {
  each_launch(in, count, workspace, true, [&](const Layers<T>& layers, const Blocks& rows, unsigned blocks) {
    LAUNCH((products_kernel<Products::hy, T>), blocks, kRowThreads, 0, stream, layers, rows);
    LAUNCH(damping_kernel<T>, layers.count, kThreads, 0, stream, layers);
  });
}

template <typename T>
void bfgs_update(const BfgsLayer<T>* in, int count, void* workspace, cudaStream_t stream) {
  each_launch(in, count, workspace, false, [&](const Layers<T>& layers, const Blocks& rows, unsigned blocks) {
    LAUNCH((products_kernel<Products::hy, T>), blocks, kRowThreads, 0, stream, layers, rows);
    LAUNCH((factors_kernel<false, T>), layers.count, kThreads, 0, stream, layers);
    LAUNCH(update_kernel<T>, blocks, kRowThreads, 0, stream, layers, rows);
  });
}

template <typename T>
void damped_bfgs_update(const BfgsLayer<T>* in, int count, void* workspace, cudaStream_t stream) {
  each_launch(in, count, workspace, true, [&](const Layers<T>& layers, const Blocks& rows, unsigned blocks) {
    LAUNCH((products_kernel<Products::hy_and_hs, T>), blocks, kRowThreads, 0, stream, layers, rows);
    LAUNCH(damping_kernel<T>, layers.count, kThreads, 0, stream, layers);
    LAUNCH((products_kernel<Products::hs_damped, T>), blocks, kRowThreads, 0, stream, layers, rows);
    LAUNCH((factors_kernel<true, T>), layers.count, kThreads, 0, stream, layers);
    LAUNCH(update_kernel<T>, blocks, kRowThreads, 0, stream, layers, rows);
  });
}

#define INSTANTIATE(T)                                                                   \
  template size_t bfgs_workspace(const BfgsLayer<T>*, int);                              \
  template void double_damping(const BfgsLayer<T>*, int, void*, cudaStream_t);           \
  template void bfgs_update(const BfgsLayer<T>*, int, void*, cudaStream_t);              \
  template void damped_bfgs_update(const BfgsLayer<T>*, int, void*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace secondorder::cuda
