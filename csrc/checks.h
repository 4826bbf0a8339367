// What every operator demands of its arguments: one place, one wording. Each check names the operator and the argument,
// what was expected and what came.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <utility>
#include <vector>

namespace secondorder {

// The named lists of a call, one entry per layer each, have one length.
inline void check_lengths(const char* op, std::initializer_list<std::pair<const char*, size_t>> lists) {
  for (const auto& list : lists) {
    if (list.second == lists.begin()->second) continue;
    std::ostringstream got;
    for (const auto& [name, length] : lists) got << (got.tellp() > 0 ? ", " : "") << length << " " << name;
    TORCH_CHECK_VALUE(false, op, ": expected lists of one length, got ", got.str());
  }
}

// `t` has exactly this shape.
inline void check_shape(const char* op, const char* name, const at::Tensor& t, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(t.sizes() == shape, op, ": expected ", name, " of shape ", shape, ", got ", t.sizes());
}

inline void check_dim(const char* op, const char* name, const at::Tensor& t, int64_t dim) {
  TORCH_CHECK_VALUE(t.dim() == dim, op, ": expected ", name, " with ", dim, " dimensions, got ", t.dim(), " (shape ",
                    t.sizes(), ")");
}

inline void check_square(const char* op, const char* name, const at::Tensor& t) {
  check_dim(op, name, t, 2);
  TORCH_CHECK_VALUE(t.size(0) == t.size(1), op, ": expected a square ", name, ", got shape ", t.sizes());
}

inline void check_floating(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, op, ": expected ", name,
                   " of dtype float32 or float64, got ", t.scalar_type());
}

inline void check_same_device(const char* op, const char* name, const at::Tensor& t, const char* like_name,
                              const at::Tensor& like) {
  TORCH_CHECK_VALUE(t.device() == like.device(), op, ": expected ", name, " on ", like.device(), " as ", like_name,
                    ", got ", t.device());
}

// `t` has the dtype and the device of `like`.
inline void check_same(const char* op, const char* name, const at::Tensor& t, const char* like_name,
                       const at::Tensor& like) {
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), op, ": expected ", name, " of dtype ", like.scalar_type(),
                   " as ", like_name, ", got ", t.scalar_type());
  check_same_device(op, name, t, like_name, like);
}

// `t` is dense, in the order of its indices.
inline void check_contiguous(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_VALUE(t.is_contiguous(), op, ": expected a contiguous ", name, ", got strides ", t.strides());
}

// `t` may be written in place. ATen refuses to count a write to an inference tensor outside of inference mode, but only
// when the kernel has made it.
inline void check_mutable(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK(!t.is_inference() || c10::InferenceMode::is_enabled(), op, ": expected ", name,
              " that may be written, got an inference tensor outside of torch.inference_mode()");
}

// The tensors that a call writes in place. None may share memory with another one: threads write them at a time, and
// what one update leaves is not what the other is of. Copy-on-write leaves storages apart.
class Targets {
 public:
  explicit Targets(const char* op) : op_(op) {}

  void add(const char* name, const at::Tensor& t) {
    check_contiguous(op_, name, t);
    check_mutable(op_, name, t);
    const int64_t begin = t.storage_offset() * int64_t(t.itemsize());
    if (t.numel() > 0) found_.push_back({t.storage().unsafeGetStorageImpl(), begin, begin + int64_t(t.nbytes()), name});
  }

  void check_apart() {
    const auto place = [](const Target& target) { return std::pair(target.storage, target.begin); };
    std::sort(found_.begin(), found_.end(), [&](const Target& a, const Target& b) { return place(a) < place(b); });
    const auto shared = std::adjacent_find(found_.begin(), found_.end(), [](const Target& a, const Target& b) {
      return a.storage == b.storage && b.begin < a.end;
    });
    TORCH_CHECK_VALUE(shared == found_.end(), op_, ": expected a ", shared->name,
                      " in memory of its own, got one that is written elsewhere, too");
  }

 private:
  struct Target {
    const void* storage;
    int64_t begin, end;  // bytes
    const char* name;
  };

  const char* op_;
  std::vector<Target> found_;
};

// A number >= 0 that is finite.
inline void check_not_negative(const char* op, const char* name, double value) {
  TORCH_CHECK_VALUE(value >= 0 && value <= std::numeric_limits<double>::max(), op, ": expected ", name,
                    " >= 0 and finite, got ", value);
}

}  // namespace secondorder
