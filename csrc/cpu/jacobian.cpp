// jacobian_rows_ by a kernel that keeps a tile of a row's block in registers while it goes over the outer products that
// the block is the sum of. It reads the factors where they are and writes every element once.
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../ops/jacobian.h"
#include "../tensors.h"
#include "kernels.h"
#include "parallel.h"

namespace secondorder::cpu {
namespace {

at::Tensor with_contiguous_rows(const at::Tensor& t) {
  return is_absent(t) || t.size(1) < 2 || t.stride(1) == 1 ? t : t.contiguous();
}

// Every entry is in [0, r].
void check_entries(size_t piece, const at::Tensor& rows, int64_t r) {
  const int64_t* entries = rows.const_data_ptr<int64_t>();
  int64_t least = 0, largest = 0;
  for (int64_t k = 0; k < rows.numel(); ++k) {
    least = std::min(least, entries[k]);
    largest = std::max(largest, entries[k]);
  }
  TORCH_CHECK_VALUE(least >= 0 && largest <= r, "jacobian_rows_: expected rows of piece ", piece, " in [0, ", r,
                    "], got ", least < 0 ? least : largest);
}

// A piece by pointers; row number `count` stands for none.
template <typename T>
struct Piece {
  const T *left, *right;
  int64_t left_stride, right_stride;
  const int64_t* rows;  // null: row j is of residual j
  int64_t uses, count;

  // Appends the rows of residual j.
  void append(int64_t j, std::vector<const T*>& lefts, std::vector<const T*>& rights) const {
    for (int64_t t = 0; t < uses; ++t) {
      const int64_t row = rows ? rows[j * uses + t] : j;
      if (row == count) continue;
      lefts.push_back(left + row * left_stride);
      rights.push_back(right + row * right_stride);
    }
  }
};

template <typename T>
void write_rows(const at::Tensor& out, const std::vector<JacobianBlock>& blocks, const std::vector<Piece<T>>& pieces) {
  const int64_t m = out.size(0), ld = out.stride(0);
  T* result = out.mutable_data_ptr<T>();
  int64_t work = 0;  // of all rows
  for (const JacobianBlock& block : blocks) {
    int64_t uses = kProductsPerElement;  // the block is written once
    for (size_t i = block.begin; i < block.end; ++i) uses += pieces[i].uses;
    work += ceil_div(block.m * block.a * block.b * uses, kProductsPerElement);
  }
  // A thread has some rows of all blocks, so blocks that overlap are written in their order.
  parallel_rows(m, ceil_div(work, std::max<int64_t>(1, m)), [&](int64_t begin, int64_t end) {
    std::vector<const T*> lefts, rights;
    for (const JacobianBlock& block : blocks) {
      const int64_t last = std::min(end, block.start + block.m);
      for (int64_t i = std::max(begin, block.start); i < last; ++i) {
        lefts.clear();
        rights.clear();
        for (size_t p = block.begin; p < block.end; ++p) pieces[p].append(i - block.start, lefts, rights);
        kernels<T>().outer_sum(lefts.size(), block.a, block.b, lefts.data(), rights.data(),
                               result + i * ld + block.offset);
      }
    }
  });
}

void jacobian_rows_(const at::Tensor& out, at::TensorList left_, at::TensorList right_, at::TensorList rows_,
                    at::IntArrayRef start, at::IntArrayRef offset) {
  const std::vector<JacobianBlock> blocks = check_jacobian_rows(out, left_, right_, rows_, start, offset);
  std::vector<at::Tensor> left, right, rows;  // they live as long as the pointers into them
  for (size_t i = 0; i < left_.size(); ++i) {
    left.push_back(with_contiguous_rows(left_[i]));
    right.push_back(with_contiguous_rows(right_[i]));
    rows.push_back(rows_[i].contiguous());
    check_entries(i, rows[i], left[i].size(0));
  }
  own_storage(out);
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "jacobian_rows_", [&] {
    using T = scalar_t;
    static constexpr T kOne = 1;
    std::vector<Piece<T>> pieces;
    for (size_t i = 0; i < left.size(); ++i) {
      const bool ones = is_absent(right[i]), natural = is_absent(rows[i]);
      pieces.push_back({left[i].const_data_ptr<T>(), ones ? &kOne : right[i].const_data_ptr<T>(), left[i].stride(0),
                        ones ? 0 : right[i].stride(0), natural ? nullptr : rows[i].const_data_ptr<int64_t>(),
                        natural ? 1 : rows[i].size(1), left[i].size(0)});
    }
    write_rows(out, blocks, pieces);
  });
  written(out);
}

}  // namespace

TORCH_LIBRARY_IMPL(secondorder, CPU, m) { m.impl("jacobian_rows_", jacobian_rows_); }

}  // namespace secondorder::cpu
