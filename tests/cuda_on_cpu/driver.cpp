// The launchers behind C functions, for ctypes. Each returns 0, or 1 with what went wrong in `message`. Compiled by g++
// host arrays stand for device arrays; by nvcc everything runs on a GPU, on copies. Scratch memory is allocated here at
// exactly the size asked for, and starts as NaN bytes; as zeros where not all blocks run.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "machine.h"
#endif

namespace {

namespace cuda = secondorder::cuda;
using secondorder::EigenReplay;

std::string last_message;

// Where a call's arrays are for the kernels:
//   read(host, count), write(host, count)    a host array's elements; null stays null
//   scratch(bytes)
//   begin(), end()                           around the launches, which go to `stream`
#if defined(__CUDACC__)

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

__global__ void hold_up(long long cycles) {
  const long long begin = clock64();
  while (clock64() - begin < cycles) {
  }
}

// Copies lie between canaries, as far from a multiple of 64 bytes as the host's arrays. A kernel holds the stream up,
// so that a launch on another one runs too early.
class Session {
 public:
  cudaStream_t stream{};

  Session() { check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream"); }
  Session(const Session&) = delete;
  ~Session() {
    cudaDeviceSynchronize();
    for (const Copy& copy : copies) cudaFree(copy.base);
    cudaStreamDestroy(stream);
  }

  template <typename T>
  const T* read(const T* host, int64_t count) {
    return static_cast<const T*>(copied(host, count * sizeof(T), false));
  }
  template <typename T>
  T* write(T* host, int64_t count) {
    return static_cast<T*>(copied(host, count * sizeof(T), true));
  }
  void* scratch(size_t bytes) { return allocate(nullptr, bytes, kCanary, false); }

  void begin() {
    check(cudaDeviceSynchronize(), "copies");
    hold_up<<<1, 1, 0, stream>>>(2000000);  // about a millisecond
  }
  void end() {
    check(cudaGetLastError(), "launch");
    check(cudaDeviceSynchronize(), "kernels");
    for (const Copy& copy : copies) {
      std::vector<unsigned char> all(copy.before + copy.bytes + kCanary);
      check(cudaMemcpy(all.data(), copy.base, all.size(), cudaMemcpyDeviceToHost), "copy back");
      const auto begin = all.begin() + copy.before, end = begin + copy.bytes;
      const auto whole = [](unsigned char byte) { return byte == 0xFF; };
      if (!std::all_of(all.begin(), begin, whole) || !std::all_of(end, all.end(), whole))
        throw std::runtime_error("a write beside an array of " + std::to_string(copy.bytes) + " bytes");
      if (!copy.host) continue;
      if (copy.written) std::copy(begin, end, static_cast<unsigned char*>(copy.host));
      else if (std::memcmp(copy.host, &*begin, copy.bytes)) throw std::runtime_error("a write to an input");
    }
  }

 private:
  static constexpr size_t kCanary = 256;
  struct Copy {
    void* host;
    size_t bytes, before;
    unsigned char* base;
    bool written;
  };
  std::vector<Copy> copies;

  void* allocate(void* host, size_t bytes, size_t before, bool written) {
    unsigned char* base;
    check(cudaMalloc(&base, before + bytes + kCanary), "malloc");
    copies.push_back({host, bytes, before, base, written});
    check(cudaMemset(base, 0xFF, before + bytes + kCanary), "memset");
    return base + before;
  }

  void* copied(const void* host, size_t bytes, bool written) {
    if (!host || bytes == 0) return nullptr;
    for (Copy& copy : copies) {  // what a call reads and writes is one array
      if (copy.host != host || copy.bytes != bytes) continue;
      copy.written = copy.written || written;
      return copy.base + copy.before;
    }
    void* const target =
        allocate(const_cast<void*>(host), bytes, kCanary + reinterpret_cast<uintptr_t>(host) % 64, written);
    check(cudaMemcpy(target, host, bytes, cudaMemcpyHostToDevice), "copy");
    return target;
  }
};

#else

class Session {
 public:
  const cudaStream_t stream = reinterpret_cast<cudaStream_t>(0x5EED);

  Session() { cuda_on_cpu::machine.stream = stream; }

  template <typename T>
  const T* read(const T* host, int64_t) {
    return host;
  }
  template <typename T>
  T* write(T* host, int64_t) {
    return host;
  }
  void* scratch(size_t bytes) {
    memory.emplace_back(new unsigned char[bytes]);
    return std::memset(memory.back().get(), cuda_on_cpu::machine.last_blocks ? 0 : 0xFF, bytes);
  }
  void begin() {}
  void end() {}

 private:
  std::vector<std::unique_ptr<unsigned char[]>> memory;
};

#endif

template <typename F>
int guarded(F&& f) {
  try {
    Session session;
    f(session);
    session.end();
    return 0;
  } catch (const std::exception& e) {
    last_message = e.what();
    return 1;
  }
}

template <typename T>
struct Eacg {
  int count;
  const int64_t *n_out, *n_in;
  const T **bias_hessian, **mean_input, **grad_weight, **grad_bias;
  T **weight, **bias, **weight_momentum, **bias_momentum;
  const double *alpha, *lr, *momentum, *weight_decay, *max_norm;
};

template <typename T>
void run_eacg(Session& s, const Eacg<T>& in, const cuda::EacgSettings& settings, bool update,
              const cuda::Device& device, int64_t* iterations) {
  std::vector<cuda::EacgLayer<T>> layers(in.count);
  int64_t* const found = s.write(iterations, in.count);
  for (int l = 0; l < in.count; ++l) {
    const int64_t rows = in.n_out[l], columns = in.n_in[l];
    layers[l] = {rows,
                 columns,
                 s.read(in.bias_hessian[l], rows * rows),
                 s.read(in.mean_input[l], columns),
                 s.read(in.grad_weight[l], rows * columns),
                 s.read(in.grad_bias[l], rows),
                 s.write(in.weight[l], rows * columns),
                 s.write(in.bias[l], rows),
                 s.write(in.weight_momentum[l], rows * columns),
                 s.write(in.bias_momentum[l], rows),
                 found + l,
                 in.alpha[l],
                 in.lr[l],
                 in.momentum[l],
                 in.weight_decay[l],
                 in.max_norm[l]};
  }
  void* work = s.scratch(cuda::eacg_workspace(layers.data(), in.count, device));
#if !defined(__CUDACC__)
  cuda_on_cpu::machine.multiprocessors = device.multiprocessors;
  cuda_on_cpu::machine.shared_bytes = device.shared_bytes;
#endif
  static int flag;  // read when the call is over
  flag = 0;
  int* const not_finite = s.write(&flag, 1);
  s.begin();
  cuda::eacg_directions(layers.data(), in.count, settings, work, update ? not_finite : nullptr, device, s.stream);
  if (update) cuda::eacg_update(layers.data(), in.count, work, not_finite, device, s.stream);
  else cuda::eacg_write(layers.data(), in.count, work, device, s.stream);
}

template <typename T>
struct Bfgs {
  int count;
  const int64_t *n, *pairs;
  T** inverse_hessian;
  const T **s, **y;
  T **damped_s, **damped_y;
  const T** matrix;
  T** hy;
  const T **hs, **hhy;
  T **s_pairs, **y_pairs;
};

template <typename T>
void run_bfgs(Session& s, int mode, const Bfgs<T>& in, double mu1, double mu2, bool damped, bool bounded,
              double damping, int64_t* status) {
  static constexpr decltype(&cuda::bfgs_update<T>) launchers[] = {
      cuda::double_damping<T>, cuda::bfgs_update<T>, cuda::damped_bfgs_update<T>, cuda::hessian_action_update<T>,
      cuda::damped_lbfgs_update<T>};
  std::vector<cuda::BfgsLayer<T>> layers(in.count);
  int64_t* const found = s.write(status, in.count);
  for (int l = 0; l < in.count; ++l) {
    const int64_t n = in.n[l], pairs = in.pairs[l];
    layers[l] = {n,
                 s.write(in.inverse_hessian[l], n * n),
                 s.read(in.s[l], n),
                 s.read(in.y[l], n),
                 s.write(in.damped_s[l], n),
                 s.write(in.damped_y[l], n),
                 found + l,
                 mu1,
                 mu2,
                 damped,
                 bounded,
                 s.read(in.matrix[l], n * n),
                 damping,
                 s.write(in.hy[l], n),
                 s.read(in.hs[l], n),
                 s.read(in.hhy[l], n),
                 s.write(in.s_pairs[l], pairs * n),
                 s.write(in.y_pairs[l], pairs * n),
                 pairs};
  }
  void* work = s.scratch(cuda::bfgs_workspace(layers.data(), in.count));
  s.begin();
  launchers[mode](layers.data(), in.count, work, s.stream);
}

// What the operators have of every matrix: all dimensions, and a list of arrays each.
template <typename T>
struct Eigen {
  int count;
  const int64_t *n, *p, *ku, *kv;
  const T **grad_weight, **grad_bias, **mean, **basis_out, **basis_in;
  T** first;

  cuda::EigenMatrix<T> matrix(Session& s, int l) const {
    const secondorder::EigenSizes sizes{n[l], p[l], ku[l], kv[l], grad_bias[l] != nullptr};
    return {sizes,
            s.read(grad_weight[l], n[l] * p[l]),
            s.read(grad_bias[l], n[l]),
            s.read(mean[l], p[l]),
            s.read(basis_out[l], ku[l] * n[l]),
            s.read(basis_in[l], kv[l] * p[l]),
            s.write(first[l], sizes.parts())};
  }
};

template <typename T>
struct EigenStepping {
  T **weight, **bias, **second, **last;
  const int64_t *sampled, *step;
  double** size;
  const double *lr, *lr_bias, *decay, *decay_bias;
  double beta1, beta2, eps;
  EigenReplay replay;
  const double* rate;
};

template <typename T>
void run_eigen_step(Session& s, const Eigen<T>& in, const EigenStepping<T>& more, double* control, bool renewed,
                    const cuda::Device& device) {
  std::vector<cuda::EigenStep<T>> matrices(in.count);
  const double* const rate = s.read(more.rate, 2 * in.count);
  for (int l = 0; l < in.count; ++l) {
    const cuda::EigenMatrix<T> matrix = in.matrix(s, l);
    const int64_t n = in.n[l], p = in.p[l];
    matrices[l] = {matrix,
                   s.write(more.weight[l], n * p),
                   s.write(more.bias[l], n),
                   s.write(more.second[l], matrix.sizes.parts()),
                   s.write(more.last[l], matrix.sizes.rest() + more.sampled[l] * p),
                   more.sampled[l],
                   s.write(more.size[l], 1),
                   more.step[l],
                   more.beta1,
                   more.beta2,
                   more.eps,
                   more.lr[l],
                   more.lr_bias[l],
                   more.decay[l],
                   more.decay_bias[l],
                   rate ? rate + 2 * l : nullptr};
  }
  void* work = s.scratch(cuda::eigen_step_workspace(matrices.data(), in.count, device));
  double* const length = s.write(control, secondorder::kEigenControl);
  s.begin();
  cuda::eigen_step(matrices.data(), in.count, length, renewed, more.replay, work, device, s.stream);
}

template <typename T>
void run_eigen_renew(Session& s, const Eigen<T>& in, T** new_mean, T** new_out, T** new_in, T** scale_out, T** scale_in,
                     const T** sketch, const T** bias_hessian, const int64_t* rows, const double* share,
                     const EigenReplay& replay, double decay, double* control, const cuda::Device& device) {
  std::vector<cuda::EigenRenewal<T>> matrices(in.count);
  for (int l = 0; l < in.count; ++l) {
    const int64_t n = in.n[l], p = in.p[l], ku = in.ku[l], kv = in.kv[l];
    matrices[l] = {in.matrix(s, l),
                   s.write(new_mean[l], p),
                   s.write(new_out[l], ku * n),
                   s.write(new_in[l], kv * p),
                   s.write(scale_out[l], ku),
                   s.write(scale_in[l], kv),
                   s.read(sketch[l], (kv + 1) * p),
                   rows[l],
                   s.read(bias_hessian[l], n * n),
                   share[l]};
  }
  void* work = s.scratch(cuda::eigen_renew_workspace(matrices.data(), in.count, device));
  double* const length = s.write(control, secondorder::kEigenControl);
  s.begin();
  cuda::eigen_renew(matrices.data(), in.count, length, replay, decay, work, device, s.stream);
}

#if !defined(__CUDACC__)
void mma_kernel(const float* a, const float* b, float* d) {
  const int group = threadIdx.x >> 2, member = threadIdx.x % 4;
  float a_part[4], b_part[2], d_part[4];
  const auto target = [=](int i) { return d + (i < 2 ? group : group + 8) * 8 + member * 2 + i % 2; };
  for (int i = 0; i < 4; ++i) a_part[i] = a[(i % 2 ? group + 8 : group) * 8 + (i < 2 ? member : member + 4)];
  for (int i = 0; i < 2; ++i) b_part[i] = b[(i < 1 ? member : member + 4) * 8 + group];
  for (int i = 0; i < 4; ++i) d_part[i] = *target(i);
  cuda::mma_m16n8k8(d_part, a_part, b_part);
  for (int i = 0; i < 4; ++i) *target(i) = d_part[i];
}
#endif

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

const char* message() { return last_message.c_str(); }

#if defined(__CUDACC__)
void configure(int, uint64_t, int) {}
const char* launches() { return ""; }
#else
void configure(int order, uint64_t seed, int planted) {
  cuda_on_cpu::machine.order = cuda_on_cpu::Order(order);
  cuda_on_cpu::machine.seed = seed;
  cuda_on_cpu::machine.last_blocks = 0;
  cuda_on_cpu::machine.launches.clear();
  cuda_on_cpu::planted = planted;
}

// Of every launch only so many blocks run, its last.
void run_last_blocks(size_t count) { cuda_on_cpu::machine.last_blocks = count; }

// Tells how much static shared memory a kernel has, by its distance from `configure`.
void set_static_shared(int64_t distance, size_t bytes) {
  cuda_on_cpu::machine.static_shared[reinterpret_cast<const char*>(&configure) + distance] = bytes;
}

// What has been launched since `configure`, a line each.
const char* launches() {
  last_message.clear();
  for (const std::string& line : cuda_on_cpu::machine.launches) last_message += line + "\n";
  return message();
}

// d += a b by one warp, which holds a [16, 8], b [8, 8] and d [16, 8] as the PTX manual's tables for mma.m16n8k8 say.
int mma(const float* a, const float* b, float* d) {
  return guarded([&](Session& s) { LAUNCH(mma_kernel, 1, cuda_on_cpu::kLanes, 0, s.stream, a, b, d); });
}
#endif

#define ENTRIES(T, suffix)                                                                                             \
  int activation_derivatives_##suffix(int64_t n, const T* saved, int activation, double parameter, T* d1, T* d2) {     \
    return guarded([&](Session& s) {                                                                                   \
      const T* const v = s.read(saved, n);                                                                             \
      T *const first = s.write(d1, n), *const second = s.write(d2, n);                                                 \
      s.begin();                                                                                                       \
      cuda::activation_derivatives(n, v, secondorder::Activation(activation), T(parameter), first, second, s.stream);  \
    });                                                                                                                \
  }                                                                                                                    \
  int bias_hessian_##suffix(int64_t k, int64_t n, int64_t m, const T* hessian, const T* weight, const T* first,        \
                            const T* second, const T* grad_input, int activation, double parameter, double gamma,      \
                            int arithmetic, int multiprocessors, T* out) {                                             \
    return guarded([&](Session& s) {                                                                                   \
      const cuda::Device device{multiprocessors, 0};                                                                   \
      void* work = s.scratch(cuda::bias_hessian_workspace<T>(k, n, m, cuda::Arithmetic(arithmetic), device));          \
      const cuda::Derivatives<T> derivatives{s.read(first, m * n),                                                     \
                                             s.read(second, m * n),                                                    \
                                             s.read(grad_input, m * n),                                                \
                                             activation >= 0,                                                          \
                                             secondorder::Activation(std::max(activation, 0)),                         \
                                             T(parameter)};                                                            \
      const T *const h = s.read(hessian, k * k), *const w = s.read(weight, k * n);                                     \
      T* const result = s.write(out, n * n);                                                                           \
      s.begin();                                                                                                       \
      cuda::bias_hessian(k, n, m, h, w, derivatives, T(gamma), cuda::Arithmetic(arithmetic), work, result, device,     \
                         s.stream);                                                                                    \
    });                                                                                                                \
  }                                                                                                                    \
  int bias_hessian_of_products_##suffix(int64_t n, int64_t m, const T* curvature, const T* moment, const double* sums, \
                                        double gamma, T* out) {                                                        \
    return guarded([&](Session& s) {                                                                                   \
      const T *const c = s.read(curvature, n * n), *const d = s.read(moment, n * n);                                   \
      const double* const diagonal = s.read(sums, n);                                                                  \
      T* const result = s.write(out, n * n);                                                                           \
      s.begin();                                                                                                       \
      cuda::bias_hessian_of_products(n, m, c, d, diagonal, T(gamma), result, s.stream);                                \
    });                                                                                                                \
  }                                                                                                                    \
  int eacg_##suffix(int count, const int64_t* n_out, const int64_t* n_in, const T** bias_hessian,                      \
                    const T** mean_input, const T** grad_weight, const T** grad_bias, T** weight, T** bias,            \
                    T** weight_momentum, T** bias_momentum, const double* alpha, const double* lr,                     \
                    const double* momentum, const double* weight_decay, const double* max_norm, int max_iter,          \
                    double tol, int truncated, int update, int multiprocessors, int shared_bytes,                      \
                    int64_t* iterations) {                                                                             \
    return guarded([&](Session& s) {                                                                                   \
      run_eacg<T>(s,                                                                                                   \
                  {count, n_out, n_in, bias_hessian, mean_input, grad_weight, grad_bias, weight, bias,                 \
                   weight_momentum, bias_momentum, alpha, lr, momentum, weight_decay, max_norm},                       \
                  {max_iter, tol, truncated != 0}, update != 0, {multiprocessors, shared_bytes}, iterations);          \
    });                                                                                                                \
  }                                                                                                                    \
  int bfgs_##suffix(int mode, int count, const int64_t* n, const int64_t* pairs, T** inverse_hessian, const T** s,     \
                    const T** y, T** damped_s, T** damped_y, const T** matrix, T** hy, const T** hs, const T** hhy,    \
                    T** s_pairs, T** y_pairs, double mu1, double mu2, int damped, int bounded, double damping,         \
                    int64_t* status) {                                                                                 \
    return guarded([&](Session& session) {                                                                             \
      run_bfgs<T>(session, mode,                                                                                       \
                  {count, n, pairs, inverse_hessian, s, y, damped_s, damped_y, matrix, hy, hs, hhy, s_pairs, y_pairs}, \
                  mu1, mu2, damped != 0, bounded != 0, damping, status);                                               \
    });                                                                                                                \
  }                                                                                                                    \
  int lbfgs_middle_##suffix(int64_t p, int64_t k, const double* sy, const double* ys, const double* yy, T* columns) {  \
    return guarded([&](Session& s) {                                                                                   \
      const double *const a = s.read(sy, p * p), *const b = s.read(ys, p * p), *const c = s.read(yy, p * p);           \
      T* const result = s.write(columns, 2 * p * k);                                                                   \
      double* const work = static_cast<double*>(s.scratch(2 * p * k * sizeof(double)));                                \
      s.begin();                                                                                                       \
      cuda::lbfgs_middle(p, k, a, b, c, result, work, s.stream);                                                       \
    });                                                                                                                \
  }                                                                                                                    \
  int eigen_sketch_##suffix(int64_t m, int64_t p, int64_t k, const T* inputs, const T* basis, const T* shift,          \
                            T* sketch, const double* control, int64_t every, int multiprocessors) {                    \
    return guarded([&](Session& s) {                                                                                   \
      const cuda::Device device{multiprocessors, 0};                                                                   \
      const cuda::EigenSketch<T> in{                                                                                   \
          m, p, k, s.read(inputs, m * p), s.read(basis, k * p), s.read(shift, p), s.write(sketch, (k + 1) * p)};       \
      void* work = s.scratch(cuda::eigen_sketch_workspace(in, device));                                                \
      const double* const length = s.read(control, secondorder::kEigenControl);                                        \
      s.begin();                                                                                                       \
      cuda::eigen_sketch(in, length, EigenReplay{every}, work, device, s.stream);                                      \
    });                                                                                                                \
  }                                                                                                                    \
  int eigen_renew_##suffix(int count, const int64_t* n, const int64_t* p, const int64_t* ku, const int64_t* kv,        \
                           const T** grad_weight, const T** grad_bias, T** mean, T** basis_out, T** basis_in,          \
                           T** first, T** scale_out, T** scale_in, const T** sketch, const T** bias_hessian,           \
                           const int64_t* rows, const double* share, int64_t every, int64_t since, double decay_,      \
                           double* control, int multiprocessors) {                                                     \
    return guarded([&](Session& s) {                                                                                   \
      run_eigen_renew<T>(s,                                                                                            \
                         {count, n, p, ku, kv, grad_weight, grad_bias, (const T**)mean, (const T**)basis_out,          \
                          (const T**)basis_in, first},                                                                 \
                         mean, basis_out, basis_in, scale_out, scale_in, sketch, bias_hessian, rows, share,            \
                         EigenReplay{every, since}, decay_, control, {multiprocessors, 0});                            \
    });                                                                                                                \
  }                                                                                                                    \
  int eigen_step_##suffix(                                                                                             \
      int count, const int64_t* n, const int64_t* p, const int64_t* ku, const int64_t* kv, const T** grad_weight,      \
      const T** grad_bias, const T** mean, const T** basis_out, const T** basis_in, T** first, T** weight, T** bias,   \
      T** second, T** last, const int64_t* sampled, double** size, const int64_t* step, const double* lr,              \
      const double* lr_bias, const double* decay, const double* decay_bias, double beta1, double beta2, double eps,    \
      int renewed, int64_t every, int64_t since, const double* rate, double* control, int multiprocessors) {           \
    return guarded([&](Session& s) {                                                                                   \
      run_eigen_step<T>(s, {count, n, p, ku, kv, grad_weight, grad_bias, mean, basis_out, basis_in, first},            \
                        {weight, bias, second, last, sampled, step, size, lr, lr_bias, decay, decay_bias, beta1,       \
                         beta2, eps, EigenReplay{every, since}, rate},                                                 \
                        control, renewed != 0, {multiprocessors, 0});                                                  \
    });                                                                                                                \
  }
ENTRIES(float, float32)
ENTRIES(double, float64)
}
#pragma GCC visibility pop
