#pragma once

namespace fastprune {

// Instruction sets that csrc/cpu/*_kernel.cpp are compiled for, each in a namespace of its name; ISA in setup.py has
// the compiler flags.
enum Isa { kBase, kAvx2, kAvx512, kAvx512Bf16, kIsaCount };
constexpr const char* kIsaNames[kIsaCount] = {"base", "avx2", "avx512", "avx512_bf16"};

// The last of them that this CPU has, or the one named by FASTPRUNE_CPU_ISA.
Isa cpu_isa();

}  // namespace fastprune
