// cross_entropy_hessian by plain loops where it is small: the dozen operators that it takes otherwise would last longer
// than their work.
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <vector>

#include "../ops/cross_entropy.h"

namespace secondorder::cpu {
namespace {

// Up to so many multiply-adds plain loops on one thread are the faster.
constexpr int64_t kSmall = 1 << 17;

// logits [m, K], target [m], both contiguous -> out [K, K]
template <typename T>
void small_hessian(const T* logits, const int64_t* target, int64_t m, int64_t k, int64_t ignore_index, bool mean,
                   T* out) {
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

at::Tensor cross_entropy_hessian(const at::Tensor& output_, const at::Tensor& target, int64_t ignore_index, bool mean) {
  check_cross_entropy_hessian(output_, target);
  const int64_t m = output_.size(0), k = output_.size(1);
  if (m * k * k > kSmall) return cross_entropy_hessian_by_products(output_, target, ignore_index, mean);
  const at::Tensor output = output_.contiguous(), classes = target.to(at::kLong).contiguous();
  at::Tensor out = at::empty({k, k}, output.options());
  AT_DISPATCH_FLOATING_TYPES(output.scalar_type(), "cross_entropy_hessian", [&] {
    small_hessian(output.const_data_ptr<scalar_t>(), classes.const_data_ptr<int64_t>(), m, k, ignore_index, mean,
                  out.mutable_data_ptr<scalar_t>());
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(secondorder, CPU, m) { m.impl("cross_entropy_hessian", cross_entropy_hessian); }

}  // namespace secondorder::cpu
