// The launchers behind C functions, for ctypes: host arrays stand for device arrays. Each returns 0, or 1 with what
// went wrong in `message`. Scratch memory is allocated here at exactly the size asked for, and starts as NaN bytes; as
// zeros where not all blocks run.
#include <algorithm>
#include <cstddef>
#include <stdexcept>

#include "kernels.h"
#include "machine.h"

namespace {

namespace cuda = secondorder::cuda;
using secondorder::EigenReplay;

std::string last_message;
const cudaStream_t kStream = reinterpret_cast<cudaStream_t>(0x5EED);

template <typename F>
int guarded(F&& f) {
  try {
    cuda_on_cpu::machine.stream = kStream;
    f();
    return 0;
  } catch (const std::exception& e) {
    last_message = e.what();
    return 1;
  }
}

struct Scratch {
  explicit Scratch(size_t bytes) : memory(new unsigned char[bytes]) {
    std::memset(memory.get(), cuda_on_cpu::machine.last_blocks ? 0 : 0xFF, bytes);
  }
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(memory.get());
  }
  std::unique_ptr<unsigned char[]> memory;
};

template <typename T>
struct Eacg {
  int count;
  const int64_t *n_out, *n_in;
  const T **bias_hessian, **mean_input, **grad_weight, **grad_bias;
  T **weight, **bias, **weight_momentum, **bias_momentum;
  const double *alpha, *lr, *momentum, *weight_decay, *max_norm;
};

template <typename T>
void run_eacg(const Eacg<T>& in, const cuda::EacgSettings& settings, bool update, const cuda::Device& device,
              int64_t* iterations) {
  std::vector<cuda::EacgLayer<T>> layers(in.count);
  for (int l = 0; l < in.count; ++l)
    layers[l] = {in.n_out[l],     in.n_in[l],   in.bias_hessian[l], in.mean_input[l],      in.grad_weight[l],
                 in.grad_bias[l], in.weight[l], in.bias[l],         in.weight_momentum[l], in.bias_momentum[l],
                 iterations + l,  in.alpha[l],  in.lr[l],           in.momentum[l],        in.weight_decay[l],
                 in.max_norm[l]};
  Scratch workspace(cuda::eacg_workspace(layers.data(), in.count, device));
  void* work = workspace.as<void>();
  cuda_on_cpu::machine.multiprocessors = device.multiprocessors;
  cuda_on_cpu::machine.shared_bytes = device.shared_bytes;
  int not_finite = 0;
  cuda::eacg_directions(layers.data(), in.count, settings, work, update ? &not_finite : nullptr, device, kStream);
  if (update) cuda::eacg_update(layers.data(), in.count, work, &not_finite, device, kStream);
  else cuda::eacg_write(layers.data(), in.count, work, device, kStream);
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
void run_bfgs(int mode, const Bfgs<T>& in, double mu1, double mu2, bool damped, bool bounded, double damping,
              int64_t* status) {
  static constexpr decltype(&cuda::bfgs_update<T>) launchers[] = {
      cuda::double_damping<T>, cuda::bfgs_update<T>, cuda::damped_bfgs_update<T>, cuda::hessian_action_update<T>,
      cuda::damped_lbfgs_update<T>};
  std::vector<cuda::BfgsLayer<T>> layers(in.count);
  for (int l = 0; l < in.count; ++l)
    layers[l] = {in.n[l],
                 in.inverse_hessian[l],
                 in.s[l],
                 in.y[l],
                 in.damped_s[l],
                 in.damped_y[l],
                 status + l,
                 mu1,
                 mu2,
                 damped,
                 bounded,
                 in.matrix[l],
                 damping,
                 in.hy[l],
                 in.hs[l],
                 in.hhy[l],
                 in.s_pairs[l],
                 in.y_pairs[l],
                 in.pairs[l]};
  Scratch workspace(cuda::bfgs_workspace(layers.data(), in.count));
  launchers[mode](layers.data(), in.count, workspace.as<void>(), kStream);
}

// What the operators have of every matrix: all dimensions, and a list of arrays each.
template <typename T>
struct Eigen {
  int count;
  const int64_t *n, *p, *ku, *kv;
  const T **grad_weight, **grad_bias, **mean, **basis_out, **basis_in;
  T** first;

  cuda::EigenMatrix<T> matrix(int l) const {
    return {{n[l], p[l], ku[l], kv[l], grad_bias[l] != nullptr},
            grad_weight[l],
            grad_bias[l],
            mean[l],
            basis_out[l],
            basis_in[l],
            first[l]};
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
void run_eigen_step(const Eigen<T>& in, const EigenStepping<T>& more, double* control, bool renewed,
                    const cuda::Device& device) {
  std::vector<cuda::EigenStep<T>> matrices(in.count);
  for (int l = 0; l < in.count; ++l) {
    const cuda::EigenMatrix<T> matrix = in.matrix(l);
    matrices[l] = {matrix,          more.weight[l],  more.bias[l],       more.second[l],
                   more.last[l],    more.sampled[l], more.size[l],       more.step[l],
                   more.beta1,      more.beta2,      more.eps,           more.lr[l],
                   more.lr_bias[l], more.decay[l],   more.decay_bias[l], more.rate ? more.rate + 2 * l : nullptr};
  }
  Scratch workspace(cuda::eigen_step_workspace(matrices.data(), in.count, device));
  cuda::eigen_step(matrices.data(), in.count, control, renewed, more.replay, workspace.as<void>(), device, kStream);
}

template <typename T>
void run_eigen_renew(const Eigen<T>& in, T** new_mean, T** new_out, T** new_in, T** scale_out, T** scale_in,
                     const T** sketch, const T** bias_hessian, const int64_t* rows, const double* share,
                     const EigenReplay& replay, double decay, double* control, const cuda::Device& device) {
  std::vector<cuda::EigenRenewal<T>> matrices(in.count);
  for (int l = 0; l < in.count; ++l)
    matrices[l] = {in.matrix(l), new_mean[l], new_out[l], new_in[l],       scale_out[l],
                   scale_in[l],  sketch[l],   rows[l],    bias_hessian[l], share[l]};
  Scratch workspace(cuda::eigen_renew_workspace(matrices.data(), in.count, device));
  cuda::eigen_renew(matrices.data(), in.count, control, replay, decay, workspace.as<void>(), device, kStream);
}

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

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

const char* message() { return last_message.c_str(); }

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
  return guarded([&] { LAUNCH(mma_kernel, 1, cuda_on_cpu::kLanes, 0, kStream, a, b, d); });
}

#define ENTRIES(T, suffix)                                                                                             \
  int activation_derivatives_##suffix(int64_t n, const T* saved, int activation, double parameter, T* d1, T* d2) {     \
    return guarded([&] {                                                                                               \
      cuda::activation_derivatives(n, saved, secondorder::Activation(activation), T(parameter), d1, d2, kStream);      \
    });                                                                                                                \
  }                                                                                                                    \
  int bias_hessian_##suffix(int64_t k, int64_t n, int64_t m, const T* hessian, const T* weight, const T* first,        \
                            const T* second, const T* grad_input, int activation, double parameter, double gamma,      \
                            int arithmetic, int multiprocessors, T* out) {                                             \
    return guarded([&] {                                                                                               \
      const cuda::Device device{multiprocessors, 0};                                                                   \
      Scratch workspace(cuda::bias_hessian_workspace<T>(k, n, m, cuda::Arithmetic(arithmetic), device));               \
      const cuda::Derivatives<T> derivatives{                                                                          \
          first, second, grad_input, activation >= 0, secondorder::Activation(std::max(activation, 0)), T(parameter)}; \
      cuda::bias_hessian(k, n, m, hessian, weight, derivatives, T(gamma), cuda::Arithmetic(arithmetic),                \
                         workspace.as<void>(), out, device, kStream);                                                  \
    });                                                                                                                \
  }                                                                                                                    \
  int bias_hessian_of_products_##suffix(int64_t n, int64_t m, const T* curvature, const T* moment, const double* sums, \
                                        double gamma, T* out) {                                                        \
    return guarded([&] { cuda::bias_hessian_of_products(n, m, curvature, moment, sums, T(gamma), out, kStream); });    \
  }                                                                                                                    \
  int eacg_##suffix(int count, const int64_t* n_out, const int64_t* n_in, const T** bias_hessian,                      \
                    const T** mean_input, const T** grad_weight, const T** grad_bias, T** weight, T** bias,            \
                    T** weight_momentum, T** bias_momentum, const double* alpha, const double* lr,                     \
                    const double* momentum, const double* weight_decay, const double* max_norm, int max_iter,          \
                    double tol, int truncated, int update, int multiprocessors, int shared_bytes,                      \
                    int64_t* iterations) {                                                                             \
    return guarded([&] {                                                                                               \
      run_eacg<T>({count, n_out, n_in, bias_hessian, mean_input, grad_weight, grad_bias, weight, bias,                 \
                   weight_momentum, bias_momentum, alpha, lr, momentum, weight_decay, max_norm},                       \
                  {max_iter, tol, truncated != 0}, update != 0, {multiprocessors, shared_bytes}, iterations);          \
    });                                                                                                                \
  }                                                                                                                    \
  int bfgs_##suffix(int mode, int count, const int64_t* n, const int64_t* pairs, T** inverse_hessian, const T** s,     \
                    const T** y, T** damped_s, T** damped_y, const T** matrix, T** hy, const T** hs, const T** hhy,    \
                    T** s_pairs, T** y_pairs, double mu1, double mu2, int damped, int bounded, double damping,         \
                    int64_t* status) {                                                                                 \
    return guarded([&] {                                                                                               \
      run_bfgs<T>(mode,                                                                                                \
                  {count, n, pairs, inverse_hessian, s, y, damped_s, damped_y, matrix, hy, hs, hhy, s_pairs, y_pairs}, \
                  mu1, mu2, damped != 0, bounded != 0, damping, status);                                               \
    });                                                                                                                \
  }                                                                                                                    \
  int lbfgs_middle_##suffix(int64_t p, int64_t k, const double* sy, const double* ys, const double* yy, T* columns) {  \
    return guarded([&] {                                                                                               \
      Scratch work(2 * p * k * sizeof(double));                                                                        \
      cuda::lbfgs_middle(p, k, sy, ys, yy, columns, work.as<double>(), kStream);                                       \
    });                                                                                                                \
  }                                                                                                                    \
  int eigen_sketch_##suffix(int64_t m, int64_t p, int64_t k, const T* inputs, const T* basis, const T* shift,          \
                            T* sketch, const double* control, int64_t every, int multiprocessors) {                    \
    return guarded([&] {                                                                                               \
      const cuda::Device device{multiprocessors, 0};                                                                   \
      const cuda::EigenSketch<T> in{m, p, k, inputs, basis, shift, sketch};                                            \
      Scratch workspace(cuda::eigen_sketch_workspace(in, device));                                                     \
      cuda::eigen_sketch(in, control, EigenReplay{every}, workspace.as<void>(), device, kStream);                      \
    });                                                                                                                \
  }                                                                                                                    \
  int eigen_renew_##suffix(int count, const int64_t* n, const int64_t* p, const int64_t* ku, const int64_t* kv,        \
                           const T** grad_weight, const T** grad_bias, T** mean, T** basis_out, T** basis_in,          \
                           T** first, T** scale_out, T** scale_in, const T** sketch, const T** bias_hessian,           \
                           const int64_t* rows, const double* share, int64_t every, int64_t since, double decay_,      \
                           double* control, int multiprocessors) {                                                     \
    return guarded([&] {                                                                                               \
      run_eigen_renew<T>({count, n, p, ku, kv, grad_weight, grad_bias, (const T**)mean, (const T**)basis_out,          \
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
    return guarded([&] {                                                                                               \
      run_eigen_step<T>({count, n, p, ku, kv, grad_weight, grad_bias, mean, basis_out, basis_in, first},               \
                        {weight, bias, second, last, sampled, step, size, lr, lr_bias, decay, decay_bias, beta1,       \
                         beta2, eps, EigenReplay{every, since}, rate},                                                 \
                        control, renewed != 0, {multiprocessors, 0});                                                  \
    });                                                                                                                \
  }
ENTRIES(float, float32)
ENTRIES(double, float64)
}
#pragma GCC visibility pop
