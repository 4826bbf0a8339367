// bias_hessian.chain: the recursion through several layers, on any device. One call from Python in place of one per layer,
// whose dispatch and argument parsing are what nets of small layers cost.
#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "checks.h"

namespace secondorder {
namespace {

// H of the layers below `hessian`'s, going down: weights W_0 [n_0, n_1], W_1 [n_1, n_2], ..., what the activations below each
// saved [m, n_(l+1)], and the gradients there, or none where the diagonal is left out.
std::vector<at::Tensor> bias_hessian_chain(at::Tensor hessian, at::TensorList weights, at::TensorList saved,
                                           const c10::List<std::string>& activations, at::ArrayRef<double> parameters,
                                           const c10::List<std::optional<at::Tensor>>& grad_inputs, double gamma) {
  static const auto step = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("secondorder::bias_hessian", "activation")
                               .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, c10::string_view,
                                                 double, const std::optional<at::Tensor>&, double)>();
  const size_t layers = weights.size();
  check_lengths("bias_hessian", {{"weight", layers},
                                 {"saved", saved.size()},
                                 {"activation", activations.size()},
                                 {"parameter", parameters.size()},
                                 {"grad_input", grad_inputs.size()}});
  const at::AutoDispatchBelowADInplaceOrView guard;  // autograd has been passed already
  std::vector<at::Tensor> hessians;
  for (size_t l = 0; l < layers; ++l)
    hessians.push_back(step.call(l == 0 ? hessian : hessians.back(), weights[l], saved[l], activations.get(l), parameters[l],
                                 grad_inputs.get(l), gamma));
  return hessians;
}

}  // namespace

TORCH_LIBRARY_IMPL(secondorder, CompositeExplicitAutograd, m) { m.impl("bias_hessian.chain", bias_hessian_chain); }

}  // namespace secondorder
