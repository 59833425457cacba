// What the batch_norm_act op hands to its kernels.  No header of torch or the C++ library: see vec.h.
#pragma once

#include <stdint.h>

#include "parallel.h"

namespace fastprune {

// A (C,) tensor of float32 or bfloat16, or null.
struct Parameter {
  void* data = nullptr;
  bool is_bfloat16 = false;
};

struct BatchNormAct {
  int64_t samples, channels, pixels;  // N, C, H * W, none of them 0
  bool channels_last, is_bfloat16;    // memory order and dtype of x, y, residual, dy, dx, dresidual
  Parameter weight, bias;
  double eps;
  bool training, sigmoid, relu;
  ParallelFor parallel_for;
};

struct BatchNormActForward : BatchNormAct {
  const void *x, *residual;             // residual may be null
  Parameter running_mean, running_var;  // updated in training; may be null then
  double momentum;
  void* y;
  float* stats;    // (2, C): mean, 1 / sqrt(var + eps)
  uint16_t* mask;  // may be null; rows padded to a word: (N, C, words of H * W), channels_last (N, H * W, words of C)
};

// (N, C), rows `stride` floats apart, or null.
struct GateBuffer {
  float* data = nullptr;
  int64_t stride = 0;
};

struct BatchNormActBackward : BatchNormAct {
  const void *x, *dy, *y;  // y, or mask, only with a residual before the ReLU; both for sums of dy * y
  const uint16_t* mask;
  const float* stats;
  GateBuffer gate_grad, gate_abs, out_grad, out_abs;  // sums of dz z, |dz z|, dy y, |dy y|; the last two need y
  void *dx, *dresidual;                               // may be null
  Parameter dweight, dbias;                           // may be null
};

struct BatchNormActKernels {
  void (*forward)(const BatchNormActForward&);
  void (*backward)(const BatchNormActBackward&);
};

namespace base {
extern const BatchNormActKernels batch_norm_act;
}
namespace avx2 {
extern const BatchNormActKernels batch_norm_act;
}
namespace avx512 {
extern const BatchNormActKernels batch_norm_act;
}
namespace avx512_bf16 {
extern const BatchNormActKernels batch_norm_act;
}

}  // namespace fastprune
