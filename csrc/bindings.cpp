// The module fastprune._C.  It is empty: loading it registers the kernels, whose schemas fastprune/backends.py
// declares.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "cpu/isa.h"

namespace fastprune {
namespace {

bool cpu_has(Isa isa) {
  if (isa == kBase) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return false;
  if (isa == kAvx2) return true;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return false;
  return isa == kAvx512 || __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

Isa choose_isa() {
  const char* wanted = std::getenv("FASTPRUNE_CPU_ISA");
  Isa best = kBase;
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (cpu_has(isa)) best = isa;
    if (!wanted || std::strcmp(wanted, kIsaNames[i]) != 0) continue;
    STD_TORCH_CHECK(cpu_has(isa), "FASTPRUNE_CPU_ISA=", wanted,
                    ": this CPU does not have these instructions; unset it to get the best the CPU has");
    return isa;
  }
  STD_TORCH_CHECK(!wanted || !*wanted, "FASTPRUNE_CPU_ISA must be base, avx2, avx512 or avx512_bf16, got '", wanted,
                  "'");
  return best;
}

// JSON, for `fastprune doctor`.
std::string build_info() {
  const auto field = [](const char* key, const std::string& value) { return std::string("\"") + key + "\": " + value; };
  const auto text = [](const std::string& s) { return "\"" + s + "\""; };
  std::string available;
  for (int i = 0; i < kIsaCount; ++i)
    if (cpu_has(static_cast<Isa>(i))) available += (i ? ", " : "") + text(kIsaNames[i]);
#if defined(__clang__)
  const std::string compiler = "clang " __clang_version__;
#else
  const std::string compiler = "gcc " __VERSION__;
#endif
  return "{" + field("isa", text(kIsaNames[cpu_isa()])) + ", " + field("isa_available", "[" + available + "]") + ", " +
         field("compiler", text(compiler)) + ", " + field("cxx_standard", std::to_string(__cplusplus)) + ", " +
         field("torch_target", text(std::to_string(TORCH_TARGET_VERSION >> 56) + "." +
                                    std::to_string(TORCH_TARGET_VERSION >> 48 & 0xff))) +
         ", " + field("threads", std::to_string(torch::stable::get_num_threads())) + "}";
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastprune, m) { m.def("build_info() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(fastprune, CompositeExplicitAutograd, m) { m.impl("build_info", TORCH_BOX(&build_info)); }

}  // namespace fastprune

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
