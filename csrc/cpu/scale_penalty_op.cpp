// Sparsity penalty over the scales of all norms of a model: value and gradient in one pass.
//
// Scalar double arithmetic on purpose: a network has some thousand scales, about 0.1 ms, and the value then agrees with
// float64 to its last float32 bit.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "tensor.h"

namespace fastprune {
namespace {

struct Term {
  double value, grad;
};

// s (1 - ln s) with s = sigmoid(w).  ln s comes from w, not from s, which underflows long before its logarithm.
Term rni(double w) {
  const double e = std::exp(-std::fabs(w));  // in (0, 1]: no overflow
  const double log_s = std::fmin(w, 0) - std::log1p(e);
  const double s = (w < 0 ? e : 1) / (1 + e), one_minus_s = (w < 0 ? 1 : e) / (1 + e);
  if (std::isnan(w)) return {w, w};
  if (s == 0) return {0, 0};  // w = -inf: 0 * ln 0 is 0 here
  return {s * (1 - log_s), -s * one_minus_s * log_s};
}

Term l1(double w) { return {std::fabs(w), std::isnan(w) ? w : static_cast<double>((w > 0) - (w < 0))}; }

template <class T, class Acc>
double add_up(const Tensor& scale, bool is_rni, double shift, Acc* grad) {
  const T* w = static_cast<const T*>(scale.data_ptr());
  double sum = 0;
  for (int64_t c = 0, size = scale.numel(); c < size; ++c) {
    const Term term = is_rni ? rni(static_cast<double>(w[c]) + shift) : l1(static_cast<double>(w[c]));
    sum += term.value;
    grad[c] = static_cast<Acc>(term.grad);
  }
  return sum;
}

std::tuple<Tensor, Tensor> scale_penalty(const std::vector<Tensor>& scales, const std::string& kind, double shift) {
  STD_TORCH_CHECK(kind == "rni" || kind == "l1", "kind must be 'rni' or 'l1', got '", kind, "'");
  STD_TORCH_CHECK(!scales.empty(), "expected at least one tensor of scales, got none");
  const ScalarType dtype = scales[0].scalar_type();
  int64_t total = 0;
  for (const Tensor& scale : scales) {
    FP_CHECK_CPU(scale);
    STD_TORCH_CHECK(scale.dim() == 1 && scale.is_contiguous() && scale.scalar_type() == dtype,
                    "scales must be (C,), contiguous and of one dtype; got ", shape_string(scale), " ",
                    torch::headeronly::toString(scale.scalar_type()));
    total += scale.numel();
  }
  const bool is_double = dtype == ScalarType::Double, is_rni = kind == "rni";
  const ScalarType acc = is_double ? ScalarType::Double : ScalarType::Float;
  const Tensor value = new_strided(0, nullptr, nullptr, acc), grad = new_tensor({total}, acc);
  double sum = 0;
  int64_t begin = 0;
  for (const Tensor& scale : scales) {
    double* wide = is_double ? static_cast<double*>(grad.data_ptr()) + begin : nullptr;
    float* narrow = is_double ? nullptr : static_cast<float*>(grad.data_ptr()) + begin;
    switch (dtype) {
      case ScalarType::Double:
        sum += add_up<double>(scale, is_rni, shift, wide);
        break;
      case ScalarType::Float:
        sum += add_up<float>(scale, is_rni, shift, narrow);
        break;
      case ScalarType::BFloat16:
        sum += add_up<torch::headeronly::BFloat16>(scale, is_rni, shift, narrow);
        break;
      case ScalarType::Half:
        sum += add_up<torch::headeronly::Half>(scale, is_rni, shift, narrow);
        break;
      default:
        STD_TORCH_CHECK(false, "scales must be floating point, got ", torch::headeronly::toString(dtype));
    }
    begin += scale.numel();
  }
  if (is_double)
    *static_cast<double*>(value.data_ptr()) = sum;
  else
    *static_cast<float*>(value.data_ptr()) = static_cast<float>(sum);
  return {value, grad};
}

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) { m.impl("scale_penalty.cpp", TORCH_BOX(&scale_penalty)); }

}  // namespace
}  // namespace fastprune
