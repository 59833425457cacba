#pragma once

namespace fastprune {

enum class Isa { kBase, kAvx2, kAvx512 };

// The widest instruction set of this CPU, or the one named by FASTPRUNE_CPU_ISA=base|avx2|avx512.
Isa cpu_isa();

template <class Kernels>
const Kernels& for_this_cpu(const Kernels& base, const Kernels& avx2, const Kernels& avx512) {
  const Isa isa = cpu_isa();
  return isa == Isa::kAvx512 ? avx512 : isa == Isa::kAvx2 ? avx2 : base;
}

}  // namespace fastprune
