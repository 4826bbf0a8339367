// K-BFGS (Goldfarb, Ren & Bahamou): Powell's double damping, the BFGS update of an inverse H, its Hessian-action form,
// and the compact form of L-BFGS.
//
// With q = H y, rho = 1/(s.y) and tau = 1/(1 + rho y.q) the update H - rho (s q^T + q s^T) + rho (1 + rho y.q) s s^T,
// its square completed, is
//
//   H + a a^T - b b^T,   a = sqrt(rho/tau) (s - tau q),   b = sqrt(rho tau) q.
//
// Symmetry then holds to the bit, and H - b b^T >= tau H stays positive definite before a a^T is added: nothing large
// cancels. All layers of a call pass through each phase together, so their rows are shared out among the threads.
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "../bfgs.h"
#include "../formulas.h"
#include "../ops/bfgs.h"
#include "../tensors.h"
#include "kernels.h"
#include "parallel.h"

namespace secondorder::cpu {
namespace {

template <typename T>
double dot(const std::vector<T>& x, const std::vector<T>& y) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (size_t i = 0; i < x.size(); ++i) sum += double(x[i]) * double(y[i]);
  return sum;
}

// cx x + cy y
template <typename T>
std::vector<T> combine(double cx, const std::vector<T>& x, double cy, const std::vector<T>& y) {
  std::vector<T> out(x.size());
  for (size_t i = 0; i < x.size(); ++i) out[i] = T(cx * x[i] + cy * y[i]);
  return out;
}

template <typename T>
std::vector<T> to_vector(const at::Tensor& t) {
  const at::Tensor contiguous = t.contiguous();
  const T* data = contiguous.const_data_ptr<T>();
  return {data, data + contiguous.numel()};
}

template <typename T>
at::Tensor to_tensor(const std::vector<T>& v, const at::Tensor& like) {
  at::Tensor t = at::empty({int64_t(v.size())}, like.options());
  std::copy(v.begin(), v.end(), t.mutable_data_ptr<T>());
  return t;
}

// A range of rows of one layer's matrix.
struct Rows {
  size_t layer;
  int64_t begin, end;
};

// Calls f(layer, begin, end) for ranges of rows of square matrices of the given sizes (0: none), over all threads.
template <typename F>
void for_rows(const std::vector<int64_t>& sizes, F&& f) {
  std::vector<Rows> ranges;
  int64_t work = 0;
  for (size_t l = 0; l < sizes.size(); ++l) {
    const int64_t n = sizes[l], step = n ? std::max<int64_t>(4, (kSerialWork / 2 / n) & ~int64_t(3)) : 1;
    for (int64_t begin = 0; begin < n; begin += step) ranges.push_back({l, begin, std::min(begin + step, n)});
    work += n * n;
  }
  parallel_items(int64_t(ranges.size()), work,
                 [&](int64_t, int64_t i) { f(ranges[i].layer, ranges[i].begin, ranges[i].end); });
}

// y1 = M x1 (and y2 = M x2 where x2 is given) for one layer; a null matrix is skipped.
template <typename T>
struct Product {
  const T* matrix;
  const std::vector<T>*x1, *x2;
  std::vector<T>*y1, *y2;
};

template <typename T>
void multiply(const std::vector<Product<T>>& products) {
  std::vector<int64_t> sizes;
  for (const Product<T>& p : products) {
    sizes.push_back(p.matrix ? int64_t(p.x1->size()) : 0);
    if (p.matrix) p.y1->resize(p.x1->size());
    if (p.matrix && p.x2) p.y2->resize(p.x1->size());
  }
  for_rows(sizes, [&](size_t l, int64_t begin, int64_t end) {
    const Product<T>& p = products[l];
    kernels<T>().matvec(end - begin, sizes[l], p.matrix + begin * sizes[l], p.x1->data(), p.x2 ? p.x2->data() : nullptr,
                        p.y1->data() + begin, p.x2 ? p.y2->data() + begin : nullptr);
  });
}

// One layer's pair and what is known of it.
template <typename T>
struct Pair {
  std::vector<T> s, y;
  std::vector<T> hy;  // H y
  int64_t status = 0;
};

// Double damping (Algorithm 3), in its two halves, of a pair whose hy is known. hy stays that of the undamped y. Where
// not `damped`, both thetas are 1.
template <typename T>
struct Damping {
  double mu1, mu2;
  bool damped = true;

  void first(Pair<T>& pair) const {
    const double theta1 = damped ? powell_theta(dot(pair.s, pair.y), dot(pair.y, pair.hy), mu1) : 1;
    if (theta1 == 1) return;
    pair.s = combine(theta1, pair.s, 1 - theta1, pair.hy);
    pair.status |= kDampedS;
  }
  // The weight of y in the damped y.
  double theta2(const Pair<T>& pair) const {
    return damped ? powell_theta(dot(pair.s, pair.y), dot(pair.s, pair.s), mu2) : 1;
  }
  void second(Pair<T>& pair, double theta2) const {
    if (theta2 == 1) return;
    pair.y = combine(theta2, pair.y, 1 - theta2, pair.s);
    pair.status |= kDampedY;
  }
};

// The bounds on y.H y / s.y and s.s / s.y that an update asks for; both 0: none.
struct Bounds {
  double mu1 = 0, mu2 = 0;

  template <typename T>
  bool hold(const Pair<T>& pair, double sy, double yhy) const {
    return mu1 == 0 || (within_bound(sy, yhy, mu1) && within_bound(sy, dot(pair.s, pair.s), mu2));
  }
};

// H += a a^T - b b^T for every pair with hy, unless s.y is not positive, a bound does not hold, H turns out indefinite,
// or a number would not be finite: then H is left as it is.
template <typename T>
void update(const std::vector<T*>& matrices, std::vector<Pair<T>>& pairs, const Bounds& bounds = {}) {
  std::vector<std::vector<T>> a(pairs.size()), b(pairs.size());
  std::vector<int64_t> sizes(pairs.size(), 0);
  for (size_t l = 0; l < pairs.size(); ++l) {
    Pair<T>& pair = pairs[l];
    const size_t n = pair.s.size();
    const double sy = dot(pair.s, pair.y), yhy = dot(pair.y, pair.hy), rho = 1 / sy, tau = 1 / (1 + rho * yhy);
    if (!(sy > 0 && std::isfinite(rho) && yhy >= 0 && tau > 0 && bounds.hold(pair, sy, yhy))) continue;
    const double root = std::sqrt(rho / tau);
    a[l] = combine(root, pair.s, -root * tau, pair.hy);
    b[l] = combine(std::sqrt(rho * tau), pair.hy, 0, pair.hy);
    // A positive definite matrix has no entry larger than its largest diagonal one, so the diagonal tells of overflow.
    bool finite = true;
    for (size_t i = 0; i < n; ++i) {
      const double entry = double(matrices[l][i * (n + 1)]) + double(a[l][i]) * double(a[l][i]);
      finite = finite && entry + double(b[l][i]) * double(b[l][i]) <= double(std::numeric_limits<T>::max()) / 4;
    }
    if (!finite) continue;
    sizes[l] = int64_t(n);
    pair.status |= kUpdated;
  }
  for_rows(sizes, [&](size_t l, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels<T>().rank_two(sizes[l], a[l][i], a[l].data(), b[l][i], b[l].data(), matrices[l] + i * sizes[l]);
  });
}

template <typename T>
std::vector<Pair<T>> make_pairs(at::TensorList s, at::TensorList y) {
  std::vector<Pair<T>> pairs(s.size());
  for (size_t l = 0; l < pairs.size(); ++l) pairs[l] = {to_vector<T>(s[l]), to_vector<T>(y[l])};
  return pairs;
}

template <typename T>
at::Tensor statuses(const std::vector<Pair<T>>& pairs) {
  at::Tensor status = at::empty({int64_t(pairs.size())}, at::kLong);
  for (size_t l = 0; l < pairs.size(); ++l) status.mutable_data_ptr<int64_t>()[l] = pairs[l].status;
  return status;
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> double_damping_list(at::TensorList s, at::TensorList y,
                                                                                 at::TensorList inverses, double mu1,
                                                                                 double mu2) {
  check_double_damping(s, y, inverses, mu1, mu2);
  std::vector<at::Tensor> s_damped, y_damped;
  if (s.empty()) return {s_damped, y_damped};
  AT_DISPATCH_FLOATING_TYPES(inverses[0].scalar_type(), "double_damping", [&] {
    using T = scalar_t;
    std::vector<Pair<T>> pairs = make_pairs<T>(s, y);
    std::vector<at::Tensor> contiguous;
    std::vector<Product<T>> products;
    for (size_t l = 0; l < s.size(); ++l) {
      contiguous.push_back(inverses[l].contiguous());
      products.push_back({contiguous[l].const_data_ptr<T>(), &pairs[l].y, nullptr, &pairs[l].hy, nullptr});
    }
    multiply(products);
    const Damping<T> damping{mu1, mu2};
    for (size_t l = 0; l < s.size(); ++l) {
      damping.first(pairs[l]);
      damping.second(pairs[l], damping.theta2(pairs[l]));
      s_damped.push_back(to_tensor(pairs[l].s, s[l]));
      y_damped.push_back(to_tensor(pairs[l].y, y[l]));
    }
  });
  return {s_damped, y_damped};
}

std::tuple<at::Tensor, at::Tensor> double_damping(const at::Tensor& s, const at::Tensor& y, const at::Tensor& inverse,
                                                  double mu1, double mu2) {
  auto [s_damped, y_damped] = double_damping_list(s, y, inverse, mu1, mu2);
  return {s_damped[0], y_damped[0]};
}

at::Tensor bfgs_update_list_(at::TensorList inverses, at::TensorList s, at::TensorList y) {
  check_bfgs_update(inverses, s, y);
  if (s.empty()) return at::empty({0}, at::kLong);
  at::Tensor status;
  AT_DISPATCH_FLOATING_TYPES(inverses[0].scalar_type(), "bfgs_update_", [&] {
    using T = scalar_t;
    std::vector<Pair<T>> pairs = make_pairs<T>(s, y);
    std::vector<Product<T>> products;
    std::vector<T*> matrices;
    for (size_t l = 0; l < s.size(); ++l) {
      matrices.push_back(inverses[l].mutable_data_ptr<T>());
      products.push_back({matrices[l], &pairs[l].y, nullptr, &pairs[l].hy, nullptr});
    }
    multiply(products);
    update(matrices, pairs);
    status = statuses(pairs);
  });
  written(inverses);
  return status;
}

at::Tensor bfgs_update_(const at::Tensor& inverse, const at::Tensor& s, const at::Tensor& y) {
  return bfgs_update_list_(inverse, s, y).select(0, 0).clone();
}

at::Tensor damped_bfgs_update_(at::TensorList inverses, at::TensorList s, at::TensorList y, double mu1, double mu2,
                               bool damped, bool bounded) {
  check_damped_bfgs_update(inverses, s, y, mu1, mu2);
  if (s.empty()) return at::empty({0}, at::kLong);
  at::Tensor status;
  AT_DISPATCH_FLOATING_TYPES(inverses[0].scalar_type(), "damped_bfgs_update_", [&] {
    using T = scalar_t;
    const size_t layers = s.size();
    std::vector<Pair<T>> pairs = make_pairs<T>(s, y);
    std::vector<std::vector<T>> hs(layers), hhy(layers), undamped_s(layers);
    std::vector<Product<T>> products;
    std::vector<T*> matrices;
    for (size_t l = 0; l < layers; ++l) {
      matrices.push_back(inverses[l].mutable_data_ptr<T>());
      undamped_s[l] = pairs[l].s;
      // H s comes along in the pass over H that H y needs: the second damping calls for it more often than not.
      products.push_back({matrices[l], &pairs[l].y, &undamped_s[l], &pairs[l].hy, &hs[l]});
    }
    multiply(products);
    const Damping<T> damping{mu1, mu2, damped};
    std::vector<double> theta2(layers);
    for (size_t l = 0; l < layers; ++l) {
      damping.first(pairs[l]);
      theta2[l] = damping.theta2(pairs[l]);
      // Only where both dampings act does H s~ need H (H y), another pass.
      const bool both = theta2[l] != 1 && pairs[l].status & kDampedS;
      products[l] = {both ? matrices[l] : nullptr, &pairs[l].s, nullptr, &hhy[l], nullptr};
    }
    multiply(products);
    for (size_t l = 0; l < layers; ++l) {
      damping.second(pairs[l], theta2[l]);
      if (theta2[l] != 1)
        pairs[l].hy = combine(theta2[l], pairs[l].hy, 1 - theta2[l], products[l].matrix ? hhy[l] : hs[l]);
    }
    update(matrices, pairs, bounded ? Bounds{mu1, mu2} : Bounds{});
    status = statuses(pairs);
  });
  written(inverses);
  return status;
}

at::Tensor hessian_action_update_(at::TensorList inverses, at::TensorList matrices, at::TensorList vectors,
                                  double damping) {
  check_hessian_action_update(inverses, matrices, vectors, damping);
  if (vectors.empty()) return at::empty({0}, at::kLong);
  at::Tensor status;
  AT_DISPATCH_FLOATING_TYPES(inverses[0].scalar_type(), "hessian_action_update_", [&] {
    using T = scalar_t;
    const size_t layers = vectors.size();
    std::vector<Pair<T>> pairs = make_pairs<T>(vectors, vectors);
    std::vector<std::vector<T>> a(layers);
    std::vector<at::Tensor> contiguous;
    std::vector<T*> targets;
    std::vector<Product<T>> h_a, a_s, h_y;
    for (size_t l = 0; l < layers; ++l) {
      contiguous.push_back(matrices[l].contiguous());
      targets.push_back(inverses[l].mutable_data_ptr<T>());
      a[l] = pairs[l].y;
      h_a.push_back({targets[l], &a[l], nullptr, &pairs[l].s, nullptr});
      a_s.push_back({contiguous[l].const_data_ptr<T>(), &pairs[l].s, nullptr, &pairs[l].y, nullptr});
      h_y.push_back({targets[l], &pairs[l].y, nullptr, &pairs[l].hy, nullptr});
    }
    multiply(h_a);
    multiply(a_s);
    for (Pair<T>& pair : pairs) pair.y = combine(1, pair.y, damping, pair.s);
    multiply(h_y);
    update(targets, pairs);
    status = statuses(pairs);
  });
  written(inverses);
  return status;
}

// H v = v + P^T K P v, P = [S; Y] [2p, n], with H's start the identity (Byrd, Nocedal & Schnabel 1994):
//   K = [[R^-T (D + Y Y^T) R^-1, -R^-T], [-R^-1, 0]],  R = triu(S Y^T),  D = diag(S Y^T).
// K is small and R can be ill-conditioned, so it is formed in float64. Rows with s.y = 0 are empty places of the
// memory; they are zero, and a 1 on R's diagonal keeps them out.
struct Memory {
  at::Tensor pairs, k;  // P [2p, n], K [2p, 2p]

  // s, y [p, n]
  Memory(const at::Tensor& s, const at::Tensor& y) : pairs(at::cat({s, y}, 0)) {
    const at::Tensor s64 = s.to(at::kDouble), y64 = y.to(at::kDouble);
    const at::Tensor sy = at::matmul(s64, y64.t()), d = sy.diagonal();
    const at::Tensor r = at::triu(sy) + at::diag_embed(d.eq(0).to(at::kDouble));
    const at::Tensor r_inverse = at::linalg_solve_triangular(r, at::eye(s.size(0), r.options()), /*upper=*/true);
    const at::Tensor corner =
        at::matmul(at::matmul(r_inverse.t(), at::matmul(y64, y64.t()) + at::diag_embed(d)), r_inverse);
    k = at::cat({at::cat({corner, -r_inverse.t()}, 1), at::cat({-r_inverse, at::zeros_like(r)}, 1)}, 0)
            .to(s.scalar_type());
  }

  // H v for v [n, columns]
  at::Tensor times(const at::Tensor& v) const {
    const Unrecorded guard;
    return at::matmul(pairs.t(), at::matmul(k, at::matmul(pairs, v))).add_(v);
  }
};

at::Tensor lbfgs_product(const at::Tensor& s, const at::Tensor& y, const at::Tensor& v) {
  check_lbfgs_product(s, y, v);
  return Memory(s, y).times(v);
}

std::vector<at::Tensor> lbfgs_product_list(at::TensorList s, at::TensorList y, at::TensorList v) {
  check_lbfgs_product(s, y, v);
  std::vector<at::Tensor> out;
  for (size_t l = 0; l < s.size(); ++l) out.push_back(Memory(s[l], y[l]).times(v[l]));
  return out;
}

// Moves every row of a memory up by one and puts v in the last.
template <typename T>
void push(const at::Tensor& memory, const std::vector<T>& v) {
  T* data = memory.mutable_data_ptr<T>();
  const int64_t n = memory.size(1), kept = (memory.size(0) - 1) * n;
  std::memmove(data, data + n, kept * sizeof(T));
  std::copy(v.begin(), v.end(), data + kept);
}

at::Tensor damped_lbfgs_update_(at::TensorList s_pairs, at::TensorList y_pairs, at::TensorList s, at::TensorList y,
                                double mu1, double mu2, bool damped, bool bounded) {
  check_damped_lbfgs_update(s_pairs, y_pairs, s, y, mu1, mu2);
  at::Tensor status = at::empty({int64_t(s.size())}, at::kLong);
  for (size_t l = 0; l < s.size(); ++l)
    AT_DISPATCH_FLOATING_TYPES(s[l].scalar_type(), "damped_lbfgs_update_", [&] {
      using T = scalar_t;
      Pair<T> pair{to_vector<T>(s[l]), to_vector<T>(y[l])};
      const Memory memory(s_pairs[l], y_pairs[l]);
      const auto h_y = [&](const at::Tensor& vector) { return to_vector<T>(memory.times(vector.unsqueeze(1))); };
      pair.hy = h_y(y[l]);
      const Damping<T> damping{mu1, mu2, damped};
      damping.first(pair);
      damping.second(pair, damping.theta2(pair));
      if (bounded && pair.status & kDampedY) pair.hy = h_y(to_tensor(pair.y, y[l]));
      const double sy = dot(pair.s, pair.y);
      if (sy > 0 && std::isfinite(1 / sy) && std::isfinite(dot(pair.y, pair.y) / sy) &&
          std::isfinite(dot(pair.s, pair.s) / sy) &&
          (!bounded || Bounds{mu1, mu2}.hold(pair, sy, dot(pair.y, pair.hy)))) {
        push(s_pairs[l], pair.s);
        push(y_pairs[l], pair.y);
        pair.status |= kUpdated;
      }
      status.mutable_data_ptr<int64_t>()[l] = pair.status;
    });
  for (const at::TensorList list : {s_pairs, y_pairs}) written(list);
  return status;
}

}  // namespace

TORCH_LIBRARY_IMPL(secondorder, CPU, m) {
  m.impl("double_damping", double_damping);
  m.impl("double_damping.list", double_damping_list);
  m.impl("bfgs_update_", bfgs_update_);
  m.impl("bfgs_update_.list", bfgs_update_list_);
  m.impl("damped_bfgs_update_", damped_bfgs_update_);
  m.impl("hessian_action_update_", hessian_action_update_);
  m.impl("lbfgs_product", lbfgs_product);
  m.impl("lbfgs_product.list", lbfgs_product_list);
  m.impl("damped_lbfgs_update_", damped_lbfgs_update_);
}

}  // namespace secondorder::cpu
