// filter_norm and weight_taylor: checks, outputs and registration; the arithmetic is in filter_sums_kernel.cpp.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <string>
#include <vector>

#include "filter_sums.h"
#include "isa.h"
#include "tensor.h"

namespace fastprune {
namespace {

FilterWeight describe(const Tensor& w, const Tensor& first, int64_t dim) {
  FP_CHECK_CPU(w);
  STD_TORCH_CHECK(w.dim() >= 2 && w.dim() <= 5 && w.scalar_type() == first.scalar_type(),
                  "weights must have 2 to 5 dimensions and one dtype, got ", shape_string(w), " ",
                  torch::headeronly::toString(w.scalar_type()));
  const bool nchw = w.is_contiguous();
  STD_TORCH_CHECK(nchw || has_channels_last_rows(w),
                  "weights must be contiguous or channels_last without gaps, got shape ", shape_string(w),
                  " with strides ", strides_string(w));
  int64_t pixels = 1;
  for (int64_t d = 2; d < w.dim(); ++d) pixels *= w.size(d);
  if (dim == 0) return {w.data_ptr(), nullptr, 1, w.size(0), w.size(1) * pixels, nullptr};
  if (nchw) return {w.data_ptr(), nullptr, w.size(0), w.size(1), pixels, nullptr};
  return {w.data_ptr(), nullptr, w.size(0) * pixels, w.size(1), 1, nullptr};
}

FilterType type_of(const Tensor& w) {
  switch (w.scalar_type()) {
    case ScalarType::Float:
      return FilterType::kFloat;
    case ScalarType::BFloat16:
      return FilterType::kBFloat16;
    case ScalarType::Double:
      return FilterType::kDouble;
    default:
      STD_TORCH_CHECK(false, "weights must be float32, bfloat16 or float64, got ",
                      torch::headeronly::toString(w.scalar_type()));
  }
}

Tensor run(std::vector<FilterWeight>& described, FilterTerm term, FilterType type, bool root) {
  static void (*const kernels[kIsaCount])(const FilterSums&) = {
      &base::filter_sums,
#if defined(__x86_64__)
      &avx2::filter_sums,
      &avx512::filter_sums,
      &avx512_bf16::filter_sums,
#endif
  };
  int64_t total = 0;
  for (const FilterWeight& w : described) total += w.channels;
  const bool wide = type == FilterType::kDouble;
  const Tensor out = new_tensor({total}, wide ? ScalarType::Double : ScalarType::Float);
  char* next = static_cast<char*>(out.data_ptr());
  std::vector<FilterWeight> work;
  for (FilterWeight& w : described) {
    const size_t bytes = static_cast<size_t>(w.channels) * (wide ? sizeof(double) : sizeof(float));
    w.out = next;
    next += bytes;
    if (w.outer * w.inner > 0)
      work.push_back(w);
    else if (bytes > 0)
      std::memset(w.out, 0, bytes);  // sums over nothing
  }
  kernels[cpu_isa()]({work.data(), static_cast<int64_t>(work.size()), term, type, root, run_parallel});
  return out;
}

Tensor filter_norm(const std::vector<Tensor>& weights, const std::string& kind, int64_t dim) {
  STD_TORCH_CHECK(!weights.empty(), "expected at least one weight, got none");
  STD_TORCH_CHECK(dim == 0 || dim == 1, "dim must be 0 or 1, got ", dim);
  const bool l1 = kind == "l1", sum = kind == "sum", l2 = kind == "l2";
  STD_TORCH_CHECK(l1 || sum || l2 || kind == "sum_squares", "kind must be 'l1', 'l2', 'sum_squares' or 'sum', got '",
                  kind, "'");
  std::vector<FilterWeight> described;
  for (const Tensor& w : weights) described.push_back(describe(w, weights[0], dim));
  return run(described,
             l1    ? FilterTerm::kAbs
             : sum ? FilterTerm::kValue
                   : FilterTerm::kSquare,
             type_of(weights[0]), l2);
}

Tensor weight_taylor(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads) {
  STD_TORCH_CHECK(!weights.empty() && weights.size() == grads.size(),
                  "expected at least one weight and a gradient for each, got ", weights.size(), " and ", grads.size());
  std::vector<FilterWeight> described;
  for (size_t i = 0; i < weights.size(); ++i) {
    FP_CHECK_LIKE(grads[i], weights[i]);
    described.push_back(describe(weights[i], weights[0], 0));
    described.back().grad = grads[i].data_ptr();
  }
  return run(described, FilterTerm::kProductSquare, type_of(weights[0]), false);
}

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("filter_norm.cpp", TORCH_BOX(&filter_norm));
  m.impl("weight_taylor.cpp", TORCH_BOX(&weight_taylor));
}

}  // namespace
}  // namespace fastprune
