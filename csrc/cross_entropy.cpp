// cross_entropy_hessian, on any device, and by plain loops where it is small: the dozen operators that it takes otherwise would
// last longer than their work.
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <vector>

#include "argument_checks.h"

namespace secondorder {
namespace {

// Up to so many multiply-adds plain loops on one thread are the faster.
constexpr int64_t kSmall = 1 << 17;

// logits [m, K], target [m], both contiguous -> out [K, K]
template <typename T>
void small_hessian(const T* logits, const int64_t* target, int64_t m, int64_t k, int64_t ignore_index, bool mean, T* out) {
  std::vector<double> p(k), h(k * k, 0.0);  // h: minus the sum of p p^T, of which the lower triangle
  std::vector<double> diagonal(k, 0.0);
  int64_t count = 0;
  for (int64_t i = 0; i < m; ++i) {
    if (target[i] == ignore_index) continue;
    ++count;
    const T* z = logits + i * k;
    double sum = 0;
    T largest = -std::numeric_limits<T>::infinity();
    for (int64_t j = 0; j < k; ++j) largest = z[j] > largest ? z[j] : largest;
    for (int64_t j = 0; j < k; ++j) sum += p[j] = std::exp(z[j] - largest);
    for (int64_t j = 0; j < k; ++j) diagonal[j] += p[j] /= sum;
    for (int64_t a = 0; a < k; ++a)
      for (int64_t b = 0; b <= a; ++b) h[a * k + b] -= p[a] * p[b];
  }
  // A mean over nothing is NaN, but for a batch of nothing, which adds nothing to others.
  const double scale = !mean || m == 0 ? 1 : count == 0 ? std::nan("") : 1 / double(count);
  for (int64_t a = 0; a < k; ++a)
    for (int64_t b = 0; b <= a; ++b)
      out[a * k + b] = out[b * k + a] = T((a == b ? diagonal[a] + h[a * k + a] : h[a * k + b]) * scale);
}

// output [m, K], target [m] class indices -> [K, K]
at::Tensor cross_entropy_hessian(const at::Tensor& output_, const at::Tensor& target, int64_t ignore_index, bool mean) {
  constexpr const char* op = "cross_entropy_hessian";
  check_cross_entropy(op, output_, target);
  const int64_t m = output_.size(0), k = output_.size(1);
  if (output_.device().is_cpu() && m * k * k <= kSmall) {
    const at::Tensor output = output_.contiguous(), classes = target.to(at::kLong).contiguous();
    at::Tensor out = at::empty({k, k}, output.options());
    AT_DISPATCH_FLOATING_TYPES(output.scalar_type(), op, [&] {
      small_hessian(output.const_data_ptr<scalar_t>(), classes.const_data_ptr<int64_t>(), m, k, ignore_index, mean,
                    out.mutable_data_ptr<scalar_t>());
    });
    return out;
  }
  const at::Tensor kept = target.to(at::kLong).ne(ignore_index);  // uint8 has no -100
  const at::Tensor p = at::softmax(output_, 1).masked_fill(kept.logical_not().unsqueeze(1), 0);
  at::Tensor mass = kept.to(output_.scalar_type());
  if (mean) mass.div_(mass.sum());
  const at::Tensor weighted = at::mul(p, mass.unsqueeze(1));
  return at::addmm(at::diag(weighted.sum(0)), p.t(), weighted, /*beta=*/1, /*alpha=*/-1);
}

}  // namespace

TORCH_LIBRARY_IMPL(secondorder, CompositeExplicitAutograd, m) { m.impl("cross_entropy_hessian", cross_entropy_hessian); }

}  // namespace secondorder
