// Checks, outputs, workspaces and registration of batch_norm_act; the arithmetic is in batch_norm_act.cu.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <limits>
#include <mutex>
#include <tuple>

#include "batch_norm_act.h"
#include "stream.h"
#include "tensor.h"

namespace fastprune::cuda {

// For tests: what plan() is to believe of the device; 0 is the device's own.
struct ForcedLimits {
  int shared = 0, cluster = 0, threads = 0, programs = 0;
};
#if defined(FASTPRUNE_EMULATOR)
constexpr ForcedLimits kUsualLimits = {0, 0, 64, 8};  // the emulator pays per thread
#else
constexpr ForcedLimits kUsualLimits = {};
#endif
ForcedLimits forced_limits = kUsualLimits;

namespace {

using OptionalTensor = std::optional<Tensor>;

void check(int error) { STD_TORCH_CHECK(error == 0, "batch_norm_act: CUDA error: ", error_string(error)); }

Limits limits_for(int device) {
  constexpr int kDevices = 64;
  static std::array<Limits, kDevices> known;
  static std::array<std::once_flag, kDevices> once;
  STD_TORCH_CHECK(device >= 0 && device < kDevices, "batch_norm_act: expected a device below ", kDevices, ", got ",
                  device);
  std::call_once(once[device], [&] { check(limits_of(device, known[device])); });
  Limits limits = known[device];
  const ForcedLimits& f = forced_limits;
  if (f.shared) limits.shared = std::min(limits.shared, f.shared);
  if (f.cluster) limits.cluster = std::min(limits.cluster, f.cluster);
  if (f.threads) limits.threads = f.threads;
  if (f.programs) limits.programs = f.programs;
  return limits;
}

bool is_channels_last(const Tensor& x) {
  const int64_t C = x.size(1), H = x.size(2), W = x.size(3);
  const int64_t dense[4] = {H * W * C, 1, W * C, C};
  for (int d = 0; d < 4; ++d)
    if (x.size(d) != 1 && x.stride(d) != dense[d]) return false;
  return true;
}

Parameter parameter(const OptionalTensor& t, const char* name, const Tensor& x) {
  if (!t) return {};
  const ScalarType dtype = t->scalar_type();
  STD_TORCH_CHECK(same_device(*t, x) && t->dim() == 1 && t->size(0) == x.size(1) && t->is_contiguous() &&
                      (dtype == ScalarType::Float || dtype == x.scalar_type()),
                  name, " must be (", x.size(1), ",), contiguous, float32 or the dtype of x, on its device; got ",
                  shape_string(*t), " ", torch::headeronly::toString(dtype));
  return {t->data_ptr(), dtype == ScalarType::Float};
}

GateBuffer gate_buffer(const OptionalTensor& t, const char* name, const Tensor& x) {
  if (!t) return {};
  const int64_t N = x.size(0), C = x.size(1);
  STD_TORCH_CHECK(same_device(*t, x) && t->scalar_type() == ScalarType::Float && t->dim() == 2 && t->size(0) == N &&
                      t->size(1) == C && (C <= 1 || t->stride(1) == 1) && (N <= 1 || t->stride(0) >= C),
                  name, " must be (", N, ", ", C, ") float32 on the device of x with strides (at least ", C,
                  ", 1); got ", shape_string(*t), " ", torch::headeronly::toString(t->scalar_type()), " with strides ",
                  strides_string(*t));
  return {static_cast<float*>(t->data_ptr()), t->stride(0)};
}

Element element_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      STD_TORCH_CHECK(false, "x must be float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

// What both directions check and plan by.  `streams` tensors are kept by the fused kernel, all of `tensors` are read or
// written with the same index.
Problem describe(const Tensor& x, int streams, bool per_sample, std::initializer_list<const void*> tensors) {
  Problem p;
  p.samples = x.size(0);
  p.channels = x.size(1);
  p.pixels = x.size(2) * x.size(3);
  constexpr int64_t kMost = 1 << 30;
  STD_TORCH_CHECK(std::max({p.samples, p.channels, p.pixels}) <= kMost && p.channels <= kMost / 8,
                  "x must have at most 2^30 samples and pixels, and 2^27 channels, got ", shape_string(x));
  p.channels_last =
      !x.is_contiguous() || p.pixels == 1;  // 1 x 1 planes: the same memory, and channels make longer runs
  p.per_sample = per_sample;
  p.itemsize = x.scalar_type() == ScalarType::Float ? 4 : 2;
  p.streams = streams;
  p.aligned = true;
  for (const void* t : tensors) p.aligned = p.aligned && reinterpret_cast<uintptr_t>(t) % 16 == 0;
  return p;
}

void check_input(const Tensor& x, const OptionalTensor& weight, bool sigmoid) {
  FP_CHECK_DIM(x, 4);
  STD_TORCH_CHECK(on_gpu(x), "x must be on a CUDA device");
  STD_TORCH_CHECK(x.is_contiguous() || is_channels_last(x), "x must be NCHW or channels_last without gaps, got shape ",
                  shape_string(x), " with strides ", strides_string(x));
  STD_TORCH_CHECK(!sigmoid || weight, "sigmoid needs a weight, got None");
}

template <class T = void>
T* data(const OptionalTensor& t) {
  return t ? static_cast<T*>(t->data_ptr()) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    bool training, std::optional<double> momentum, double eps, bool sigmoid, bool relu,
    bool /* save_mask: backward reads y again, which the next layer keeps */) {
  check_input(x, weight, sigmoid);
  const Element element = element_of(x);
  Forward a = {};
  a.weight = parameter(weight, "weight", x);
  a.bias = parameter(bias, "bias", x);
  a.running_mean = parameter(running_mean, "running_mean", x);
  a.running_var = parameter(running_var, "running_var", x);
  STD_TORCH_CHECK(training || (running_mean && running_var),
                  "training=False needs running_mean and running_var, got None");
  if (residual) FP_CHECK_LIKE(*residual, x);
  if (num_batches_tracked && training) {
    FP_CHECK_DTYPE(*num_batches_tracked, ScalarType::Long, "int64");
    STD_TORCH_CHECK(same_device(*num_batches_tracked, x) && num_batches_tracked->numel() == 1,
                    "num_batches_tracked must be a scalar on the device of x, got shape ",
                    shape_string(*num_batches_tracked));
    a.tracked = data<int64_t>(num_batches_tracked);
  }
  const Place place = place_of(x);
  const Tensor y = new_like(x, place), mask = new_tensor({0}, ScalarType::Byte, place);
  Tensor stats = new_tensor({2, x.size(1)}, ScalarType::Float, place);
  const CurrentStream stream(x);
  a.cumulative = a.tracked && !momentum;
  if (x.numel() == 0) {  // PyTorch counts the batch and leaves the running statistics alone
    torch::stable::zero_(stats);
    if (a.tracked) check(launch_count(a.tracked, stream.get()));
    return {y, stats, mask};
  }
  a.x = x.data_ptr();
  a.residual = data(residual);
  a.y = y.data_ptr();
  a.stats = static_cast<float*>(stats.data_ptr());
  const Problem p = describe(x, 1, false, {a.x, a.residual, a.y});
  const double m = static_cast<double>(p.samples) * static_cast<double>(p.pixels);
  a.eps = eps;
  a.momentum = momentum.value_or(0.0);
  a.inverse = 1 / m;
  a.unbiased = m > 1 ? m / (m - 1) : std::numeric_limits<double>::quiet_NaN();  // PyTorch's answer, too
  a.training = training;
  a.sigmoid = sigmoid;
  a.relu = relu;
  Limits limits = limits_for(stream.device());
  if (!training) limits.cluster = 0;  // there is nothing to sum: the apply kernel alone
  const Launch l = plan(p, limits);
  a.g = l.geometry;
  if (!training) {
    a.mode = kApply;
    check(launch_forward(l, a, element, stream.get()));
    return {y, stats, mask};
  }
  if (l.fused) {
    a.mode = kFused;
    check(launch_forward(l, a, element, stream.get()));
  } else {
    const int64_t P = int64_t{l.chunks} * l.parts;
    const Tensor partials = new_tensor({3, l.geometry.channels, P}, ScalarType::Double, place);
    a.partials = static_cast<double*>(partials.data_ptr());
    a.mode = kSums;
    check(launch_forward(l, a, element, stream.get()));
    check(
        launch_finalise_forward(a, {static_cast<int>(p.channels), l.join, static_cast<int>(P)}, element, stream.get()));
    a.mode = kApply;
    check(launch_forward(l, a, element, stream.get()));
  }
  // A cumulative average needs the old count in every block: only afterwards may it change.
  if (a.cumulative) check(launch_count(a.tracked, stream.get()));
  return {y, stats, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward(
    const Tensor& dy, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& stats,
    const OptionalTensor& y, const OptionalTensor& mask, const OptionalTensor& gate_grad,
    const OptionalTensor& gate_abs, const OptionalTensor& out_grad, const OptionalTensor& out_abs, bool training,
    double /* eps: in stats */, bool sigmoid, bool relu, bool need_dx, bool need_dresidual) {
  check_input(x, weight, sigmoid);
  const Element element = element_of(x);
  FP_CHECK_LIKE(dy, x);
  FP_CHECK_DTYPE(stats, ScalarType::Float, "float32");
  FP_CHECK_SHAPE(stats, stats.dim() == 2 && stats.size(0) == 2 && stats.size(1) == x.size(1), "(2, C)");
  STD_TORCH_CHECK(same_device(stats, x), "stats must be on the device of x");
  STD_TORCH_CHECK(!mask || mask->numel() == 0, "expected y, got mask bits, which another backend's forward saved");
  if (y) FP_CHECK_LIKE(*y, x);
  STD_TORCH_CHECK(y || !(out_grad || out_abs), "out_grad and out_abs need y, got None");
  Backward a = {};
  a.weight = parameter(weight, "weight", x);
  a.bias = parameter(bias, "bias", x);
  a.gate_grad = gate_buffer(gate_grad, "gate_grad", x);
  a.gate_abs = gate_buffer(gate_abs, "gate_abs", x);
  a.out_grad = gate_buffer(out_grad, "out_grad", x);
  a.out_abs = gate_buffer(out_abs, "out_abs", x);
  a.gates = gate_grad || gate_abs || out_grad || out_abs;
  need_dresidual = need_dresidual && relu;

  const Place place = place_of(x);
  const auto like_or_none = [&](bool wanted, const Tensor& t) {
    return wanted ? new_like(t, place) : new_tensor({0}, t.scalar_type(), place);
  };
  const Tensor dx = like_or_none(need_dx, x), dresidual = like_or_none(need_dresidual, x);
  Tensor dweight = like_or_none(weight.has_value(), weight.value_or(x));
  Tensor dbias = like_or_none(bias.has_value(), bias.value_or(x));
  const CurrentStream stream(x);
  if (x.numel() == 0) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
    for (const OptionalTensor* t : {&gate_grad, &gate_abs, &out_grad, &out_abs})
      if (*t) {
        Tensor gate = **t;
        torch::stable::zero_(gate);
      }
    return {dx, dweight, dbias, dresidual};
  }
  a.dy = dy.data_ptr();
  a.x = x.data_ptr();
  a.y = relu || out_grad || out_abs ? data(y) : nullptr;
  a.dx = need_dx ? dx.data_ptr() : nullptr;
  a.dresidual = need_dresidual ? dresidual.data_ptr() : nullptr;
  a.dweight = {weight ? dweight.data_ptr() : nullptr, a.weight.is_float};
  a.dbias = {bias ? dbias.data_ptr() : nullptr, a.bias.is_float};
  a.stats = static_cast<const float*>(stats.data_ptr());
  a.training = training;
  a.sigmoid = sigmoid;
  a.relu = relu;
  const Problem p = describe(x, 2, a.gates, {a.dy, a.x, a.y, a.dx, a.dresidual});
  a.inverse = 1 / (static_cast<double>(p.samples) * static_cast<double>(p.pixels));
  const Launch l = plan(p, limits_for(stream.device()));
  a.g = l.geometry;

  // Sums per sample of a part of a sample, or of one of several rows joined: they go to a workspace first.
  GateBuffer* const gates[] = {&a.gate_grad, &a.gate_abs, &a.out_grad, &a.out_abs};
  const int rows = l.share * l.join;
  std::optional<Tensor> parts;
  GateBuffer wanted[4];
  if (a.gates && rows > 1) {
    parts = new_tensor({4, p.samples * rows, p.channels}, ScalarType::Float, place);
    const int64_t size = p.samples * rows * p.channels;
    for (int i = 0; i < 4; ++i) {
      wanted[i] = *gates[i];
      if (wanted[i].data) *gates[i] = {static_cast<float*>(parts->data_ptr()) + i * size, p.channels * l.join};
    }
  }
  std::optional<Tensor> partials, projection;
  if (l.fused) {
    a.mode = kFused;
    check(launch_backward(l, a, element, stream.get()));
  } else {
    const int64_t P = int64_t{l.chunks} * l.parts;
    partials = new_tensor({2, l.geometry.channels, P}, ScalarType::Double, place);
    projection = new_tensor({2, p.channels}, ScalarType::Float, place);
    a.partials = static_cast<double*>(partials->data_ptr());
    a.projection = static_cast<float*>(projection->data_ptr());
    a.mode = kSums;
    check(launch_backward(l, a, element, stream.get()));
    check(launch_finalise_backward(a, {static_cast<int>(p.channels), l.join, static_cast<int>(P)}, element,
                                   stream.get()));
    a.mode = kApply;
    if (need_dx) check(launch_backward(l, a, element, stream.get()));
  }
  for (int i = 0; i < 4 && parts; ++i)
    if (wanted[i].data)
      check(
          launch_join_gates({gates[i]->data, wanted[i], p.samples, rows, static_cast<int>(p.channels)}, stream.get()));
  return {dx, dweight, dbias, dresidual};
}

STABLE_TORCH_LIBRARY_IMPL(fastprune, FP_DISPATCH_KEY, m) {
  m.impl("batch_norm_act.cuda", TORCH_BOX(&batch_norm_act));
  m.impl("batch_norm_act_backward.cuda", TORCH_BOX(&batch_norm_act_backward));
}

}  // namespace
}  // namespace fastprune::cuda

// For tests/test_cuda_kernels.py, through ctypes.
#define FP_TESTS extern "C" __attribute__((visibility("default")))

FP_TESTS void fastprune_cuda_force(int shared, int cluster, int threads, int programs) {
  using namespace fastprune::cuda;
  forced_limits = kUsualLimits;
  if (shared) forced_limits.shared = shared;
  if (cluster) forced_limits.cluster = cluster;
  if (threads) forced_limits.threads = threads;
  if (programs) forced_limits.programs = programs;
}

// What plan() makes of a layer on a device: see the fields written to out.
FP_TESTS void fastprune_cuda_plan(const int64_t* sizes, const int* flags, const int* limits, int64_t* out) {
  using namespace fastprune::cuda;
  Problem p;
  p.samples = sizes[0];
  p.channels = sizes[1];
  p.pixels = sizes[2];
  p.channels_last = flags[0];
  p.aligned = flags[1];
  p.per_sample = flags[2];
  p.itemsize = flags[3];
  p.streams = flags[4];
  const Launch l = plan(p, {limits[0], limits[1], limits[2], limits[3]});
  const Geometry& g = l.geometry;
  const int64_t fields[] = {l.fused,
                            l.vectors,
                            l.slabs,
                            l.chunks,
                            l.parts,
                            l.threads,
                            l.join,
                            l.share,
                            g.slab,
                            g.lanes,
                            g.chunk,
                            g.rounds,
                            g.steps,
                            g.resident,
                            g.segments,
                            g.pixels,
                            g.part,
                            g.channels,
                            static_cast<int64_t>(shared_bytes(l, p.streams))};
  std::copy(std::begin(fields), std::end(fields), out);
}
