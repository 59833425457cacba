// growing_sgd, grow_grads and hold: checks and registration; the arithmetic is in growing_sgd_kernel.cpp.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "growing_sgd.h"
#include "isa.h"
#include "tensor.h"

namespace fastprune {
namespace {

// Dimensions of a dense tensor from the slowest to the fastest, without those of size 1.
struct Order {
  int count = 0;
  int64_t dims[kMaxDims];
};

Order order_of(const Tensor& t) {
  Order order;
  const auto sizes = t.sizes(), strides = t.strides();
  STD_TORCH_CHECK(sizes.size() <= kMaxDims, "tensors must have at most 5 dimensions, got shape ", shape_string(t));
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1) order.dims[order.count++] = static_cast<int64_t>(d);
  if (t.is_contiguous()) return order;
  for (int i = 1; i < order.count; ++i)  // gcc 12 warns about std::sort of so few
    for (int j = i; j > 0 && strides[order.dims[j]] > strides[order.dims[j - 1]]; --j)
      std::swap(order.dims[j], order.dims[j - 1]);
  int64_t expected = 1;
  for (int i = order.count; i-- > 0; expected *= sizes[order.dims[i]])
    STD_TORCH_CHECK(strides[order.dims[i]] == expected, "tensors must be dense, got shape ", shape_string(t),
                    " with strides ", strides_string(t));
  return order;
}

// `t` along the memory of `like`: see SpreadOut.
SpreadOut spread_out(const Tensor& t, const Tensor& like, const Order& order, ScalarType dtype) {
  FP_CHECK_CPU(t);
  const auto sizes = t.sizes(), strides = t.strides(), whole = like.sizes();
  bool fits = sizes.size() == whole.size() && t.scalar_type() == dtype;
  for (size_t d = 0; fits && d < sizes.size(); ++d) fits = sizes[d] == 1 || sizes[d] == whole[d];
  STD_TORCH_CHECK(fits, "expected ", torch::headeronly::toString(dtype), " that broadcasts to ", shape_string(like),
                  ", got ", shape_string(t), " ", torch::headeronly::toString(t.scalar_type()));
  SpreadOut out = {t.data_ptr(), 1, {1}, {0}};
  for (int i = 0; i < order.count; ++i) {
    const size_t d = static_cast<size_t>(order.dims[i]);
    const int64_t size = whole[d], stride = sizes[d] == 1 ? 0 : strides[d];
    if (i == 0)
      out.size[0] = size, out.stride[0] = stride;
    else if (out.stride[out.dims - 1] == size * stride)
      out.size[out.dims - 1] *= size, out.stride[out.dims - 1] = stride;
    else
      out.size[out.dims] = size, out.stride[out.dims++] = stride;
  }
  return out;
}

SgdType type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return SgdType::kFloat;
    case ScalarType::BFloat16:
      return SgdType::kBFloat16;
    case ScalarType::Double:
      return SgdType::kDouble;
    default:
      STD_TORCH_CHECK(false, "tensors must be float32, bfloat16 or float64, got ",
                      torch::headeronly::toString(t.scalar_type()));
  }
}

void run(std::vector<SgdTensor>& tensors, SgdStep step) {
  static void (*const kernels[kIsaCount])(const SgdStep&) = {
      &base::growing_sgd,
#if defined(__x86_64__)
      &avx2::growing_sgd,
      &avx512::growing_sgd,
      &avx512_bf16::growing_sgd,
#endif
  };
  tensors.erase(std::remove_if(tensors.begin(), tensors.end(), [](const SgdTensor& t) { return t.size == 0; }),
                tensors.end());
  step.tensors = tensors.data();
  step.count = static_cast<int64_t>(tensors.size());
  step.parallel_for = run_parallel;
  kernels[cpu_isa()](step);
}

double value(const std::optional<Tensor>& t) {
  FP_CHECK_CPU(*t);
  STD_TORCH_CHECK(t->numel() == 1, "expected a scalar, got shape ", shape_string(*t));
  if (t->scalar_type() == ScalarType::Double) return *static_cast<const double*>(t->data_ptr());
  FP_CHECK_DTYPE(*t, ScalarType::Float, "float32 or float64");
  return static_cast<double>(*static_cast<const float*>(t->data_ptr()));
}

// t, which must be like `param` in memory.
void* data_of(const Tensor& t, const Tensor& param, ScalarType dtype) {
  const auto sizes = t.sizes(), strides = t.strides();  // four calls of the shim, where a look at each is thirty
  const auto same = [](const auto& a, const auto& b) { return std::equal(a.begin(), a.end(), b.begin(), b.end()); };
  if (!t.is_cpu() || t.scalar_type() != dtype || !same(sizes, param.sizes()) || !same(strides, param.strides()))
    FP_CHECK_LIKE(t, param);
  return t.data_ptr();
}

// Grads and momenta may be empty.
std::vector<SgdTensor> describe(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                                const std::vector<Tensor>& momenta) {
  STD_TORCH_CHECK(!params.empty(), "expected at least one tensor, got none");
  STD_TORCH_CHECK(
      (grads.empty() || grads.size() == params.size()) && (momenta.empty() || momenta.size() == params.size()),
      "expected a gradient and a buffer for each of ", params.size(), " params, got ", grads.size(), " and ",
      momenta.size());
  std::vector<SgdTensor> tensors(params.size());
  const ScalarType dtype = params[0].scalar_type();
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& param = params[i];
    FP_CHECK_CPU(param);
    FP_CHECK_DTYPE(param, dtype, "of one dtype");
    if (param.dim() > kMaxDims || !param.is_contiguous()) order_of(param);  // checks it
    tensors[i].param = param.data_ptr();
    tensors[i].size = param.numel();
    if (!grads.empty()) tensors[i].grad = data_of(grads[i], param, dtype);
    if (!momenta.empty()) tensors[i].momentum = data_of(momenta[i], param, dtype);
  }
  return tensors;
}

void add(std::vector<SgdTensor>& tensors, const std::vector<Tensor>& params, const Tensor& t, int64_t at,
         SpreadOut SgdTensor::* part) {
  STD_TORCH_CHECK(at >= 0 && at < static_cast<int64_t>(tensors.size()), "position ", at, " is not one of ",
                  tensors.size(), " params");
  const Tensor& param = params[static_cast<size_t>(at)];
  const ScalarType dtype = part == &SgdTensor::keep                    ? ScalarType::Bool
                           : param.scalar_type() == ScalarType::Double ? ScalarType::Double
                                                                       : ScalarType::Float;
  tensors[static_cast<size_t>(at)].*part = spread_out(t, param, order_of(param), dtype);
}

void growing_sgd(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                 const std::vector<Tensor>& momenta, const std::vector<Tensor>& reg, const std::vector<int64_t>& reg_at,
                 const std::vector<Tensor>& keep, const std::vector<int64_t>& keep_at,
                 const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                 const std::optional<Tensor>& rate, double lr, double momentum, double dampening, double weight_decay,
                 bool nesterov, bool maximize, bool first) {
  STD_TORCH_CHECK(!grads.empty() && momenta.empty() == (momentum == 0) && reg.size() == reg_at.size() &&
                      keep.size() == keep_at.size(),
                  "expected gradients, buffers with a momentum and only then, and a position for each reg and keep");
  std::vector<SgdTensor> tensors = describe(params, grads, momenta);
  for (size_t i = 0; i < reg.size(); ++i) add(tensors, params, reg[i], reg_at[i], &SgdTensor::reg);
  for (size_t i = 0; i < keep.size(); ++i) add(tensors, params, keep[i], keep_at[i], &SgdTensor::keep);
  if (found_inf && value(found_inf) != 0) return;
  const double unscale = grad_scale ? 1 / value(grad_scale) : 1;
  if (rate) lr = value(rate);
  run(tensors, {nullptr, 0, SgdWork::kStep, type_of(params[0]), -lr, momentum, 1 - dampening, weight_decay, unscale,
                nesterov, maximize, first, nullptr});
}

SgdStep only(SgdWork work, const Tensor& like) {
  return {nullptr, 0, work, type_of(like), 0, 0, 0, 0, 1, false, false, false, nullptr};
}

void grow_grads(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& reg) {
  STD_TORCH_CHECK(!grads.empty() && reg.size() == params.size(), "expected a gradient and a reg for each of ",
                  params.size(), " params, got ", grads.size(), " and ", reg.size());
  std::vector<SgdTensor> tensors = describe(params, grads, {});
  for (size_t i = 0; i < reg.size(); ++i) add(tensors, params, reg[i], static_cast<int64_t>(i), &SgdTensor::reg);
  run(tensors, only(SgdWork::kGrow, params[0]));
}

void hold(const std::vector<Tensor>& held, const std::vector<Tensor>& keep) {
  STD_TORCH_CHECK(keep.size() == held.size(), "expected a mask for each of ", held.size(), " tensors, got ",
                  keep.size());
  std::vector<SgdTensor> tensors = describe(held, {}, {});
  for (size_t i = 0; i < keep.size(); ++i) add(tensors, held, keep[i], static_cast<int64_t>(i), &SgdTensor::keep);
  run(tensors, only(SgdWork::kHold, held[0]));
}

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("growing_sgd.cpp", TORCH_BOX(&growing_sgd));
  m.impl("grow_grads.cpp", TORCH_BOX(&grow_grads));
  m.impl("hold.cpp", TORCH_BOX(&hold));
}

}  // namespace
}  // namespace fastprune
