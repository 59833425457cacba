// Checks, outputs and registration of channel_gate; the arithmetic is in channel_gate_kernel.cpp.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "channel_gate.h"
#include "isa.h"
#include "tensor.h"

namespace fastprune {
namespace {

using OptionalTensor = std::optional<Tensor>;

void run(const ChannelGate& a) {
  static void (*const kernels[kIsaCount])(const ChannelGate&) = {
      &base::channel_gate,
#if defined(__x86_64__)
      &avx2::channel_gate,
      &avx512::channel_gate,
      &avx512_bf16::channel_gate,
#endif
  };
  if (a.samples * a.channels * a.pixels > 0 && (a.dx || a.sums)) kernels[cpu_isa()](a);
}

bool is_channels_last(const Tensor& x) {
  int64_t dense = x.size(1);
  bool fits = x.size(1) == 1 || x.stride(1) == 1;
  const auto next = [&](int64_t d) {
    fits = fits && (x.size(d) == 1 || x.stride(d) == dense);
    dense *= x.size(d);
  };
  for (int64_t d = x.dim() - 1; d > 1; --d) next(d);
  next(0);
  return fits;
}

ChannelGate describe(const Tensor& x) {
  ChannelGate a = {};
  FP_CHECK_CPU(x);
  STD_TORCH_CHECK(x.dim() >= 2 && x.dim() <= 5, "x must have 2 to 5 dimensions, got shape ", shape_string(x));
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "x must be float32 or bfloat16, got ",
                  torch::headeronly::toString(dtype));
  a.channels_last = !x.is_contiguous();
  STD_TORCH_CHECK(!a.channels_last || (x.dim() >= 4 && is_channels_last(x)),
                  "x must be contiguous or channels_last without gaps, got shape ", shape_string(x), " with strides ",
                  strides_string(x));
  a.samples = x.size(0);
  a.channels = x.size(1);
  a.pixels = 1;
  for (int64_t d = 2; d < x.dim(); ++d) a.pixels *= x.size(d);
  a.is_bfloat16 = dtype == ScalarType::BFloat16;
  a.parallel_for = run_parallel;
  return a;
}

void set_gate(ChannelGate& a, const Tensor& gate, const Tensor& x) {
  const ScalarType dtype = gate.scalar_type();
  STD_TORCH_CHECK(gate.is_cpu() && gate.dim() == 1 && gate.size(0) == a.channels && gate.is_contiguous() &&
                      (dtype == ScalarType::Float || dtype == x.scalar_type()),
                  "gate must be (", a.channels, ",), contiguous, float32 or the dtype of x, on the CPU; got ",
                  shape_string(gate), " ", torch::headeronly::toString(dtype));
  a.gate = gate.data_ptr();
  a.gate_is_bfloat16 = dtype == ScalarType::BFloat16;
}

// A buffer (N, C) with neighbouring columns, and the distance of its rows.
float* buffer(const Tensor* t, const char* name, const ChannelGate& a, int64_t& stride) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Float && t->dim() == 2 && t->size(0) == a.samples &&
                      t->size(1) == a.channels && (t->stride(1) == 1 || a.channels <= 1),
                  name, " must be (", a.samples, ", ", a.channels, ") float32 with neighbouring columns, got ",
                  shape_string(*t), " ", torch::headeronly::toString(t->scalar_type()), " with strides ",
                  strides_string(*t));
  stride = t->stride(0);
  return static_cast<float*>(t->data_ptr());
}

Tensor channel_gate(const Tensor& x, const Tensor& gate) {
  ChannelGate a = describe(x);
  set_gate(a, gate, x);
  const Tensor y = new_like(x);
  a.dy = x.data_ptr();
  a.dx = y.data_ptr();
  run(a);
  return y;
}

// Sum over samples, in double and in order.
Tensor add_samples(const ChannelGate& a, const Tensor& gate) {
  const Tensor dgate = new_like(gate);
  std::vector<double> sums(static_cast<size_t>(a.channels));
  double* const s = sums.data();
  for (int64_t n = 0; n < a.samples; ++n) {
    const float* row = a.grad + n * a.grad_stride;
    for (int64_t c = 0; c < a.channels; ++c) s[c] += row[c];
  }
  for (int64_t c = 0; c < a.channels; ++c) {
    const float sum = static_cast<float>(s[c]);
    if (a.gate_is_bfloat16)
      static_cast<torch::headeronly::BFloat16*>(dgate.data_ptr())[c] = sum;
    else
      static_cast<float*>(dgate.data_ptr())[c] = sum;
  }
  return dgate;
}

std::tuple<Tensor, Tensor> channel_gate_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& gate,
                                                 const OptionalTensor& gate_grad, const OptionalTensor& gate_abs,
                                                 bool need_dx, bool need_dgate) {
  ChannelGate a = describe(x);
  FP_CHECK_LIKE(dy, x);
  STD_TORCH_CHECK(gate || !(need_dx || need_dgate), "need_dx and need_dgate need a gate, got None");
  if (gate) set_gate(a, *gate, x);
  a.grad = buffer(pointer(gate_grad), "gate_grad", a, a.grad_stride);
  a.abs = buffer(pointer(gate_abs), "gate_abs", a, a.abs_stride);
  Tensor own;
  if (need_dgate && !a.grad) {
    own = new_tensor({a.samples, a.channels}, ScalarType::Float);
    a.grad = static_cast<float*>(own.data_ptr());
    a.grad_stride = a.channels;
  }
  a.sums = a.grad || a.abs;
  const Tensor dx = need_dx ? new_like(x) : new_tensor({0}, x.scalar_type());
  a.dy = dy.data_ptr();
  a.x = x.data_ptr();
  a.dx = need_dx ? dx.data_ptr() : nullptr;
  if (a.pixels == 0)  // sums over nothing
    for (int64_t n = 0; n < a.samples; ++n)
      for (int64_t c = 0; c < a.channels; ++c) {
        if (a.grad) a.grad[n * a.grad_stride + c] = 0;
        if (a.abs) a.abs[n * a.abs_stride + c] = 0;
      }
  run(a);
  return {dx, need_dgate ? add_samples(a, *gate) : new_tensor({0}, x.scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("channel_gate.cpp", TORCH_BOX(&channel_gate));
  m.impl("channel_gate_backward.cpp", TORCH_BOX(&channel_gate_backward));
}

}  // namespace
}  // namespace fastprune
