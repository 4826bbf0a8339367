// EA-CG (Chen et al., Eq. 9 to 11b): ((1-alpha) H P a a^T + alpha P) = -B and ((1-alpha) H + alpha I) d = -g.
//
// In the orthogonal split B = B' + u a^T/s, with u = B a and s = a^T a, every matrix that conjugate gradients meet from
// a zero start has the form c B' + (v/sqrt(s)) a^T, and the system falls apart into a scalar and an n_out-dimensional
// one:
//
//   alpha c = -1     and     (alpha I + (1-alpha) s H) v = -u/sqrt(s).
//
// The closed form divides in the first and runs CG on the second. The paper's truncated iterates are CG on both
// together, the scalar entering as one more coordinate of length |B'|. Either way an iteration is one product with H,
// which the bias system, the same H under another shift, shares. P is a rank-one change of B, so an update reads B and
// W once.
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "../ops/eacg.h"
#include "../tensors.h"
#include "kernels.h"
#include "parallel.h"

namespace secondorder::cpu {
namespace {

template <typename T>
double dot(const std::vector<T>& x, const std::vector<T>& y) {
  constexpr size_t kLanes = 8;  // so many partial sums, which no addition waits for another in
  double sums[kLanes] = {};
  size_t i = 0;
  for (; i + kLanes <= x.size(); i += kLanes)
    for (size_t lane = 0; lane < kLanes; ++lane) sums[lane] += double(x[i + lane]) * double(y[i + lane]);
  for (; i < x.size(); ++i) sums[0] += double(x[i]) * double(y[i]);
  return std::accumulate(sums, sums + kLanes, 0.0);
}

// Conjugate gradients for (shift I + scale H) x = rhs, with one more, uncoupled coordinate whose matrix is `shift`.
template <typename T>
class ConjugateGradient {
 public:
  ConjugateGradient(std::vector<T> rhs, double extra_rhs, double shift, double scale, double tol)
      : x_(rhs.size(), T(0)), r_(std::move(rhs)), p_(r_), extra_r_(extra_rhs), extra_p_(extra_rhs), shift_(shift),
        scale_(scale), rr_(dot(r_, r_) + extra_r_ * extra_r_), stop_(tol * tol * rr_) {
    if (rr_ <= 0) scale_ = 1;
  }

  bool active() const { return active_; }
  const std::vector<T>& direction() const { return p_; }

  // One iteration, given hp = H p. Stops where the residual is at most tol of the first one; where p^T A p <= 0, which
  // only an indefinite H can give; and at a number that is not finite: the solution is then NaN.
  void step(const std::vector<T>& hp) {
    std::vector<T>& ap = ap_;
    ap.resize(hp.size());
    for (size_t i = 0; i < hp.size(); ++i) ap[i] = T(scale_) * hp[i] + T(shift_) * p_[i];
    const double curvature = dot(p_, ap) + shift_ * extra_p_ * extra_p_;
    if (curvature <= 0 || !std::isfinite(curvature)) {
      if (!std::isfinite(curvature)) std::fill(x_.begin(), x_.end(), std::numeric_limits<T>::quiet_NaN());
      active_ = false;
      return;
    }
    const double step = rr_ / curvature;
    for (size_t i = 0; i < x_.size(); ++i) {
      x_[i] += T(step) * p_[i];
      r_[i] -= T(step) * ap[i];
    }
    extra_x_ += step * extra_p_;
    extra_r_ -= step * shift_ * extra_p_;
    const double rr = dot(r_, r_) + extra_r_ * extra_r_, beta = rr / rr_;
    for (size_t i = 0; i < x_.size(); ++i) p_[i] = r_[i] + T(beta) * p_[i];
    extra_p_ = extra_r_ + beta * extra_p_;
    rr_ = rr;
    ++iterations_;
    if (!std::isfinite(rr_)) std::fill(x_.begin(), x_.end(), std::numeric_limits<T>::quiet_NaN());
    active_ = rr_ > stop_;
  }

  const std::vector<T>& solution() const { return x_; }
  double extra_solution() const { return extra_x_; }
  int64_t iterations() const { return iterations_; }

 private:
  std::vector<T> x_, r_, p_, ap_;
  double extra_x_ = 0, extra_r_, extra_p_, shift_, scale_, rr_, stop_;
  int64_t iterations_ = 0;
  // Even from a residual of zero: one product, whatever its scale, shows whether H is finite.
  bool active_ = true;
};

// The solution of one layer's two systems: P = c B + w a^T and the bias direction.
template <typename T>
struct Direction {
  double c;
  std::vector<T> w, bias;
  int64_t iterations;  // of the weight system
  double largest;      // a bound on every |P_ij| and |d_i|; NaN where anything is not finite
  double norm;         // sqrt(|P|^2 + |d|^2)

  void scale(double factor) {
    c *= factor;
    for (T& x : w) x = T(factor * x);
    for (T& x : bias) x = T(factor * x);
  }
};

struct Settings {
  int64_t max_iter;
  double tol;
  bool truncated;
};

// bias_hessian [n_out, n_out], mean_input [n_in], grad_weight [n_out, n_in], grad_bias [n_out] or null
template <typename T>
Direction<T> solve(const T* hessian, const T* mean_input, const T* grad_weight, const T* grad_bias, int64_t n_out,
                   int64_t n_in, double alpha, const Settings& settings) {
  const Kernels<T>& kernel = kernels<T>();
  double s, same;  // s = a^T a
  kernel.project(1, n_in, mean_input, mean_input, &s, &same);
  const double root = std::sqrt(s);
  std::vector<double> u(n_out), squares(n_out);
  parallel_rows(n_out, n_in, [&](int64_t begin, int64_t end) {
    kernel.project(end - begin, n_in, grad_weight + begin * n_in, mean_input, u.data() + begin, squares.data() + begin);
  });
  double across = std::accumulate(squares.begin(), squares.end(), 0.0);  // |B'|
  if (s > 0) across -= dot(u, u) / s;
  // Rounding can leave a small negative number where B is all along a; NaN must stay.
  across = across < 0 ? 0 : std::sqrt(across);

  std::vector<T> weight_rhs(n_out), bias_rhs(grad_bias ? n_out : 0);
  // With a = 0 nothing is along it, and u = 0; but a NaN in B or a then stands in u alone, and must reach the solution.
  for (int64_t i = 0; i < n_out; ++i) weight_rhs[i] = s > 0 ? T(-u[i] / root) : T(u[i]);
  for (size_t i = 0; i < bias_rhs.size(); ++i) bias_rhs[i] = -grad_bias[i];
  ConjugateGradient<T> weight(std::move(weight_rhs), settings.truncated ? -across : 0, alpha, (1 - alpha) * s,
                              settings.tol);
  ConjugateGradient<T> bias(std::move(bias_rhs), 0, alpha, 1 - alpha, settings.tol);

  std::vector<T> h1(n_out), h2(bias.direction().size());
  for (int64_t i = 0; i < settings.max_iter && (weight.active() || bias.active()); ++i) {
    const bool both = weight.active() && bias.active();
    const T* p1 = weight.active() ? weight.direction().data() : bias.direction().data();
    T* y1 = weight.active() ? h1.data() : h2.data();
    const T* p2 = both ? bias.direction().data() : nullptr;
    parallel_rows(n_out, n_out, [&](int64_t begin, int64_t end) {
      kernel.matvec(end - begin, n_out, hessian + begin * n_out, p1, p2, y1 + begin,
                    both ? h2.data() + begin : nullptr);
    });
    if (weight.active()) weight.step(h1);
    if (bias.active()) bias.step(h2);
  }

  Direction<T> result;
  // -1/alpha in the closed form; the extra coordinate, undone from its length |B'|, in the truncated one.
  result.c = settings.truncated ? (across == 0 ? 0 : weight.extra_solution() / across) : -1 / alpha;
  result.w.resize(n_out);
  result.bias = bias.solution();
  result.iterations = weight.iterations();
  // 0; NaN where the mean input is not finite, or T cannot hold c.
  result.largest = std::abs(result.c) <= double(std::numeric_limits<T>::max()) ? s - s : std::nan("");
  const auto enlarge = [&](double bound) {
    if (!std::isnan(result.largest) && !(bound <= result.largest)) result.largest = bound;  // NaN comes in, and stays
  };
  for (int64_t i = 0; i < n_out; ++i) {
    const double w = s > 0 ? (weight.solution()[i] * root - result.c * u[i]) / s : double(weight.solution()[i]);
    result.w[i] = T(w);
    enlarge(std::abs(result.c) * std::sqrt(squares[i]) + std::abs(w) * std::max(1.0, root));
  }
  for (const T x : result.bias) enlarge(std::abs(double(x)));
  // c B' and v a^T / sqrt(s) are orthogonal.
  result.norm = std::sqrt(result.c * result.c * across * across + dot(weight.solution(), weight.solution()) +
                          dot(result.bias, result.bias));
  return result;
}

// The systems of all layers, contiguous.
struct Systems {
  std::vector<at::Tensor> hessian, mean_input, grad_weight, grad_bias;
  std::vector<int64_t> sizes;  // of the larger of H and B

  Systems(at::TensorList hessians, at::TensorList mean_inputs, at::TensorList grad_weights,
          at::TensorList grad_biases) {
    for (size_t l = 0; l < hessians.size(); ++l) {
      hessian.push_back(hessians[l].contiguous());
      mean_input.push_back(mean_inputs[l].contiguous());
      grad_weight.push_back(grad_weights[l].contiguous());
      grad_bias.push_back(grad_biases[l].contiguous());
      sizes.push_back(std::max(hessian[l].numel(), grad_weight[l].numel()));
    }
  }

  // Solves every layer's and hands (layer, direction, gradient, mean input) to f, from several threads at once.
  template <typename F>
  void solve_each(at::ArrayRef<double> alpha, const Settings& settings, F&& f) const {
    // CG takes some ten passes, unless it is cut short.
    parallel_layers(sizes, std::min<int64_t>(settings.max_iter, 10), [&](int64_t l) {
      AT_DISPATCH_FLOATING_TYPES(hessian[l].scalar_type(), "eacg_solve", [&] {
        using T = scalar_t;
        const T *b = grad_weight[l].const_data_ptr<T>(), *a = mean_input[l].const_data_ptr<T>();
        f(l,
          solve<T>(hessian[l].const_data_ptr<T>(), a, b,
                   grad_bias[l].numel() ? grad_bias[l].const_data_ptr<T>() : nullptr, hessian[l].size(0),
                   mean_input[l].size(0), alpha[l], settings),
          b, a);
      });
    });
  }
};

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, at::Tensor> eacg_solve_list(
    at::TensorList hessians, at::TensorList mean_inputs, at::TensorList grad_weights, at::TensorList grad_biases,
    at::ArrayRef<double> alpha, int64_t max_iter, double tol, bool truncated) {
  const size_t layers = hessians.size();
  check_eacg_solve(hessians, mean_inputs, grad_weights, grad_biases, alpha, max_iter, tol);
  std::vector<at::Tensor> weights, biases;
  for (size_t l = 0; l < layers; ++l) {
    weights.push_back(at::empty(grad_weights[l].sizes(), hessians[l].options()));
    biases.push_back(at::empty(grad_biases[l].sizes(), hessians[l].options()));
  }
  at::Tensor iterations = at::empty({int64_t(layers)}, at::kLong);
  int64_t* counts = iterations.mutable_data_ptr<int64_t>();
  Systems(hessians, mean_inputs, grad_weights, grad_biases)
      .solve_each(alpha, {max_iter, tol, truncated},
                  [&]<typename T>(int64_t l, const Direction<T>& direction, const T* b, const T* a) {
                    const int64_t n_in = weights[l].size(1);
                    T* out = weights[l].mutable_data_ptr<T>();
                    parallel_rows(weights[l].size(0), n_in, [&](int64_t begin, int64_t end) {
                      for (int64_t i = begin; i < end; ++i)
                        kernels<T>().combine(n_in, T(direction.c), b + i * n_in, direction.w[i], a, out + i * n_in);
                    });
                    std::copy(direction.bias.begin(), direction.bias.end(), biases[l].mutable_data_ptr<T>());
                    counts[l] = direction.iterations;
                  });
  return {std::move(weights), std::move(biases), iterations};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> eacg_solve(const at::Tensor& hessian, const at::Tensor& mean_input,
                                                          const at::Tensor& grad_weight,
                                                          const std::optional<at::Tensor>& grad_bias, double alpha,
                                                          int64_t max_iter, double tol, bool truncated) {
  const at::Tensor bias = grad_bias ? *grad_bias : at::empty({0}, hessian.options());
  auto [weights, biases, iterations] =
      eacg_solve_list(hessian, mean_input, grad_weight, bias, alpha, max_iter, tol, truncated);
  return {weights[0], biases[0], iterations.select(0, 0).clone()};
}

at::Tensor eacg_update_(at::TensorList hessians, at::TensorList mean_inputs, at::TensorList grad_weights,
                        at::TensorList grad_biases, at::TensorList weights, at::TensorList biases,
                        at::TensorList weight_momenta, at::TensorList bias_momenta, at::ArrayRef<double> lr,
                        at::ArrayRef<double> alpha, at::ArrayRef<double> momentum, at::ArrayRef<double> weight_decay,
                        int64_t max_iter, double tol, bool truncated, std::optional<at::ArrayRef<double>> max_norm) {
  const size_t layers = hessians.size();
  check_eacg_update(hessians, mean_inputs, grad_weights, grad_biases, weights, biases, weight_momenta, bias_momenta, lr,
                    alpha, momentum, weight_decay, max_iter, tol, max_norm);
  at::Tensor iterations = at::empty({int64_t(layers)}, at::kLong);
  int64_t* counts = iterations.mutable_data_ptr<int64_t>();
  const bool keep = !weight_momenta.empty();
  // Each layer's update of its weight and of its bias, to be run once every layer is known to be finite.
  std::vector<std::function<void()>> weight_updates(layers), bias_updates(layers);
  const Systems systems(hessians, mean_inputs, grad_weights, grad_biases);
  systems.solve_each(
      alpha, {max_iter, tol, truncated}, [&]<typename T>(int64_t l, Direction<T> direction, const T* b, const T* a) {
        // |V| <= max |P| / (1 - mu): neither momentum mu V + P nor update lr V may overflow, now or later.
        const double reach = direction.largest * std::max(1.0, std::abs(lr[l])) / std::max(1e-3, 1 - momentum[l]);
        counts[l] = reach <= double(std::numeric_limits<T>::max()) / 8 ? direction.iterations : -1;
        if (max_norm && direction.norm > (*max_norm)[l]) direction.scale((*max_norm)[l] / direction.norm);
        const T rate = T(lr[l]), decay = T(lr[l] * weight_decay[l]), mu = T(momentum[l]);
        weight_updates[l] = [=, w = std::move(direction.w), c = T(direction.c)] {
          const int64_t n_out = weights[l].size(0), n_in = weights[l].size(1);
          T *x = weights[l].mutable_data_ptr<T>(), *v = keep ? weight_momenta[l].mutable_data_ptr<T>() : nullptr;
          parallel_rows(n_out, n_in, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
              kernels<T>().update(n_in, c, b + i * n_in, w[i], a, rate, decay, mu, v ? v + i * n_in : nullptr,
                                  x + i * n_in);
          });
        };
        bias_updates[l] = [=, d = std::move(direction.bias)] {
          kernels<T>().update(d.size(), T(1), d.data(), T(0), d.data(), rate, decay, mu,
                              keep ? bias_momenta[l].mutable_data_ptr<T>() : nullptr, biases[l].mutable_data_ptr<T>());
        };
      });
  if (std::any_of(counts, counts + layers, [](int64_t count) { return count < 0; })) return iterations;
  own_storage(weights);
  own_storage(weight_momenta);
  parallel_layers(systems.sizes, 1, [&](int64_t l) { weight_updates[l](); });
  for (size_t l = 0; l < layers; ++l) bias_updates[l]();
  for (const at::TensorList list : {weights, biases, weight_momenta, bias_momenta}) written(list);
  return iterations;
}

}  // namespace

TORCH_LIBRARY_IMPL(secondorder, CPU, m) {
  m.impl("eacg_solve", eacg_solve);
  m.impl("eacg_solve.list", eacg_solve_list);
  m.impl("eacg_update_", eacg_update_);
}

}  // namespace secondorder::cpu
