#pragma once

#include "parallel.h"

namespace fastprune {

constexpr int kMaxDims = 5;

// A regularisation or mask seen along the memory of its parameter: dimensions from the slowest to the fastest, joined
// where they can be, with strides of 0 where one value serves many elements.
struct SpreadOut {
  const void* data;  // null: there is none
  int dims;
  int64_t size[kMaxDims], stride[kMaxDims];
};

// Dense tensors that are alike in memory.
struct SgdTensor {
  void *param, *grad, *momentum;  // momentum only if SgdStep::momentum != 0; grad not for kHold
  int64_t size;
  SpreadOut reg, keep;  // float (double for double parameters); bool
};

enum class SgdWork { kStep, kGrow, kHold };  // all; grad += reg * param; param = 0 where not kept
enum class SgdType { kFloat, kBFloat16, kDouble };

struct SgdStep {
  const SgdTensor* tensors;
  int64_t count;
  SgdWork work;
  SgdType type;
  double minus_lr, momentum, one_minus_dampening, weight_decay;
  double unscale;  // 1: the gradients are not scaled
  bool nesterov, maximize, first;
  ParallelFor parallel_for;
};

namespace base {
void growing_sgd(const SgdStep&);
}
namespace avx2 {
void growing_sgd(const SgdStep&);
}
namespace avx512 {
void growing_sgd(const SgdStep&);
}
namespace avx512_bf16 {
void growing_sgd(const SgdStep&);
}

}  // namespace fastprune
