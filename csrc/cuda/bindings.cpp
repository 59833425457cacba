// The module fastprune._C_cuda.  It is empty: loading it registers the kernels, whose schemas fastprune/backends.py
// declares.
#include <Python.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>

#include <string>

namespace fastprune::cuda {
namespace {

// JSON, for `fastprune doctor`.  Asks no device.
std::string cuda_build_info() {
  const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
  return "{\"architectures\": \"" FP_CUDA_ARCHITECTURES "\", \"nvcc\": \"" FP_NVCC "\", \"runtime\": \"" +
         version(CUDART_VERSION) + "\"}";
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastprune, m) { m.def("cuda_build_info() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(fastprune, CompositeExplicitAutograd, m) {
  m.impl("cuda_build_info", TORCH_BOX(&cuda_build_info));
}

}  // namespace
}  // namespace fastprune::cuda

PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
