// EigenAdam: a step of a whole net in three passes over every matrix: the gradient's projections; the moments; the
// parameters.
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <vector>

#include "../ops/eigen.h"
#include "eigen.h"

namespace secondorder::cpu {
namespace {

constexpr int64_t kRows = 4;  // rows of the parameters that move at a time

// What a step writes of one matrix.
template <typename T>
struct State {
  T *weight, *bias;   // W [n, p], b [n]
  T *first, *second;  // the moments of C, R, T, E, one after another
  T* last;            // the last N of C, R, T, and [sampled, p] of E
  double* size;       // [1] of gradients
  int64_t sampled;    // rows of E in `last`
};

struct Rates {
  double length, lr, lr_bias, decay, decay_bias;
};

// The step of one matrix, whose gradient has been projected.
template <typename T>
class Step {
 public:
  Step(const Matrix<T>& matrix, const State<T>& state, double beta1, double beta2, double eps, int64_t t)
      : matrix_(matrix), state_(state), rule_(make_rule(matrix, state, beta1, beta2, eps, t)) {}

  // Makes it; adds to the slopes (along this step, along the one before).
  void make(const Rates& rates, double slopes[2]) {
    move_parts(slopes);
    if (size_.residual()) move_residual(slopes);
    descend(rates);
  }

 private:
  // Adam's rule at step t, with the floor that the size of the gradients sets: it takes in this one.
  static EigenMoments<T> make_rule(const Matrix<T>& matrix, const State<T>& state, double beta1, double beta2,
                                   double eps, int64_t t) {
    *state.size = std::max(*state.size, std::sqrt(matrix.squares / double(matrix.size.n * matrix.size.p)));
    const EigenCorrections corrections(beta1, beta2, t);
    return {beta1,
            beta2,
            corrections.first,
            corrections.fresh,
            eps * *state.size + double(std::numeric_limits<T>::min()),
            matrix.size.apart()};
  }

  // Takes N's elements as the last steps of their coordinates.
  void remember(int64_t elements, const T* x, const T* made, T* last) const {
    if (!rule_.lazy) std::copy_n(made, elements, last);
    for (int64_t i = 0; rule_.lazy && i < elements; ++i) last[i] = rule_.waits(x[i]) ? last[i] : made[i];
  }

  // Adam's rule in C, R and T.
  void move_parts(double slopes[2]) {
    normed_ = scratch_.take<T>(size_.rest());
    int64_t at = 0;
    for (const auto& [part, elements] :
         {std::pair{matrix_.corner, size_.corner()}, std::pair{matrix_.right, size_.right()},
          std::pair{matrix_.top, size_.top()}}) {
      if (!elements) continue;
      slopes[1] += double(loops_.dot(elements, part, state_.last + at));
      slopes[0] += double(loops_.moments(elements, part, rule_, state_.first + at, state_.second + at, normed_ + at));
      remember(elements, part, normed_ + at, state_.last + at);
      at += elements;
    }
  }

  // E, Adam's rule in it, and the products of its N with the bases.
  void move_residual(double slopes[2]) {
    const int64_t n = size_.n, p = size_.p, ku = size_.ku, kv = size_.kv, rest = size_.rest(), count = matrix_.blocks();
    residual_ = scratch_.take<T>(n * p);
    nv_ = scratch_.take<T>(n * kv);
    nu_ = scratch_.zeros<T>(count * ku * p);
    std::vector<int64_t> sample(n, -1);  // which of the sampled rows a row is
    for (int64_t s = 0; s < state_.sampled; ++s) sample[eigen_sampled_row(s, state_.sampled, n)] = s;
    const double share = double(n) / double(state_.sampled);
    const auto f = matrix_.residual(scratch_);
    std::vector<double> along(count, 0.0), along_last(count, 0.0);
    T* const groups = scratch_.take<T>(count * kGroup * p);
    for_blocks(n, p, [&](int64_t b, int64_t begin, int64_t end) {
      T* const x = groups + b * kGroup * p;
      for (int64_t i = begin; i < end; i += kGroup) {
        const int64_t rows = std::min(kGroup, end - i);
        loops_.low_rank(rows, p, matrix_.gradient + i * p, f.width, f.l + i * f.width, f.width, f.r, x);
        for (int64_t r = 0, next; r < rows; r = next) {  // a sampled row, or all up to the next one
          const int64_t s = sample[i + r], here = (i + r) * p;
          for (next = r + 1; s < 0 && next < rows && sample[i + next] < 0;) ++next;
          const T slope = loops_.moments((next - r) * p, x + r * p, rule_, state_.first + rest + here,
                                         state_.second + rest + here, residual_ + here);
          if (s < 0) continue;
          T* last = state_.last + rest + s * p;
          along[b] += share * double(slope);
          along_last[b] += share * double(loops_.dot(p, x + r * p, last));
          remember(p, x + r * p, residual_ + here, last);
        }
        loops_.products(rows, p, residual_ + i * p, kv, matrix_.in, nv_ + i * kv, kv);
        T* sum = nu_ + b * ku * p;
        loops_.low_rank(ku, p, sum, rows, matrix_.out + i, n, residual_ + i * p, sum);
      }
    });
    add_blocks(nu_, count, ku * p);
    slopes[0] = std::accumulate(along.begin(), along.end(), slopes[0]);
    slopes[1] = std::accumulate(along_last.begin(), along_last.end(), slopes[1]);
  }

  // The parameters' step back from N's parts.
  void descend(const Rates& rates) {
    const int64_t n = size_.n, p = size_.p;
    T* const y = size_.bias ? scratch_.take<T>(n) : nullptr;
    const T *right = normed_ + size_.corner(), *top = right + size_.right();
    const auto f = matrix_.whole(scratch_, normed_, right, top, nv_, nu_, y);
    const T keep = T(1 - rates.length * rates.lr * rates.decay), rate = T(rates.length * rates.lr);
    T* const steps = scratch_.take<T>(matrix_.blocks() * kRows * p);
    for_blocks(n, p, [&](int64_t b, int64_t begin, int64_t end) {
      T* const s = steps + b * kRows * p;
      T shift[kRows];
      for (int64_t i = begin; i < end; i += kRows) {
        const int64_t rows = std::min(kRows, end - i);
        loops_.low_rank(rows, p, residual_ ? residual_ + i * p : nullptr, f.width, f.l + i * f.width, f.width, f.r, s);
        loops_.descend(rows * p, keep, rate, matrix_.gradient + i * p, s, state_.weight + i * p);
        if (!y) continue;
        loops_.products(rows, p, s, 1, matrix_.mean, shift, 1);
        for (int64_t r = 0; r < rows; ++r) y[i + r] -= shift[r];
      }
    });
    if (size_.bias)
      loops_.descend(n, T(1 - rates.length * rates.lr_bias * rates.decay_bias), T(rates.length * rates.lr_bias),
                     matrix_.bias_gradient, y, state_.bias);
  }

  const Matrix<T>& matrix_;
  const State<T>& state_;
  const EigenMoments<T> rule_;
  const EigenSizes& size_ = matrix_.size;
  const Kernels<T>& loops_ = kernels<T>();
  Scratch scratch_;                                        // has what comes after it
  T* normed_ = nullptr;                                    // N's C, R, T
  T *residual_ = nullptr, *nv_ = nullptr, *nu_ = nullptr;  // N's E, its products with V and U
};

void eigen_step_(at::TensorList weight, at::TensorList bias, at::TensorList first, at::TensorList second,
                 at::TensorList last, at::TensorList size, const at::Tensor& control, at::TensorList grad_weight,
                 at::TensorList grad_bias, at::TensorList mean, at::TensorList basis_out, at::TensorList basis_in,
                 at::ArrayRef<double> lr, at::ArrayRef<double> lr_bias, at::ArrayRef<double> decay,
                 at::ArrayRef<double> decay_bias, at::IntArrayRef step, double beta1, double beta2, double eps,
                 bool renewed, int64_t renew_every, int64_t since, const std::optional<at::Tensor>& rate) {
  check_eigen_step(weight, bias, first, second, last, size, control, grad_weight, grad_bias, mean, basis_out, basis_in,
                   lr, lr_bias, decay, decay_bias, step, beta1, beta2, eps, renew_every, since, rate);
  const auto g = contiguous(grad_weight), gb = contiguous(grad_bias), a = contiguous(mean), u = contiguous(basis_out),
             v = contiguous(basis_in);
  for (const at::TensorList list : {weight, bias, first, second, last, size}) own_storage(list);
  AT_DISPATCH_FLOATING_TYPES(g.empty() ? at::kFloat : g[0].scalar_type(), "eigen_step_", [&] {
    using T = scalar_t;
    std::vector<Matrix<T>> all = matrices<T>(g, gb, a, u, v);
    const std::vector<int64_t> sizes = elements(all);
    parallel_layers(sizes, 2, [&](int64_t l) { all[l].project(); });
    double* steps = control.mutable_data_ptr<double>();
    const double* const rates = rate ? rate->const_data_ptr<double>() : nullptr;
    if (steps[kEigenUnrenewed] != 0 ||
        (rate && !std::all_of(rates, rates + rate->numel(), [](double x) { return eigen_is_rate(x); })) ||
        !std::all_of(all.begin(), all.end(), [](const Matrix<T>& each) { return each.finite(); })) {
      steps[kEigenUnrenewed] = 0;
      steps[kEigenRefused] += 1;
      return;
    }
    const EigenReplay replay{renew_every, since};
    const double length = eigen_length(steps);
    const int64_t more = replay.steps(steps);
    std::vector<double> slopes(2 * all.size(), 0.0);
    parallel_layers(sizes, 6, [&](int64_t l) {
      const State<T> state{weight[l].mutable_data_ptr<T>(),
                           bias[l].mutable_data_ptr<T>(),
                           first[l].mutable_data_ptr<T>(),
                           second[l].mutable_data_ptr<T>(),
                           last[l].mutable_data_ptr<T>(),
                           size[l].mutable_data_ptr<double>(),
                           all[l].size.residual() ? (last[l].numel() - all[l].size.rest()) / all[l].size.p : 0};
      const Rates own{length, lr[l] * (rates ? rates[2 * l] : 1), lr_bias[l] * (rates ? rates[2 * l + 1] : 1), decay[l],
                      decay_bias[l]};
      Step<T>(all[l], state, beta1, beta2, eps, step[l] + more).make(own, &slopes[2 * l]);
    });
    double sums[2] = {0, 0};
    for (size_t l = 0; l < all.size(); ++l)
      for (int i = 0; i < 2; ++i) sums[i] += slopes[2 * l + i];
    eigen_control(steps, sums[0], sums[1], renewed && !replay.idle(steps));
  });
  for (const at::TensorList list : {weight, bias, first, second, last, size}) written(list);
  written(control);
}

}  // namespace

TORCH_LIBRARY_IMPL(secondorder, CPU, m) { m.impl("eigen_step_", eigen_step_); }

}  // namespace secondorder::cpu
