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
  m.def(
      "bias_hessian.chain(Tensor bias_hessian, Tensor[] weight, Tensor[] saved, str[] activation, float[] parameter, "
      "Tensor?[] grad_input, float gamma) -> Tensor[]");

  m.def("cross_entropy_hessian(Tensor output, Tensor target, int ignore_index, bool mean) -> Tensor");

  m.def("mean_inputs(Tensor[] input) -> Tensor[]");
  m.def("average_(Tensor(a!)[] new, Tensor[] old, float share) -> ()");

  m.def("precondition(Tensor? left, Tensor gradient, Tensor? right) -> Tensor");

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

  m.def("double_damping(Tensor s, Tensor y, Tensor inverse_hessian, float mu1, float mu2) -> (Tensor s, Tensor y)");
  m.def(
      "double_damping.list(Tensor[] s, Tensor[] y, Tensor[] inverse_hessian, float mu1, float mu2) "
      "-> (Tensor[] s, Tensor[] y)");
  m.def("bfgs_update_(Tensor(a!) inverse_hessian, Tensor s, Tensor y) -> Tensor status");
  m.def("bfgs_update_.list(Tensor(a!)[] inverse_hessian, Tensor[] s, Tensor[] y) -> Tensor status");
  m.def(
      "damped_bfgs_update_(Tensor(a!)[] inverse_hessian, Tensor[] s, Tensor[] y, float mu1, float mu2) "
      "-> Tensor status");
  m.def(
      "hessian_action_update_(Tensor(a!)[] inverse, Tensor[] matrix, Tensor[] vector, float damping) "
      "-> Tensor status");
  m.def("lbfgs_product(Tensor s_pairs, Tensor y_pairs, Tensor v) -> Tensor");
  m.def("lbfgs_product.list(Tensor[] s_pairs, Tensor[] y_pairs, Tensor[] v) -> Tensor[]");
  m.def(
      "damped_lbfgs_update_(Tensor(a!)[] s_pairs, Tensor(b!)[] y_pairs, Tensor[] s, Tensor[] y, float mu1, float mu2) "
      "-> Tensor status");
}
