// cross_entropy_hessian: where the recursion starts.
#include "cross_entropy.h"

#include <ATen/Functions.h>
#include <torch/library.h>

#include "../checks.h"
#include "../tensors.h"

namespace secondorder {

void check_cross_entropy_hessian(const at::Tensor& output, const at::Tensor& target) {
  constexpr const char* op = "cross_entropy_hessian";
  check_dim(op, "output", output, 2);
  check_floating(op, "output", output);
  TORCH_CHECK_TYPE(at::isIntegralType(target.scalar_type(), /*includeBool=*/false), op,
                   ": expected target with class indices, got dtype ", target.scalar_type());
  check_shape(op, "target", target, {output.size(0)});
  check_same_device(op, "target", target, "output", output);
}

at::Tensor cross_entropy_hessian_by_products(const at::Tensor& output, const at::Tensor& target, int64_t ignore_index,
                                             bool mean) {
  const Unrecorded guard;
  const at::Tensor kept = target.to(at::kLong).ne(ignore_index);  // uint8 has no -100
  const at::Tensor p = at::softmax(output, 1).masked_fill(kept.logical_not().unsqueeze(1), 0);
  at::Tensor mass = kept.to(output.scalar_type());
  if (mean) mass.div_(mass.sum());
  const at::Tensor weighted = at::mul(p, mass.unsqueeze(1));
  return at::addmm(at::diag(weighted.sum(0)), p.t(), weighted, /*beta=*/1, /*alpha=*/-1);
}

namespace {

// output [m, K], target [m] class indices -> [K, K]
at::Tensor cross_entropy_hessian(const at::Tensor& output, const at::Tensor& target, int64_t ignore_index, bool mean) {
  check_cross_entropy_hessian(output, target);
  return cross_entropy_hessian_by_products(output, target, ignore_index, mean);
}

}  // namespace

TORCH_LIBRARY_IMPL(secondorder, CompositeExplicitAutograd, m) {
  m.impl("cross_entropy_hessian", cross_entropy_hessian);
}

}  // namespace secondorder
