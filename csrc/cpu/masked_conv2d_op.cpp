// Checks, outputs and registration of the gather and scatter of masked_conv2d; PyTorch's convolution runs in between.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "isa.h"
#include "masked_conv2d.h"
#include "tensor.h"

namespace fastprune {
namespace {

using OptionalTensor = std::optional<Tensor>;

const MaskedConv2dKernels& kernels() {
  static const MaskedConv2dKernels* const tables[kIsaCount] = {
      &base::masked_conv2d,
#if defined(__x86_64__)
      &avx2::masked_conv2d,
      &avx512::masked_conv2d,
      &avx512_bf16::masked_conv2d,
#endif
  };
  return *tables[cpu_isa()];
}

bool is_channels_last(const Tensor& t) {
  const int64_t C = t.size(1), H = t.size(2), W = t.size(3);
  const int64_t dense[4] = {H * W * C, 1, W * C, C};
  for (int d = 0; d < 4; ++d)
    if (t.size(d) != 1 && t.stride(d) != dense[d]) return false;
  return true;
}

// Channels of one group must ascend: the scatter fills what lies between them.
const int64_t* indices(const OptionalTensor& t, int64_t groups, int64_t size, const char* name) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->is_cpu() && t->dim() == 1 && t->is_contiguous() && t->scalar_type() == ScalarType::Long &&
                      t->numel() % groups == 0,
                  name, " must be int64, contiguous, on the CPU, and a multiple of groups=", groups, "; got ",
                  shape_string(*t), " ", torch::headeronly::toString(t->scalar_type()));
  const int64_t* index = static_cast<const int64_t*>(t->data_ptr());
  const int64_t width = t->numel() / groups;
  for (int64_t i = 0; i < t->numel(); ++i) {
    const int64_t least = i % width == 0 ? 0 : index[i - 1] + 1;
    STD_TORCH_CHECK(index[i] >= least && index[i] < size, name, " must ascend within [0, ", size, "), got ", index[i],
                    " at ", i);
  }
  return index;
}

Tensor new_ordered(const int64_t (&n)[4], bool channels_last, ScalarType dtype) {
  const int64_t strides[4] = {n[1] * n[2] * n[3], channels_last ? 1 : n[2] * n[3], n[3] * (channels_last ? n[1] : 1),
                              channels_last ? n[1] : 1};
  return new_strided(4, n, strides, dtype);
}

int width_of(const Tensor& t) {
  FP_CHECK_CPU(t);
  FP_CHECK_DIM(t, 4);
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "expected float32 or bfloat16, got ",
                  torch::headeronly::toString(dtype));
  return dtype == ScalarType::Float;
}

std::vector<Chunk> chunks_of(const MaskedCopy& a) {
  std::vector<Chunk> chunks;
  if (!a.column_of || !a.channels_last) return chunks;
  for (int64_t g = 0; g < a.groups; ++g) {
    const int64_t* const column_of = a.column_of + g * a.live_columns;
    int64_t k = 0;
    for (int64_t start = 0; start < a.columns; start += 16) {
      Chunk chunk = {static_cast<int32_t>(k), 0};
      for (; k < a.live_columns && column_of[k] < start + 16; ++k) chunk.live |= 1u << (column_of[k] - start);
      chunks.push_back(chunk);
    }
  }
  return chunks;
}

Tensor gather(const Tensor& t, const OptionalTensor& rows, const OptionalTensor& columns, int64_t groups) {
  const int wide = width_of(t);
  MaskedCopy a;
  a.channels_last = !t.is_contiguous();
  STD_TORCH_CHECK(!a.channels_last || is_channels_last(t), "t must be NCHW or channels_last without gaps, got shape ",
                  shape_string(t), " with strides ", strides_string(t));
  STD_TORCH_CHECK(groups > 0, "groups must be positive, got ", groups);
  a.rows = t.size(0);
  a.columns = t.size(1);
  a.pixels = t.size(2) * t.size(3);
  a.groups = groups;
  a.row_of = indices(rows, 1, a.rows, "rows");
  a.column_of = indices(columns, groups, a.columns, "columns");
  a.live_rows = rows ? rows->numel() : a.rows;
  a.live_columns = columns ? columns->numel() / groups : a.columns;
  const Tensor out = new_ordered({a.live_rows, a.live_columns, t.size(2), t.size(3)}, a.channels_last, t.scalar_type());
  a.live_row_of = nullptr;
  a.from = t.data_ptr();
  a.to = out.data_ptr();
  a.parallel_for = run_parallel;
  const std::vector<Chunk> chunks = chunks_of(a);
  a.chunks = chunks.data();
  if (out.numel() > 0) kernels().gather[wide](a);
  return out;
}

Tensor scatter(const Tensor& t, const OptionalTensor& rows, const OptionalTensor& columns, int64_t groups,
               int64_t row_count, int64_t column_count, bool channels_last) {
  const int wide = width_of(t);
  STD_TORCH_CHECK(channels_last ? is_channels_last(t) : t.is_contiguous(), "t must be ",
                  channels_last ? "channels_last" : "contiguous", ", got shape ", shape_string(t), " with strides ",
                  strides_string(t));
  MaskedCopy a;
  a.channels_last = channels_last;
  a.rows = row_count;
  a.columns = column_count;
  a.pixels = t.size(2) * t.size(3);
  a.live_rows = t.size(0);
  a.live_columns = t.size(1);
  a.groups = groups;
  const int64_t* row_of = indices(rows, 1, a.rows, "rows");
  a.column_of = indices(columns, groups, a.columns, "columns");
  STD_TORCH_CHECK(groups > 0 && a.live_rows == (rows ? rows->numel() : row_count) &&
                      a.live_columns == (columns ? columns->numel() / groups : column_count),
                  "t must have one row per entry of rows and one column per entry of columns, got ", shape_string(t));
  std::vector<int64_t> live_row_of;
  if (row_of) {
    live_row_of.assign(static_cast<size_t>(a.rows), -1);
    for (int64_t r = 0; r < a.live_rows; ++r) live_row_of[static_cast<size_t>(row_of[r])] = r;
  }
  a.row_of = nullptr;
  a.live_row_of = row_of ? live_row_of.data() : nullptr;
  const Tensor out = new_ordered({row_count, column_count, t.size(2), t.size(3)}, channels_last, t.scalar_type());
  a.from = t.data_ptr();
  a.to = out.data_ptr();
  a.parallel_for = run_parallel;
  const std::vector<Chunk> chunks = chunks_of(a);
  a.chunks = chunks.data();
  if (out.numel() > 0) kernels().scatter[wide](a);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("masked_conv2d_gather.cpp", TORCH_BOX(&gather));
  m.impl("masked_conv2d_scatter.cpp", TORCH_BOX(&scatter));
}

}  // namespace
}  // namespace fastprune
