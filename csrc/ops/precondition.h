#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace secondorder {

void check_precondition(const std::optional<at::Tensor>& left, const at::Tensor& gradient,
                        const std::optional<at::Tensor>& right);

}  // namespace secondorder
