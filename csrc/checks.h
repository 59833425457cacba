// Argument checks of the C++ ops: the argument's name, what was expected, what came.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>

namespace fastprune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_string(const Tensor& t) {
  std::string s = "(";
  for (int64_t d = 0; d < t.dim(); ++d) s += (d ? ", " : "") + std::to_string(t.size(d));
  return s + ")";
}

inline std::string strides_string(const Tensor& t) {
  std::string s = "(";
  for (int64_t d = 0; d < t.dim(); ++d) s += (d ? ", " : "") + std::to_string(t.stride(d));
  return s + ")";
}

// Of two tensors of one shape, as far as it matters: strides of sizes 0 and 1 are never used.
inline bool same_strides(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0) return true;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.stride(d) != b.stride(d) && a.size(d) > 1) return false;
  return true;
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

// channels_last or channels_last_3d without gaps.
inline bool has_channels_last_rows(const Tensor& w) {
  if (w.dim() < 4) return false;
  int64_t dense = w.size(1);
  bool fits = w.size(1) == 1 || w.stride(1) == 1;
  const auto next = [&](int64_t d) {
    fits = fits && (w.size(d) == 1 || w.stride(d) == dense);
    dense *= w.size(d);
  };
  for (int64_t d = w.dim() - 1; d > 1; --d) next(d);
  next(0);
  return fits;
}

}  // namespace fastprune

#define FP_CHECK_DIM(t, n) \
  STD_TORCH_CHECK((t).dim() == (n), #t " must have " #n " dimensions, got shape ", ::fastprune::shape_string(t))

#define FP_CHECK_CPU(t) STD_TORCH_CHECK((t).is_cpu(), #t " must be on the CPU")

#define FP_CHECK_DTYPE(t, dtype, words)                                        \
  STD_TORCH_CHECK((t).scalar_type() == (dtype), #t " must be " words ", got ", \
                  torch::headeronly::toString((t).scalar_type()))

// t has the device, shape, dtype and strides of like, so that one index serves both.
#define FP_CHECK_LIKE(t, like)                                                                                         \
  do {                                                                                                                 \
    STD_TORCH_CHECK(::fastprune::same_device(t, like), #t " must be on the device of " #like);                         \
    STD_TORCH_CHECK(::fastprune::same_shape(t, like) && ::fastprune::same_strides(t, like) &&                          \
                        (t).scalar_type() == (like).scalar_type(),                                                     \
                    #t " must have the shape, strides and dtype of " #like ", ", ::fastprune::shape_string(like), " ", \
                    ::fastprune::strides_string(like), " ", torch::headeronly::toString((like).scalar_type()),         \
                    ", got ", ::fastprune::shape_string(t), " ", ::fastprune::strides_string(t), " ",                  \
                    torch::headeronly::toString((t).scalar_type()));                                                   \
  } while (0)

// t is a contiguous tensor with these sizes.
#define FP_CHECK_SHAPE(t, expected, words)                                                                      \
  STD_TORCH_CHECK((expected) && (t).is_contiguous(), #t " must be contiguous with shape " words ", got shape ", \
                  ::fastprune::shape_string(t), " with strides ", ::fastprune::strides_string(t))
