// Checks, outputs and registration of batch_norm_act; the arithmetic is in batch_norm_act_kernel.cpp.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "batch_norm_act.h"
#include "isa.h"
#include "tensor.h"

namespace fastprune {
namespace {

using OptionalTensor = std::optional<Tensor>;

const BatchNormActKernels& kernels() {
  static const BatchNormActKernels* const tables[kIsaCount] = {
      &base::batch_norm_act,
#if defined(__x86_64__)
      &avx2::batch_norm_act,
      &avx512::batch_norm_act,
      &avx512_bf16::batch_norm_act,
#endif
  };
  return *tables[cpu_isa()];
}

bool is_channels_last(const Tensor& x) {
  const int64_t C = x.size(1), H = x.size(2), W = x.size(3);
  const int64_t dense[4] = {H * W * C, 1, W * C, C};
  for (int d = 0; d < 4; ++d)
    if (x.size(d) != 1 && x.stride(d) != dense[d]) return false;
  return true;
}

Parameter parameter(const Tensor* t, const char* name, const Tensor& x) {
  if (!t) return {};
  const ScalarType dtype = t->scalar_type();
  STD_TORCH_CHECK(t->is_cpu() && t->dim() == 1 && t->size(0) == x.size(1) && t->is_contiguous() &&
                      (dtype == ScalarType::Float || dtype == x.scalar_type()),
                  name, " must be (", x.size(1), ",), contiguous, float32 or the dtype of x, on the CPU; got ",
                  shape_string(*t), " ", torch::headeronly::toString(dtype));
  return {t->data_ptr(), dtype == ScalarType::BFloat16};
}

GateBuffer gate_buffer(const OptionalTensor& t, const char* name, const BatchNormAct& a) {
  if (!t) return {};
  STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Float && t->dim() == 2 && t->size(0) == a.samples &&
                      t->size(1) == a.channels && (a.channels <= 1 || t->stride(1) == 1) &&
                      (a.samples <= 1 || t->stride(0) >= a.channels),
                  name, " must be (", a.samples, ", ", a.channels, ") float32 on the CPU with strides (at least ",
                  a.channels, ", 1); got ", shape_string(*t), " ", torch::headeronly::toString(t->scalar_type()),
                  " with strides ", strides_string(*t));
  return {static_cast<float*>(t->data_ptr()), t->stride(0)};
}

// What both directions check and fill in.
void describe(BatchNormAct& a, const Tensor& x, const Tensor* weight, const Tensor* bias, bool training, double eps,
              bool sigmoid, bool relu) {
  FP_CHECK_CPU(x);
  FP_CHECK_DIM(x, 4);
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "x must be float32 or bfloat16, got ",
                  torch::headeronly::toString(dtype));
  a.channels_last = !x.is_contiguous();
  STD_TORCH_CHECK(!a.channels_last || is_channels_last(x), "x must be NCHW or channels_last without gaps, got shape ",
                  shape_string(x), " with strides ", strides_string(x));
  STD_TORCH_CHECK(!sigmoid || weight, "sigmoid needs a weight, got None");
  a.samples = x.size(0);
  a.channels = x.size(1);
  a.pixels = x.size(2) * x.size(3);
  a.is_bfloat16 = dtype == ScalarType::BFloat16;
  a.weight = parameter(weight, "weight", x);
  a.bias = parameter(bias, "bias", x);
  a.eps = eps;
  a.training = training;
  a.sigmoid = sigmoid;
  a.relu = relu;
  a.parallel_for = run_parallel;
}

// Weight of the new statistics; counts the batch.
double count_batch(const Tensor* tracked, std::optional<double> momentum) {
  if (!tracked) return momentum.value_or(0.0);
  FP_CHECK_DTYPE(*tracked, ScalarType::Long, "int64");
  STD_TORCH_CHECK(tracked->is_cpu() && tracked->numel() == 1,
                  "num_batches_tracked must be a scalar on the CPU, got shape ", shape_string(*tracked));
  const int64_t count = ++*static_cast<int64_t*>(tracked->data_ptr());
  return momentum.value_or(1.0 / static_cast<double>(count));
}

// Bytes of a mask row: one bit an element, padded to the 16 lanes of a vector.
int64_t mask_bytes(int64_t elements) { return (elements + 15) / 16 * 2; }

std::tuple<Tensor, Tensor, Tensor> batch_norm_act(const Tensor& x, const OptionalTensor& weight,
                                                  const OptionalTensor& bias, const OptionalTensor& residual,
                                                  const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                                  const OptionalTensor& num_batches_tracked, bool training,
                                                  std::optional<double> momentum, double eps, bool sigmoid, bool relu,
                                                  bool save_mask) {
  BatchNormActForward a;
  describe(a, x, pointer(weight), pointer(bias), training, eps, sigmoid, relu);
  a.running_mean = parameter(pointer(running_mean), "running_mean", x);
  a.running_var = parameter(pointer(running_var), "running_var", x);
  STD_TORCH_CHECK(training || (a.running_mean.data && a.running_var.data),
                  "training=False needs running_mean and running_var, got None");
  if (residual) FP_CHECK_LIKE(*residual, x);
  a.momentum = training ? count_batch(pointer(num_batches_tracked), momentum) : 0;

  const bool by_row = a.channels_last;
  const int64_t rows = by_row ? a.pixels : a.channels, row_bytes = mask_bytes(by_row ? a.channels : a.pixels);
  save_mask = save_mask && relu && residual;
  const Tensor y = new_like(x), stats = new_tensor({2, a.channels}, ScalarType::Float);
  const Tensor mask =
      save_mask ? new_tensor({a.samples, rows, row_bytes}, ScalarType::Byte) : new_tensor({0}, ScalarType::Byte);
  a.x = x.data_ptr();
  a.residual = residual ? residual->data_ptr() : nullptr;
  a.y = y.data_ptr();
  a.stats = static_cast<float*>(stats.data_ptr());
  a.mask = save_mask ? static_cast<uint16_t*>(mask.data_ptr()) : nullptr;
  if (x.numel() > 0) {
    kernels().forward(a);
  } else {  // PyTorch leaves the running statistics alone; y has nothing to be made of mean 0 and rstd 0
    for (int64_t i = 0; i < 2 * a.channels; ++i) a.stats[i] = 0;
  }
  return {y, stats, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward(
    const Tensor& dy, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& stats,
    const OptionalTensor& y, const OptionalTensor& mask, const OptionalTensor& gate_grad,
    const OptionalTensor& gate_abs, const OptionalTensor& out_grad, const OptionalTensor& out_abs, bool training,
    double eps, bool sigmoid, bool relu, bool need_dx, bool need_dresidual) {
  BatchNormActBackward a;
  describe(a, x, pointer(weight), pointer(bias), training, eps, sigmoid, relu);
  FP_CHECK_LIKE(dy, x);
  FP_CHECK_DTYPE(stats, ScalarType::Float, "float32");
  FP_CHECK_SHAPE(stats, stats.dim() == 2 && stats.size(0) == 2 && stats.size(1) == a.channels, "(2, C)");
  if (y) FP_CHECK_LIKE(*y, x);
  if (mask) {
    const int64_t rows = a.channels_last ? a.pixels : a.channels;
    const int64_t bytes = a.samples * rows * mask_bytes(a.channels_last ? a.channels : a.pixels);
    FP_CHECK_DTYPE(*mask, ScalarType::Byte, "uint8");
    FP_CHECK_SHAPE(*mask, mask->numel() == bytes, "(N, C, 2 ceil(H W / 16)), channels_last (N, H W, 2 ceil(C / 16))");
  }
  a.gate_grad = gate_buffer(gate_grad, "gate_grad", a);
  a.gate_abs = gate_buffer(gate_abs, "gate_abs", a);
  a.out_grad = gate_buffer(out_grad, "out_grad", a);
  a.out_abs = gate_buffer(out_abs, "out_abs", a);
  // The mask tells the ReLU in a sixteenth or a thirty-second of what a second reading of y would take.
  STD_TORCH_CHECK((y && (mask || !relu || x.numel() == 0)) || !(out_grad || out_abs),
                  "out_grad and out_abs need y, and mask after a ReLU");
  need_dresidual = need_dresidual && relu;

  const auto like_or_none = [](bool wanted, const Tensor& t) {
    return wanted ? new_like(t) : new_tensor({0}, t.scalar_type());
  };
  const Tensor dx = like_or_none(need_dx, x), dresidual = like_or_none(need_dresidual, x);
  const Tensor dweight = like_or_none(weight.has_value(), weight.value_or(x));
  const Tensor dbias = like_or_none(bias.has_value(), bias.value_or(x));
  a.x = x.data_ptr();
  a.dy = dy.data_ptr();
  a.y = y ? y->data_ptr() : nullptr;
  a.mask = mask ? static_cast<const uint16_t*>(mask->data_ptr()) : nullptr;
  a.stats = static_cast<const float*>(stats.data_ptr());
  a.dx = need_dx ? dx.data_ptr() : nullptr;
  a.dresidual = need_dresidual ? dresidual.data_ptr() : nullptr;
  a.dweight = {weight ? dweight.data_ptr() : nullptr, a.weight.is_bfloat16};
  a.dbias = {bias ? dbias.data_ptr() : nullptr, a.bias.is_bfloat16};
  if (x.numel() > 0) {
    kernels().backward(a);
  } else {
    for (const Parameter& p : {a.dweight, a.dbias})
      for (int64_t c = 0; p.data && c < a.channels; ++c) {
        if (p.is_bfloat16)
          static_cast<uint16_t*>(p.data)[c] = 0;
        else
          static_cast<float*>(p.data)[c] = 0;
      }
    for (const GateBuffer& g : {a.gate_grad, a.gate_abs, a.out_grad, a.out_abs})
      for (int64_t n = 0; g.data && n < a.samples; ++n)
        for (int64_t c = 0; c < a.channels; ++c) g.data[n * g.stride + c] = 0;
  }
  return {dx, dweight, dbias, dresidual};
}

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("batch_norm_act.cpp", TORCH_BOX(&batch_norm_act));
  m.impl("batch_norm_act_backward.cpp", TORCH_BOX(&batch_norm_act_backward));
}

}  // namespace
}  // namespace fastprune
