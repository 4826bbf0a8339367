// The Python module secondorder._C: importing it registers the operators; it says itself how it was built.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "cpu/kernels.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "The compiled part of secondorder. Its operators are torch.ops.secondorder.*, documented in secondorder.ops.";
  m.def("build_info", [] {
    py::dict info;
#if defined(__VERSION__)
    info["compiler"] = __VERSION__;
#endif
    info["cxx_standard"] = __cplusplus;
    info["torch"] = TORCH_VERSION;
#if defined(SECONDORDER_CUDA_ARCHITECTURES)
    info["cuda_architectures"] = SECONDORDER_CUDA_ARCHITECTURES;
#else
    info["cuda_architectures"] = py::none();
#endif
#if defined(_OPENMP)
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
    info["vectors"] = secondorder::cpu::kernels<float>().name;
    return info;
  });
}
