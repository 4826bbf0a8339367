// bias_hessian: one step of the backward recursion of the bias Hessian (Chen et al., Eq. 6 and 8b),
//
//   G = (W^T H W) * (d1^T d1 / m) + diag(PosEig_gamma(sum_i d2_i * grad_input_i)),   * elementwise
//
// All three products have the form X^T Y with row-major X and Y (H is symmetric), so each operand is packed once into
// strips of columns and one register kernel serves them all. A tile of G, of the lower triangle alone, is computed from
// both of its products at once, finished, and stored with its mirror image: W^T H W and d1^T d1 never exist whole, and
// of H W only the columns of the current panel do.
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <torch/library.h>

#include <cstring>
#include <optional>
#include <vector>

#include "../formulas.h"
#include "../ops/bias_hessian.h"
#include "activation.h"
#include "kernels.h"
#include "parallel.h"
#include "strips.h"

namespace secondorder::cpu {
namespace {

// G from H [k, k] and W [k, n], both contiguous, and d1 [m, n], which `fill(strip, out, sums)` writes as strips while
// it adds the strip's columns of sum_i d2_i * grad_input_i to sums (null where there is no diagonal).
template <typename T, typename Fill>
void recursion(const T* hessian, const T* weight, int64_t k, int64_t n, int64_t m, bool diagonal, T gamma, T* out,
               Fill&& fill) {
  const Kernels<T>& kernel = kernels<T>();
  const int64_t nr = kernel.nr;
  const Strips<T> h(k, k), w(k, n), d1(m, n);
  std::vector<double> sums(diagonal ? d1.count * nr : 0, 0.0);

  parallel_items(d1.count + w.count + h.count, (m + k) * n + k * k, [&](int64_t, int64_t item) {
    if (item < d1.count) {
      d1.clear_padding(item);
      fill(d1, item, diagonal ? sums.data() + item * nr : nullptr);
    } else if (item < d1.count + w.count) {
      w.pack(item - d1.count, weight);
    } else {
      h.pack(item - d1.count - w.count, hessian);
    }
  });

  // Panel p of G: its tile columns, from the diagonal down. The first panels are the longest, as parallel_items wants.
  const int64_t strips = tile_strips(d1.count), tile = strips * nr;
  const int64_t panels = ceil_div(d1.count, strips), h_rows = h.count * nr;
  const int64_t work = k * k * n + (k + m) * n * n / 2;
  struct Scratch {
    std::vector<T> hw, curvature, moment;
  };
  std::vector<Scratch> scratch(std::max<int64_t>(1, std::min<int64_t>(panels, at::get_num_threads())));
  const T inverse_batch = T(1) / T(m);

  parallel_items(panels, work / kProductsPerElement, [&](int64_t worker, int64_t panel) {
    auto& [hw, curvature, moment] = scratch[worker];
    hw.resize(strips * h_rows * nr);
    curvature.resize(tile * tile);
    moment.resize(tile * tile);
    const int64_t first = panel * strips, columns = std::min(strips, d1.count - first);

    // hw: the panel's columns of H W as strips [h_rows, nr], of whose rows k are used.
    multiply_strips(kernel, k, h.strip(0), k * nr, h.count, w.strip(first), k * nr, columns, hw.data(), nr, h_rows * nr,
                    false);

    for (int64_t block = first; block < d1.count; block += strips) {
      const int64_t rows = std::min(strips, d1.count - block);
      const bool on_diagonal = block == first;
      multiply_strips(kernel, k, w.strip(block), k * nr, rows, hw.data(), h_rows * nr, columns, curvature.data(), tile,
                      nr, on_diagonal);
      multiply_strips(kernel, m, d1.strip(block), m * nr, rows, d1.strip(first), m * nr, columns, moment.data(), tile,
                      nr, on_diagonal);

      const int64_t row0 = block * nr, col0 = first * nr;
      const int64_t valid_rows = std::min(n - row0, rows * nr), valid_cols = std::min(n - col0, columns * nr);
      for (int64_t i = 0; i < valid_rows; ++i) {
        T *c = curvature.data() + i * tile, *e = moment.data() + i * tile;
        const int64_t end = on_diagonal ? i + 1 : valid_cols;
        for (int64_t j = 0; j < end; ++j) c[j] *= e[j] * inverse_batch;
        if (on_diagonal && diagonal) c[i] += pos_eig(T(sums[row0 + i]), gamma);
        std::memcpy(out + (row0 + i) * n + col0, c, sizeof(T) * end);
      }
      // The mirror image, in small squares that stay in cache.
      constexpr int64_t kSquare = 16;
      for (int64_t j0 = 0; j0 < valid_cols; j0 += kSquare)
        for (int64_t i0 = on_diagonal ? j0 : 0; i0 < valid_rows; i0 += kSquare)
          for (int64_t j = j0; j < std::min(j0 + kSquare, valid_cols); ++j)
            for (int64_t i = std::max(i0, on_diagonal ? j + 1 : 0); i < std::min(i0 + kSquare, valid_rows); ++i)
              out[(col0 + j) * n + row0 + i] = curvature[i * tile + j];
    }
  });
}

at::Tensor bias_hessian(const at::Tensor& hessian_, const at::Tensor& weight_, const at::Tensor& d1_,
                        const std::optional<at::Tensor>& d2_, const std::optional<at::Tensor>& grad_input_,
                        double gamma) {
  check_bias_hessian(hessian_, weight_, d1_, d2_, grad_input_, gamma);
  const at::Tensor hessian = hessian_.contiguous(), weight = weight_.contiguous(), d1 = d1_.contiguous();
  const at::Tensor d2 = d2_ ? d2_->contiguous() : at::Tensor(), grad = d2_ ? grad_input_->contiguous() : at::Tensor();
  const int64_t n = weight.size(1), m = d1.size(0);
  at::Tensor out = at::empty({n, n}, hessian.options());
  AT_DISPATCH_FLOATING_TYPES(hessian.scalar_type(), "bias_hessian", [&] {
    using T = scalar_t;
    const T *source = d1.const_data_ptr<T>(), *second = d2.defined() ? d2.const_data_ptr<T>() : nullptr,
            *g = d2.defined() ? grad.const_data_ptr<T>() : nullptr;
    recursion<T>(hessian.const_data_ptr<T>(), weight.const_data_ptr<T>(), weight.size(0), n, m, second != nullptr,
                 T(gamma), out.mutable_data_ptr<T>(), [&](const Strips<T>& strips, int64_t s, double* sums) {
                   const int64_t at = s * strips.nr;
                   strips.pack(s, source);
                   if (sums) kernels<T>().column_products(m, strips.width(s), second + at, g + at, n, sums);
                 });
  });
  return out;
}

at::Tensor bias_hessian_activation(const at::Tensor& hessian_, const at::Tensor& weight_, const at::Tensor& saved_,
                                   c10::string_view name, double parameter,
                                   const std::optional<at::Tensor>& grad_input_, double gamma) {
  const Activation activation =
      check_bias_hessian_activation(hessian_, weight_, saved_, name, parameter, grad_input_, gamma);
  const at::Tensor hessian = hessian_.contiguous(), weight = weight_.contiguous(), saved = saved_.contiguous();
  const at::Tensor grad = grad_input_ ? grad_input_->contiguous() : at::Tensor();
  const auto [e0, e1] = transcendentals(activation, parameter, saved);
  const int64_t n = weight.size(1), m = saved.size(0);
  at::Tensor out = at::empty({n, n}, hessian.options());
  AT_DISPATCH_FLOATING_TYPES(hessian.scalar_type(), "bias_hessian", [&] {
    using T = scalar_t;
    const T *v = saved.const_data_ptr<T>(), *p0 = e0.defined() ? e0.const_data_ptr<T>() : v,
            *p1 = e1.defined() ? e1.const_data_ptr<T>() : v, *g = grad.defined() ? grad.const_data_ptr<T>() : v;
    recursion<T>(hessian.const_data_ptr<T>(), weight.const_data_ptr<T>(), weight.size(0), n, m, grad.defined(),
                 T(gamma), out.mutable_data_ptr<T>(), [&](const Strips<T>& strips, int64_t s, double* sums) {
                   const int64_t at = s * strips.nr;
                   kernels<T>().derivatives(activation, T(parameter), m, strips.width(s), v + at, p0 + at, p1 + at,
                                            g + at, n, strips.strip(s), strips.nr, nullptr, sums);
                 });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(secondorder, CPU, m) {
  m.impl("bias_hessian", bias_hessian);
  m.impl("bias_hessian.activation", bias_hessian_activation);
  m.impl("bias_hessian.chain", bias_hessian_chain);
}

}  // namespace secondorder::cpu
