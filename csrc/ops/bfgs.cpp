// K-BFGS: double damping, the BFGS update of inverse Hessians, its Hessian-action form, and limited-memory BFGS.
#include "bfgs.h"

#include "../checks.h"

namespace secondorder {
namespace {

void check_damping(const char* op, double mu1, double mu2) {
  TORCH_CHECK_VALUE(mu1 > 0 && mu1 < 1, op, ": expected mu1 in (0, 1), got ", mu1);
  TORCH_CHECK_VALUE(mu2 > 0 && mu2 <= 1, op, ": expected mu2 in (0, 1], got ", mu2);
}

// One matrix per layer, of one dtype on one device; `written` in place.
void check_matrices(const char* op, const char* name, at::TensorList matrices, bool written) {
  Targets targets(op);
  for (const at::Tensor& h : matrices) {
    check_square(op, name, h);
    check_floating(op, name, h);
    check_same(op, name, h, "the first one", matrices[0]);
    if (!written) continue;
    targets.add(name, h);
  }
  targets.check_apart();
}

// A layer's s and y, [n] each, as `like` in dtype and device.
void check_pair(const char* op, const at::Tensor& s, const at::Tensor& y, const char* like_name, const at::Tensor& like,
                int64_t n) {
  check_shape(op, "s", s, {n});
  check_same(op, "s", s, like_name, like);
  check_shape(op, "y", y, {n});
  check_same(op, "y", y, like_name, like);
}

void check_pairs(const char* op, at::TensorList inverses, at::TensorList s, at::TensorList y, bool written) {
  check_lengths(op, {{"inverse_hessian", inverses.size()}, {"s", s.size()}, {"y", y.size()}});
  check_matrices(op, "inverse_hessian", inverses, written);
  for (size_t l = 0; l < s.size(); ++l) check_pair(op, s[l], y[l], "inverse_hessian", inverses[l], inverses[l].size(0));
}

// A layer's limited memory.
void check_memory(const char* op, const at::Tensor& s_pairs, const at::Tensor& y_pairs) {
  check_dim(op, "s_pairs", s_pairs, 2);
  check_floating(op, "s_pairs", s_pairs);
  check_shape(op, "y_pairs", y_pairs, s_pairs.sizes());
  check_same(op, "y_pairs", y_pairs, "s_pairs", s_pairs);
}

}  // namespace

void check_double_damping(at::TensorList s, at::TensorList y, at::TensorList inverses, double mu1, double mu2) {
  constexpr const char* op = "double_damping";
  check_damping(op, mu1, mu2);
  check_pairs(op, inverses, s, y, /*written=*/false);
}

void check_bfgs_update(at::TensorList inverses, at::TensorList s, at::TensorList y) {
  check_pairs("bfgs_update_", inverses, s, y, /*written=*/true);
}

void check_damped_bfgs_update(at::TensorList inverses, at::TensorList s, at::TensorList y, double mu1, double mu2) {
  constexpr const char* op = "damped_bfgs_update_";
  check_damping(op, mu1, mu2);
  check_pairs(op, inverses, s, y, /*written=*/true);
}

void check_hessian_action_update(at::TensorList inverses, at::TensorList matrices, at::TensorList vectors,
                                 double damping) {
  constexpr const char* op = "hessian_action_update_";
  check_lengths(op, {{"inverse", inverses.size()}, {"matrix", matrices.size()}, {"vector", vectors.size()}});
  check_not_negative(op, "damping", damping);
  check_matrices(op, "inverse", inverses, /*written=*/true);
  for (size_t l = 0; l < vectors.size(); ++l) {
    check_shape(op, "matrix", matrices[l], inverses[l].sizes());
    check_same(op, "matrix", matrices[l], "inverse", inverses[l]);
    check_shape(op, "vector", vectors[l], {inverses[l].size(0)});
    check_same(op, "vector", vectors[l], "inverse", inverses[l]);
  }
}

void check_lbfgs_product(at::TensorList s_pairs, at::TensorList y_pairs, at::TensorList v) {
  constexpr const char* op = "lbfgs_product";
  check_lengths(op, {{"s_pairs", s_pairs.size()}, {"y_pairs", y_pairs.size()}, {"v", v.size()}});
  for (size_t l = 0; l < v.size(); ++l) {
    check_memory(op, s_pairs[l], y_pairs[l]);
    check_dim(op, "v", v[l], 2);
    check_shape(op, "v", v[l], {s_pairs[l].size(1), v[l].size(1)});
    check_same(op, "v", v[l], "s_pairs", s_pairs[l]);
  }
}

void check_damped_lbfgs_update(at::TensorList s_pairs, at::TensorList y_pairs, at::TensorList s, at::TensorList y,
                               double mu1, double mu2) {
  constexpr const char* op = "damped_lbfgs_update_";
  check_damping(op, mu1, mu2);
  check_lengths(op, {{"s_pairs", s_pairs.size()}, {"y_pairs", y_pairs.size()}, {"s", s.size()}, {"y", y.size()}});
  Targets targets(op);
  for (size_t l = 0; l < s.size(); ++l) {
    check_memory(op, s_pairs[l], y_pairs[l]);
    check_same(op, "s_pairs", s_pairs[l], "the first one", s_pairs[0]);
    TORCH_CHECK_VALUE(s_pairs[l].size(0) >= 1, op, ": expected room for at least one pair, got s_pairs of shape ",
                      s_pairs[l].sizes());
    targets.add("s_pairs", s_pairs[l]);
    targets.add("y_pairs", y_pairs[l]);
    check_pair(op, s[l], y[l], "s_pairs", s_pairs[l], s_pairs[l].size(1));
  }
  targets.check_apart();
}

}  // namespace secondorder
