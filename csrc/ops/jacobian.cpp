// jacobian_rows_: rows of a Jacobian as sums of outer products. On a device without a kernel of its own, a batched
// product for each block.
#include "jacobian.h"

#include <ATen/Functions.h>
#include <torch/library.h>

#include <string>

#include "../checks.h"
#include "../tensors.h"

namespace secondorder {
namespace {

constexpr const char* kOp = "jacobian_rows_";

void check_out(const at::Tensor& out) {
  check_dim(kOp, "out", out, 2);
  check_floating(kOp, "out", out);
  const int64_t m = out.size(0), n = out.size(1);
  TORCH_CHECK_VALUE((n < 2 || out.stride(1) == 1) && (m < 2 || out.stride(0) >= n), kOp,
                    ": expected out with contiguous rows that do not overlap, got shape ", out.sizes(), " and strides ",
                    out.strides());
  check_mutable(kOp, "out", out);
}

// One piece, as a block of its own.
JacobianBlock check_piece(const at::Tensor& out, size_t i, const at::Tensor& left, const at::Tensor& right,
                          const at::Tensor& rows, int64_t start, int64_t offset) {
  const auto named = [&](const char* name) { return name + (" of piece " + std::to_string(i)); };
  const std::string left_name = named("left"), right_name = named("right"), rows_name = named("rows");
  check_dim(kOp, left_name.c_str(), left, 2);
  check_same(kOp, left_name.c_str(), left, "out", out);
  check_same(kOp, right_name.c_str(), right, "out", out);
  const int64_t r = left.size(0), a = left.size(1);
  if (!is_absent(right)) {
    check_dim(kOp, right_name.c_str(), right, 2);
    check_shape(kOp, right_name.c_str(), right, {r, right.size(1)});
  }
  TORCH_CHECK_TYPE(rows.scalar_type() == at::kLong, kOp, ": expected ", rows_name, " of dtype int64, got ",
                   rows.scalar_type());
  check_same_device(kOp, rows_name.c_str(), rows, "out", out);
  if (!is_absent(rows)) check_dim(kOp, rows_name.c_str(), rows, 2);
  const int64_t m = is_absent(rows) ? r : rows.size(0), b = is_absent(right) ? 1 : right.size(1);
  TORCH_CHECK_VALUE(start >= 0 && start <= out.size(0) - m, kOp, ": expected ", m, " rows of piece ", i, " within the ",
                    out.size(0), " of out, got start ", start);
  TORCH_CHECK_VALUE(offset >= 0 && offset <= out.size(1) - a * b, kOp, ": expected ", a, " x ", b, " columns of piece ",
                    i, " within the ", out.size(1), " of out, got offset ", offset);
  return {i, i + 1, start, offset, m, a, b};
}

}  // namespace

std::vector<JacobianBlock> check_jacobian_rows(const at::Tensor& out, at::TensorList left, at::TensorList right,
                                               at::TensorList rows, at::IntArrayRef start, at::IntArrayRef offset) {
  check_lengths(kOp, {{"left", left.size()},
                      {"right", right.size()},
                      {"rows", rows.size()},
                      {"start", start.size()},
                      {"offset", offset.size()}});
  check_out(out);
  std::vector<JacobianBlock> blocks;
  for (size_t i = 0; i < left.size(); ++i) {
    const JacobianBlock piece = check_piece(out, i, left[i], right[i], rows[i], start[i], offset[i]);
    if (blocks.empty() || blocks.back().start != piece.start || blocks.back().offset != piece.offset) {
      blocks.push_back(piece);
      continue;
    }
    JacobianBlock& block = blocks.back();
    TORCH_CHECK_VALUE(piece.m == block.m && piece.a == block.a && piece.b == block.b, kOp, ": expected piece ", i,
                      " of ", block.m, " rows and ", block.a, " x ", block.b, " columns as piece ", block.begin,
                      " at the same place, got ", piece.m, " rows and ", piece.a, " x ", piece.b, " columns");
    block.end = i + 1;
  }
  return blocks;
}

namespace {

// The rows of t [R, n] that `rows` [m, T] names, R naming a row of zeros; without `rows`, t. -> [m, T, n]
at::Tensor gathered(const at::Tensor& t, const at::Tensor& rows) {
  if (is_absent(rows)) return t.unsqueeze(1);
  const at::Tensor padded = at::cat({t, at::zeros({1, t.size(1)}, t.options())});
  return padded.index_select(0, rows.reshape({-1})).view({rows.size(0), rows.size(1), t.size(1)});
}

void jacobian_rows_(const at::Tensor& out, at::TensorList left, at::TensorList right, at::TensorList rows,
                    at::IntArrayRef start, at::IntArrayRef offset) {
  const Unrecorded guard;
  for (const JacobianBlock& block : check_jacobian_rows(out, left, right, rows, start, offset)) {
    const int64_t a = block.a, b = block.b;
    std::vector<at::Tensor> lefts, rights;
    for (size_t i = block.begin; i < block.end; ++i) {
      lefts.push_back(gathered(left[i], rows[i]));
      const bool ones = is_absent(right[i]);
      rights.push_back(gathered(ones ? at::ones({left[i].size(0), 1}, left[i].options()) : right[i], rows[i]));
    }
    at::Tensor target = out.narrow(0, block.start, block.m).narrow(1, block.offset, a * b).unflatten(1, {a, b});
    at::bmm_out(target, at::cat(lefts, 1).transpose(1, 2), at::cat(rights, 1));
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(secondorder, CompositeExplicitAutograd, m) { m.impl("jacobian_rows_", jacobian_rows_); }

}  // namespace secondorder
