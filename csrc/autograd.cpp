// What stands for autograd before every operator, on every device. None is differentiable: tangents are refused at
// once, and a backward pass that would go through an operator is refused when it comes there.
#include "autograd.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

namespace secondorder {
namespace {

using torch::autograd::Edge;
using NodePointer = decltype(Edge::function);

template <typename F>
void for_tensors(at::ArrayRef<c10::IValue> values, F&& f) {
  for (const c10::IValue& value : values) {
    if (value.isTensor()) f(value.toTensor());
    else if (value.isList()) for_tensors(value.toListRef(), f);
  }
}

// torch holds its nodes by shared or, in newer versions, by intrusive pointers.
template <typename Node, typename... Args>
NodePointer make_node(Args&&... args) {
  if constexpr (std::is_same_v<NodePointer, std::shared_ptr<torch::autograd::Node>>)
    return std::make_shared<Node>(std::forward<Args>(args)...);
  else return c10::make_intrusive<Node>(std::forward<Args>(args)...);
}

void refuse(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto compute = [&] { op.redispatchBoxed(keys & c10::after_autograd_keyset, stack); };
  const at::ArrayRef<c10::IValue> given = torch::jit::last(*stack, schema.arguments().size());
  bool differentiated = false;
  for_tensors(given, [&](const at::Tensor& t) {
    TORCH_CHECK_NOT_IMPLEMENTED(!t.defined() || !t._fw_grad(/*level=*/0).defined(), schema.name(),
                                ": expected tensors without tangents, got some of forward-mode AD; no operator of "
                                "secondorder is differentiable");
    differentiated = differentiated || t.requires_grad();
  });
  if (!differentiated || !c10::GradMode::is_enabled()) return compute();

  std::vector<Edge> edges;
  for_tensors(given, [&](const at::Tensor& t) { edges.push_back(torch::autograd::impl::gradient_edge(t)); });
  std::vector<at::Tensor> made;  // and what is written, but for leaves, whose gradients are those after the write
  for (size_t i = 0; i < given.size(); ++i)
    if (const auto* alias = schema.arguments()[i].alias_info(); alias && alias->isWrite())
      for_tensors(given[i], [&](const at::Tensor& t) {
        if (!t.requires_grad() || !t.is_leaf()) made.push_back(t);
      });
  compute();
  for_tensors(torch::jit::last(*stack, schema.returns().size()), [&](const at::Tensor& t) { made.push_back(t); });
  for (const at::Tensor& t : made) {
    if (!t.is_floating_point()) continue;
    const NodePointer node = make_node<torch::autograd::NotImplemented>(schema.name(), std::vector<Edge>(edges));
    torch::autograd::impl::rebase_history(t, {node, node->add_input_metadata(t)});
  }
}

}  // namespace

void refuse_derivatives(const std::string& name) {
  static torch::Library library(torch::Library::IMPL, "secondorder", c10::DispatchKey::Autograd, __FILE__, __LINE__);
  library.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&refuse>());
}

}  // namespace secondorder
