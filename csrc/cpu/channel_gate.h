#pragma once

#include "parallel.h"

namespace fastprune {

struct ChannelGate {
  int64_t samples, channels, pixels;
  bool channels_last;         // (N, pixels, C); else (N, C, pixels)
  bool is_bfloat16;           // dy, x, dx; else float
  bool gate_is_bfloat16;      // else float
  const void *dy, *x, *gate;  // x only for sums, gate, (C,), only for dx
  void* dx;                   // dy * gate, or null
  bool sums;                  // over pixels, of dy * x to grad and of |dy * x| to abs, (N, C), either may be null
  float *grad, *abs;
  int64_t grad_stride, abs_stride;  // from sample to sample
  ParallelFor parallel_for;
};

namespace base {
void channel_gate(const ChannelGate&);
}
namespace avx2 {
void channel_gate(const ChannelGate&);
}
namespace avx512 {
void channel_gate(const ChannelGate&);
}
namespace avx512_bf16 {
void channel_gate(const ChannelGate&);
}

}  // namespace fastprune
