#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace secondorder {

// Consecutive pieces [begin, end) that one block of a Jacobian is the sum of: of m rows and a b columns.
struct JacobianBlock {
  size_t begin, end;
  int64_t start, offset, m, a, b;
};

// A vector's piece has no right factors, and one in natural order no rows.
inline bool is_absent(const at::Tensor& t) { return t.dim() == 1 && t.size(0) == 0; }

// Checks everything but the entries of `rows`; returns the blocks.
std::vector<JacobianBlock> check_jacobian_rows(const at::Tensor& out, at::TensorList left, at::TensorList right,
                                               at::TensorList rows, at::IntArrayRef start, at::IntArrayRef offset);

}  // namespace secondorder
