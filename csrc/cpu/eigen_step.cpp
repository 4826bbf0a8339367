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

// The moments of a projected matrix, and its step. Adds to the slopes (along this step, along the one before).
template <typename T>
void step(Matrix<T>& matrix, const State<T>& state, const Rates& rates, double beta1, double beta2, double eps,
          int64_t t, double slopes[2]) {
  const Kernels<T>& loops = kernels<T>();
  const EigenSizes& size = matrix.size;
  const int64_t n = size.n, p = size.p, ku = size.ku, kv = size.kv, rest = size.rest(), count = matrix.blocks();
  *state.size = std::max(*state.size, std::sqrt(matrix.squares / double(n * p)));
  const EigenCorrections corrections(beta1, beta2, t);
  const EigenMoments<T> rule(beta1, beta2, corrections.first, corrections.fresh,
                             eps * *state.size + double(std::numeric_limits<T>::min()), size.apart());

  // Takes N's elements as the last steps of their coordinates.
  const auto remember = [&](int64_t elements, const T* x, const T* made, T* last) {
    if (!rule.lazy) std::copy_n(made, elements, last);
    for (int64_t i = 0; rule.lazy && i < elements; ++i) last[i] = rule.waits(x[i]) ? last[i] : made[i];
  };
  Scratch scratch;
  T* const normed = scratch.take<T>(rest);  // N's C, R, T
  int64_t at = 0;
  for (const auto& [part, elements] : {std::pair{matrix.corner, size.corner()}, std::pair{matrix.right, size.right()},
                                       std::pair{matrix.top, size.top()}}) {
    if (!elements) continue;
    slopes[1] += double(loops.dot(elements, part, state.last + at));
    slopes[0] += double(loops.moments(elements, part, rule, state.first + at, state.second + at, normed + at));
    remember(elements, part, normed + at, state.last + at);
    at += elements;
  }

  T *residual = nullptr, *nv = nullptr, *nu = nullptr;  // N's E, its products with V and U
  if (size.residual()) {
    residual = scratch.take<T>(n * p);
    nv = scratch.take<T>(n * kv);
    nu = scratch.zeros<T>(count * ku * p);
    std::vector<int64_t> sample(n, -1);  // which of the sampled rows a row is
    for (int64_t s = 0; s < state.sampled; ++s) sample[eigen_sampled_row(s, state.sampled, n)] = s;
    const double share = double(n) / double(state.sampled);
    const auto f = matrix.residual(scratch);
    std::vector<double> along(count, 0.0), along_last(count, 0.0);
    T* const groups = scratch.take<T>(count * kGroup * p);
    for_blocks(n, p, [&](int64_t b, int64_t begin, int64_t end) {
      T* const x = groups + b * kGroup * p;
      for (int64_t i = begin; i < end; i += kGroup) {
        const int64_t rows = std::min(kGroup, end - i);
        loops.low_rank(rows, p, matrix.gradient + i * p, f.width, f.l + i * f.width, f.width, f.r, x);
        for (int64_t r = 0, next; r < rows; r = next) {  // a sampled row, or all up to the next one
          const int64_t s = sample[i + r], here = (i + r) * p;
          for (next = r + 1; s < 0 && next < rows && sample[i + next] < 0;) ++next;
          const T slope = loops.moments((next - r) * p, x + r * p, rule, state.first + rest + here,
                                        state.second + rest + here, residual + here);
          if (s < 0) continue;
          T* last = state.last + rest + s * p;
          along[b] += share * double(slope);
          along_last[b] += share * double(loops.dot(p, x + r * p, last));
          remember(p, x + r * p, residual + here, last);
        }
        loops.products(rows, p, residual + i * p, kv, matrix.in, nv + i * kv, kv);
        T* sum = nu + b * ku * p;
        loops.low_rank(ku, p, sum, rows, matrix.out + i, n, residual + i * p, sum);
      }
    });
    add_blocks(nu, count, ku * p);
    slopes[0] = std::accumulate(along.begin(), along.end(), slopes[0]);
    slopes[1] = std::accumulate(along_last.begin(), along_last.end(), slopes[1]);
  }

  T* const y = size.bias ? scratch.take<T>(n) : nullptr;
  const auto f =
      matrix.whole(scratch, normed, normed + size.corner(), normed + size.corner() + size.right(), nv, nu, y);
  const T keep = T(1 - rates.length * rates.lr * rates.decay), rate = T(rates.length * rates.lr);
  T* const steps = scratch.take<T>(count * kRows * p);
  for_blocks(n, p, [&](int64_t b, int64_t begin, int64_t end) {
    T* const s = steps + b * kRows * p;
    T shift[kRows];
    for (int64_t i = begin; i < end; i += kRows) {
      const int64_t rows = std::min(kRows, end - i);
      loops.low_rank(rows, p, residual ? residual + i * p : nullptr, f.width, f.l + i * f.width, f.width, f.r, s);
      loops.descend(rows * p, keep, rate, matrix.gradient + i * p, s, state.weight + i * p);
      if (!y) continue;
      loops.products(rows, p, s, 1, matrix.mean, shift, 1);
      for (int64_t r = 0; r < rows; ++r) y[i + r] -= shift[r];
    }
  });
  if (size.bias)
    loops.descend(n, T(1 - rates.length * rates.lr_bias * rates.decay_bias), T(rates.length * rates.lr_bias),
                  matrix.bias_gradient, y, state.bias);
}

void eigen_step_(at::TensorList weight, at::TensorList bias, at::TensorList first, at::TensorList second,
                 at::TensorList last, at::TensorList size, const at::Tensor& control, at::TensorList grad_weight,
                 at::TensorList grad_bias, at::TensorList mean, at::TensorList basis_out, at::TensorList basis_in,
                 at::ArrayRef<double> lr, at::ArrayRef<double> lr_bias, at::ArrayRef<double> decay,
                 at::ArrayRef<double> decay_bias, at::IntArrayRef step_, double beta1, double beta2, double eps,
                 bool renewed, int64_t renew_every, int64_t since, const std::optional<at::Tensor>& rate) {
  check_eigen_step(weight, bias, first, second, last, size, control, grad_weight, grad_bias, mean, basis_out, basis_in,
                   lr, lr_bias, decay, decay_bias, step_, beta1, beta2, eps, renew_every, since, rate);
  if (grad_weight.empty()) return;
  const auto g = contiguous(grad_weight), gb = contiguous(grad_bias), a = contiguous(mean), u = contiguous(basis_out),
             v = contiguous(basis_in);
  for (const at::TensorList list : {weight, bias, first, second, last, size}) own_storage(list);
  AT_DISPATCH_FLOATING_TYPES(g[0].scalar_type(), "eigen_step_", [&] {
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
      step(all[l], state,
           Rates{length, lr[l] * (rates ? rates[2 * l] : 1), lr_bias[l] * (rates ? rates[2 * l + 1] : 1), decay[l],
                 decay_bias[l]},
           beta1, beta2, eps, step_[l] + more, &slopes[2 * l]);
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
