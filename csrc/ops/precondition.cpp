// precondition: L G R. On a device without a kernel of its own, two products by the device's BLAS.
#include "precondition.h"

#include <ATen/Functions.h>
#include <torch/library.h>

#include "../checks.h"
#include "../tensors.h"

namespace secondorder {

void check_precondition(const std::optional<at::Tensor>& left, const at::Tensor& gradient,
                        const std::optional<at::Tensor>& right) {
  constexpr const char* op = "precondition";
  check_dim(op, "gradient", gradient, 2);
  check_floating(op, "gradient", gradient);
  const auto check_side = [&](const char* name, const std::optional<at::Tensor>& side, int64_t n) {
    if (!side) return;
    check_shape(op, name, *side, {n, n});
    check_same(op, name, *side, "gradient", gradient);
  };
  check_side("left", left, gradient.size(0));
  check_side("right", right, gradient.size(1));
}

namespace {

at::Tensor precondition(const std::optional<at::Tensor>& left, const at::Tensor& gradient,
                        const std::optional<at::Tensor>& right) {
  check_precondition(left, gradient, right);
  const Unrecorded guard;
  const at::Tensor half = left ? left->mm(gradient) : gradient;
  return right ? half.mm(*right) : left ? half : half.clone(at::MemoryFormat::Contiguous);
}

}  // namespace

TORCH_LIBRARY_IMPL(secondorder, CompositeExplicitAutograd, m) { m.impl("precondition", precondition); }

}  // namespace secondorder
