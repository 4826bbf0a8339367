// Every operator's schema. What each computes stands in secondorder/ops.py; what it must equal, in reference.py.
#include <torch/library.h>

TORCH_LIBRARY(secondorder, m) {
  m.def(
      "activation_derivatives(Tensor saved, str activation, float parameter) -> (Tensor d1, Tensor d2)");

  m.def(
      "bias_hessian(Tensor bias_hessian, Tensor weight, Tensor d1, Tensor? d2, Tensor? grad_input, float gamma) "
      "-> Tensor");
  m.def(
      "bias_hessian.activation(Tensor bias_hessian, Tensor weight, Tensor saved, str activation, float parameter, "
      "Tensor? grad_input, float gamma) -> Tensor");

  m.def("eacg_hvp(Tensor bias_hessian, Tensor mean_input, Tensor p) -> Tensor");
  m.def(
      "eacg_solve(Tensor bias_hessian, Tensor mean_input, Tensor grad_weight, Tensor? grad_bias, float alpha, "
      "int max_iter, float tol, bool truncated) "
      "-> (Tensor direction_weight, Tensor direction_bias, Tensor iterations)");
  m.def(
      "eacg_solve.list(Tensor[] bias_hessian, Tensor[] mean_input, Tensor[] grad_weight, Tensor[] grad_bias, "
      "float[] alpha, int max_iter, float tol, bool truncated) "
      "-> (Tensor[] direction_weight, Tensor[] direction_bias, Tensor iterations)");
  m.def(
      "eacg_update_(Tensor[] bias_hessian, Tensor[] mean_input, Tensor[] grad_weight, Tensor[] grad_bias, "
      "Tensor(a!)[] weight, Tensor(b!)[] bias, Tensor(c!)[] weight_momentum, Tensor(d!)[] bias_momentum, "
      "float[] lr, float[] alpha, float[] momentum, float[] weight_decay, int max_iter, float tol, bool truncated) "
      "-> Tensor iterations");
}
