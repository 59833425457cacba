// Sums over the batch of the per-sample gate gradients of a model.
//
// Scalar double arithmetic on purpose: (128, 3000) slots of ResNet-56 take 0.5 ms of a step of half a second.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "tensor.h"

namespace fastprune {
namespace {

constexpr int64_t kBlock = 256;  // gates whose sums stay in the first-level cache

struct Gates {
  int64_t samples, stride, count;
  const int64_t *columns, *offsets;
  double *sum, *squares, *magnitudes;  // (count,) each
};

template <class T>
void add_up(const Gates& g, T* slots, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) g.sum[k] = g.squares[k] = g.magnitudes[k] = 0;
  for (int64_t n = 0; n < g.samples; ++n) {
    T* row = slots + n * g.stride;
    for (int64_t k = begin; k < end; ++k) {
      double s = 0;
      for (int64_t j = g.offsets[k]; j < g.offsets[k + 1]; ++j) {
        s += static_cast<double>(row[g.columns[j]]);
        row[g.columns[j]] = 0;
      }
      g.sum[k] += s;
      g.squares[k] += s * s;
      g.magnitudes[k] += std::fabs(s);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> gate_sums(const Tensor& slots, const Tensor& columns, const Tensor& offsets) {
  FP_CHECK_CPU(slots);
  FP_CHECK_DIM(slots, 2);
  const bool is_double = slots.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(is_double || slots.scalar_type() == ScalarType::Float, "slots must be float32 or float64, got ",
                  torch::headeronly::toString(slots.scalar_type()));
  STD_TORCH_CHECK(slots.stride(1) == 1, "slots must have inner stride 1, got strides ", strides_string(slots));
  FP_CHECK_CPU(columns);
  FP_CHECK_CPU(offsets);
  FP_CHECK_DTYPE(columns, ScalarType::Long, "int64");
  FP_CHECK_DTYPE(offsets, ScalarType::Long, "int64");
  FP_CHECK_SHAPE(columns, columns.dim() == 1, "(J,)");
  FP_CHECK_SHAPE(offsets, offsets.dim() == 1 && offsets.numel() > 0, "(K + 1,)");
  Gates g{slots.size(0),
          slots.stride(0),
          offsets.numel() - 1,
          static_cast<const int64_t*>(columns.data_ptr()),
          static_cast<const int64_t*>(offsets.data_ptr()),
          nullptr,
          nullptr,
          nullptr};
  // Indices are data: a wrong one must not write elsewhere.
  STD_TORCH_CHECK(
      g.offsets[0] == 0 && g.offsets[g.count] == columns.numel() && std::is_sorted(g.offsets, g.offsets + g.count + 1),
      "offsets must ascend from 0 to ", columns.numel(), ", the number of columns");
  for (int64_t j = 0; j < columns.numel(); ++j)
    STD_TORCH_CHECK(g.columns[j] >= 0 && g.columns[j] < slots.size(1), "columns must be from 0 to ", slots.size(1) - 1,
                    ", got ", g.columns[j]);
  const Tensor sum = new_tensor({g.count}, ScalarType::Double), squares = new_tensor({g.count}, ScalarType::Double);
  const Tensor magnitudes = new_tensor({g.count}, ScalarType::Double);
  g.sum = static_cast<double*>(sum.data_ptr());
  g.squares = static_cast<double*>(squares.data_ptr());
  g.magnitudes = static_cast<double*>(magnitudes.data_ptr());
  void* data = slots.data_ptr();
  parallel_for(run_parallel, (g.count + kBlock - 1) / kBlock, [&g, data, is_double](int64_t begin, int64_t end) {
    const int64_t first = begin * kBlock, last = std::min(end * kBlock, g.count);
    if (is_double)
      add_up(g, static_cast<double*>(data), first, last);
    else
      add_up(g, static_cast<float*>(data), first, last);
  });
  return {sum, squares, magnitudes};
}

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) { m.impl("gate_sums.cpp", TORCH_BOX(&gate_sums)); }

}  // namespace
}  // namespace fastprune
