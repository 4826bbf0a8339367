// precondition on any device without an operator of its own: two products by the device's BLAS.
#include <ATen/Functions.h>
#include <torch/library.h>

#include <optional>

#include "argument_checks.h"

namespace secondorder {
namespace {

at::Tensor precondition(const std::optional<at::Tensor>& left, const at::Tensor& gradient,
                        const std::optional<at::Tensor>& right) {
  check_precondition("precondition", left, gradient, right);
  const at::Tensor half = left ? left->mm(gradient) : gradient;
  return right ? half.mm(*right) : left ? half : half.clone(at::MemoryFormat::Contiguous);
}

}  // namespace

TORCH_LIBRARY_IMPL(secondorder, CompositeExplicitAutograd, m) { m.impl("precondition", precondition); }

}  // namespace secondorder
