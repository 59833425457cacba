// gram_penalty and orthogonality_penalty: what each asks of which Gram matrix; the arithmetic is in
// gram_penalty_kernel.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "gram_penalty.h"
#include "isa.h"
#include "tensor.h"

namespace fastprune {
namespace {

using Penalty = std::tuple<Tensor, std::vector<Tensor>>;

// A term of the value: factor * (sum of weight (G - target)^2 + offset), and what the kernel needs to know of it.
struct Term {
  std::vector<const void*> rows;
  std::vector<void*> grads;
  int64_t first, width, grad_rows;  // width: of the gradients, and of the rows where depth is 0
  double weight[3], target[3], factor, offset;
  std::vector<const void*> right = {};  // where G = A B^T
  int64_t depth = 0;
};

int64_t width_of(const Tensor& w) {
  int64_t width = 1;
  for (int64_t d = 1; d < w.dim(); ++d) width *= w.size(d);
  return width;
}

// Weights as (N, K) matrices, in float or double; bfloat16 is widened into buffers.
class Matrices {
 public:
  explicit Matrices(const std::vector<Tensor>& weights) {
    STD_TORCH_CHECK(!weights.empty(), "expected at least one weight, got none");
    const ScalarType dtype = weights[0].scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16,
                    "weights must be float32, bfloat16 or float64, got ", torch::headeronly::toString(dtype));
    is_double = dtype == ScalarType::Double;
    for (const Tensor& w : weights) {
      FP_CHECK_CPU(w);
      STD_TORCH_CHECK(w.dim() >= 2 && w.dim() <= 5 && w.scalar_type() == dtype,
                      "weights must have 2 to 5 dimensions and one dtype, got ", shape_string(w), " ",
                      torch::headeronly::toString(w.scalar_type()));
      STD_TORCH_CHECK(w.is_contiguous() || has_channels_last_rows(w),
                      "weights must be contiguous or channels_last without gaps, got shape ", shape_string(w),
                      " with strides ", strides_string(w));
      data.push_back(static_cast<const char*>(w.data_ptr()));
      if (dtype == ScalarType::BFloat16) {
        const auto* from = static_cast<const torch::headeronly::BFloat16*>(w.data_ptr());
        buffers.push_back(new_tensor({w.numel()}, ScalarType::Float));
        std::copy(from, from + w.numel(), static_cast<float*>(buffers.back().data_ptr()));
        data.back() = static_cast<const char*>(buffers.back().data_ptr());
      }
    }
  }

  ScalarType acc() const { return is_double ? ScalarType::Double : ScalarType::Float; }
  int64_t itemsize() const { return is_double ? 8 : 4; }

  bool is_double;
  std::vector<const char*> data;

 private:
  std::vector<Tensor> buffers;
};

void add_blocks(std::vector<GramBlock>& blocks, int64_t layer, const GramLayer& a) {
  const int64_t starts[2] = {0, a.first}, ends[2] = {a.first, a.n};
  for (int gi = 0; gi < 2; ++gi)
    for (int gj = 0; gj <= gi; ++gj) {
      if (a.weight[gi + gj] == 0) continue;
      for (int64_t i = starts[gi]; i < ends[gi]; i += kGramBlock)
        for (int64_t j = starts[gj]; j < (gi == gj ? i + 1 : ends[gj]); j += kGramBlock)
          blocks.push_back({layer, i, std::min(kGramBlock, ends[gi] - i), j, std::min(kGramBlock, ends[gj] - j)});
    }
}

// Values of the terms, and gradients where they belong; `scale` times the value's gradient.
std::vector<double> evaluate(const std::vector<Term>& terms, const std::vector<double>& scales, bool is_double) {
  using Kernel = void (*)(const GramCall&);
  static const Kernel kernels[kIsaCount][2] = {
      {&base::gram_blocks, &base::gram_strips},
#if defined(__x86_64__)
      {&avx2::gram_blocks, &avx2::gram_strips},
      {&avx512::gram_blocks, &avx512::gram_strips},
      {&avx512_bf16::gram_blocks, &avx512_bf16::gram_strips},
#endif
  };
  const ScalarType acc = is_double ? ScalarType::Double : ScalarType::Float;
  const int64_t itemsize = is_double ? 8 : 4;
  std::vector<GramLayer> layers;
  std::vector<GramBlock> blocks;
  std::vector<GramStrip> strips;
  int64_t matrices = 0, most = 1;
  for (const Term& t : terms) {
    const int64_t n = static_cast<int64_t>(t.rows.size()), index = static_cast<int64_t>(layers.size());
    GramLayer a{};
    a.rows = t.rows.data();
    a.right = t.right.empty() ? t.rows.data() : t.right.data();
    a.grads = t.grads.data();
    a.n = n, a.first = t.first, a.width = t.width, a.depth = t.depth ? t.depth : t.width, a.grad_rows = t.grad_rows;
    std::copy(t.weight, t.weight + 3, a.weight);
    std::copy(t.target, t.target + 3, a.target);
    a.factor = 4 * t.factor * scales[static_cast<size_t>(index)];
    layers.push_back(a);
    const size_t before = blocks.size();
    if (t.width > 0) add_blocks(blocks, index, a);
    if (blocks.size() == before) {  // nothing to do: no gradient either
      for (int64_t i = 0; i < t.grad_rows; ++i)
        std::memset(t.grads[static_cast<size_t>(i)], 0, static_cast<size_t>(t.width * itemsize));
      continue;
    }
    matrices += gram_matrix_size(a);
    most = std::max(most, n);
    for (int64_t k = 0; k < t.width; k += kGramStrip) strips.push_back({index, k, std::min(kGramStrip, t.width - k)});
  }
  std::vector<double> sums(blocks.size()), values;
  const int64_t tasks = static_cast<int64_t>(std::max(blocks.size(), strips.size()));
  const int64_t workers = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  const int64_t size = most * kGramStrip;
  const Tensor scratch = new_tensor({matrices + workers * size}, acc);
  char* next = static_cast<char*>(scratch.data_ptr());
  const GramCall call{layers.data(), blocks.data(), static_cast<int64_t>(blocks.size()),
                      sums.data(),   strips.data(), static_cast<int64_t>(strips.size()),
                      next,          size,          workers,
                      is_double,     run_parallel};
  next += workers * size * itemsize;
  std::vector<char> busy(layers.size());
  for (const GramBlock& b : blocks) busy[static_cast<size_t>(b.layer)] = 1;
  for (size_t i = 0; i < layers.size(); ++i)
    if (busy[i]) layers[i].matrix = next, next += gram_matrix_size(layers[i]) * itemsize;
  const auto& kernel = kernels[cpu_isa()];
  if (tasks > 0) {
    kernel[0](call);
    kernel[1](call);
  }
  for (const Term& t : terms) values.push_back(t.offset);
  for (size_t i = 0; i < blocks.size(); ++i) values[static_cast<size_t>(blocks[i].layer)] += sums[i];
  for (size_t i = 0; i < terms.size(); ++i) values[i] *= terms[i].factor;
  return values;
}

std::vector<double> read_scale(const std::optional<Tensor>& scale, size_t count, ScalarType acc) {
  if (!scale) return std::vector<double>(count, 1.0);
  FP_CHECK_CPU(*scale);
  STD_TORCH_CHECK(scale->dim() == 1 && scale->numel() == static_cast<int64_t>(count) && scale->is_contiguous() &&
                      scale->scalar_type() == acc,
                  "scale must have one number per weight in the accumulation dtype, got ", shape_string(*scale), " ",
                  torch::headeronly::toString(scale->scalar_type()));
  std::vector<double> scales(count);
  for (size_t i = 0; i < count; ++i)
    scales[i] = acc == ScalarType::Double ? static_cast<const double*>(scale->data_ptr())[i]
                                          : static_cast<double>(static_cast<const float*>(scale->data_ptr())[i]);
  return scales;
}

Tensor total(const std::vector<double>& values, const std::vector<double>& scales, ScalarType acc) {
  const Tensor value = new_strided(0, nullptr, nullptr, acc);
  double sum = 0;
  for (size_t i = 0; i < values.size(); ++i) sum += values[i] * scales[i];
  if (acc == ScalarType::Double)
    *static_cast<double*>(value.data_ptr()) = sum;
  else
    *static_cast<float*>(value.data_ptr()) = static_cast<float>(sum);
  return value;
}

Penalty gram_penalty(const std::vector<Tensor>& weights, const std::optional<Tensor>& order,
                     const std::vector<int64_t>& cuts, double cut, double kept, const std::optional<Tensor>& scale) {
  const Matrices a(weights);
  STD_TORCH_CHECK(cuts.size() == weights.size(), "expected one count of cut channels per weight, got ", cuts.size(),
                  " for ", weights.size());
  const std::vector<double> scales = read_scale(scale, weights.size(), a.acc());
  const int32_t* next = nullptr;
  if (order) {
    FP_CHECK_CPU(*order);
    int64_t rows = 0;
    for (const Tensor& w : weights) rows += w.size(0);
    STD_TORCH_CHECK(order->scalar_type() == ScalarType::Int && order->is_contiguous() && order->numel() == rows,
                    "order must be int32, one for each of ", rows, " channels, got ", shape_string(*order), " ",
                    torch::headeronly::toString(order->scalar_type()));
    next = static_cast<const int32_t*>(order->data_ptr());
  }
  std::vector<Term> terms;
  std::vector<Tensor> grads;
  for (size_t l = 0; l < weights.size(); ++l) {
    const Tensor& w = weights[l];
    const int64_t n = w.size(0), width = width_of(w), squares = std::max<int64_t>(n * n, 1);
    STD_TORCH_CHECK(cuts[l] >= 0 && cuts[l] <= n, "expected from 0 to ", n, " cut channels, got ", cuts[l]);
    grads.push_back(new_strided(w.dim(), w.sizes().data(), w.strides().data(), a.acc()));
    terms.push_back({{}, {}, cuts[l], width, n, {cut, cut, kept}, {0, 0, 1}, 1.0 / static_cast<double>(squares), 0});
    Term& t = terms.back();
    char* grad = static_cast<char*>(grads.back().data_ptr());
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = next ? *next++ : i;
      STD_TORCH_CHECK(row >= 0 && row < n, "order must hold rows from 0 to ", n - 1, ", got ", row);
      t.rows.push_back(a.data[l] + row * width * a.itemsize());
      t.grads.push_back(grad + row * width * a.itemsize());
    }
    if (width == 0) t.offset = kept * static_cast<double>(n - cuts[l]);  // G = 0
  }
  const std::vector<double> values = evaluate(terms, scales, a.is_double);
  return {total(values, scales, a.acc()), grads};
}

template <class F>
void each_row(int64_t n, const F& f) {
  parallel_for(run_parallel, n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// One group of n rows, `stride` apart, whose gradients are of `width` elements.
template <class T>
Term of_all_rows(const T* rows, T* grads, int64_t n, int64_t stride, int64_t width) {
  Term t{{}, {}, n, width, n, {1, 1, 1}, {1, 1, 1}, 1, 0};
  for (int64_t i = 0; i < n; ++i) {
    t.rows.push_back(rows + i * stride);
    t.grads.push_back(grads + i * width);
  }
  return t;
}

// to[j * stride + i] = sign * from[i * columns + j]
template <class T>
void transpose(const T* from, T* to, int64_t rows, int64_t columns, int64_t stride, T sign = 1) {
  constexpr int64_t kSide = 16;
  each_row((columns + kSide - 1) / kSide, [&](int64_t block) {
    const int64_t begin = block * kSide, end = std::min(columns, begin + kSide);
    for (int64_t i = 0; i < rows; i += kSide)
      for (int64_t j = begin; j < end; ++j)
        for (int64_t r = i; r < std::min(rows, i + kSide); ++r) to[j * stride + r] = sign * from[r * columns + j];
  });
}

// Mean over K x K of (A^T A - I)^2, or of (A^T A - B^T B)^2.  For a wide A through the rows: A A^T has the same
// eigenvalues but K - N zeros; and G of the rows of A and B, blocks of both counted negative, has the sum wanted.
template <class T>
double columns(const T* a, const T* b, bool energy, T* grad, int64_t n, int64_t width, double scale) {
  constexpr bool kIsDouble = sizeof(T) == 8;
  const ScalarType acc = kIsDouble ? ScalarType::Double : ScalarType::Float;
  const double factor = 1.0 / static_cast<double>(std::max<int64_t>(width * width, 1));
  const auto evaluate_one = [&](Term& t) {
    t.factor = factor;
    if (energy) std::fill(t.target, t.target + 3, 0);
    std::vector<Term> terms = {std::move(t)};
    return evaluate(terms, {scale}, kIsDouble)[0];
  };
  if (width >= (energy ? 2 * n : n)) {
    Term t = of_all_rows(a, grad, n, width, width);
    if (!energy) t.offset = static_cast<double>(width - n);
    for (int64_t i = 0; energy && i < n; ++i) t.rows.push_back(b + i * width);
    t.weight[1] = energy ? -1 : 1;
    return evaluate_one(t);
  }
  const int64_t depth = energy ? 2 * n : n;
  const Tensor turned = new_tensor({(depth + (energy ? depth : 0) + n) * width}, acc);
  T* const left = static_cast<T*>(turned.data_ptr());  // [A^T B^T], then [A^T -B^T]
  T* const right = left + depth * width;
  T* const grads = right + (energy ? depth * width : 0);
  transpose(a, left, n, width, depth);
  Term t = of_all_rows(left, grads, width, depth, n);
  if (energy) {
    transpose(b, left + n, n, width, depth);
    transpose(a, right, n, width, depth);
    transpose(b, right + n, n, width, depth, T(-1));
    t.depth = depth;
    for (int64_t i = 0; i < width; ++i) t.right.push_back(right + i * depth);
  }
  const double value = evaluate_one(t);
  transpose(grads, grad, width, n, width);
  return value;
}

struct Kernel {  // of a convolution; rows are (channels, height, width), or (height, width, channels)
  int64_t channels, height, width;
  bool channels_last;
  int64_t at(int64_t c, int64_t y, int64_t x) const {
    return channels_last ? (y * width + x) * channels + c : (c * height + y) * width + x;
  }
};

// Sum of (conv2d(W, W) - T)^2, pixel by pixel of the output: there it is L R^T, R being the part of the kernel that
// the shifted kernel overlaps and L the part of the shifted one.  Pixels on opposite sides of the centre are
// transposes of each other.
template <class T>
double conv(const T* w, T* grad, int64_t n, const Kernel& kernel, int64_t stride, const int64_t* padding, bool norm,
            double scale) {
  const int64_t size = kernel.channels * kernel.height * kernel.width;
  const int64_t height = 2 * padding[0] / stride + 1, width = 2 * padding[1] / stride + 1;
  const bool mirrored = 2 * padding[0] % stride == 0 && 2 * padding[1] % stride == 0;
  const ScalarType acc = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  const Tensor buffer = new_tensor({4 * n * size}, acc);
  T* const parts[2] = {static_cast<T*>(buffer.data_ptr()), static_cast<T*>(buffer.data_ptr()) + n * size};
  std::fill(grad, grad + n * size, T(0));
  double value = 0;
  for (int64_t pixel = 0; pixel < height * width; ++pixel) {
    const int64_t py = pixel / width, px = pixel % width, opposite = height * width - 1 - pixel;
    const int64_t dy = py * stride - padding[0], dx = px * stride - padding[1];
    if (mirrored && opposite < pixel) break;
    const int64_t centre = height / 2 * width + width / 2;
    const bool self = dy == 0 && dx == 0, pair = mirrored && !self;
    const double target = pixel == centre, other = pair && opposite == centre;

    std::vector<int64_t> places[2];  // elements of L and of R
    for (int64_t c = 0; c < kernel.channels; ++c)
      for (int64_t y = std::max<int64_t>(0, -dy); y < std::min(kernel.height, kernel.height - dy); ++y)
        for (int64_t x = std::max<int64_t>(0, -dx); x < std::min(kernel.width, kernel.width - dx); ++x) {
          places[0].push_back(kernel.at(c, y + dy, x + dx));
          places[1].push_back(kernel.at(c, y, x));
        }
    const int64_t count = static_cast<int64_t>(places[0].size());
    const int sides = self ? 1 : 2;
    if (count == 0) {
      value += static_cast<double>(n) * (target + other);
      continue;
    }
    each_row(n, [&](int64_t i) {
      for (int side = 0; side < sides; ++side)
        for (int64_t k = 0; k < count; ++k)
          parts[side][i * count + k] = w[i * size + places[side][static_cast<size_t>(k)]];
    });
    T* const grads[2] = {parts[0] + 2 * n * size, parts[1] + 2 * n * size};
    std::vector<Term> terms = {of_all_rows(parts[0], grads[0], n, count, count)};
    Term& t = terms[0];
    if (self) {
      t.target[0] = target;
    } else {
      for (int64_t i = 0; i < n; ++i) {
        t.rows.push_back(parts[1] + i * count);
        t.grads.push_back(grads[1] + i * count);
      }
      t.grad_rows = 2 * n;
      t.weight[0] = t.weight[2] = 0;
      t.weight[1] = pair ? 1 : 0.5;
      t.target[1] = pair ? (target + other) / 2 : target;  // the mean of both, and what that leaves out
      t.offset = pair ? static_cast<double>(n) * (target - other) * (target - other) / 2 : 0;
    }
    value += evaluate(terms, {1.0}, sizeof(T) == 8)[0];
    each_row(n, [&](int64_t i) {
      for (int side = 0; side < sides; ++side)
        for (int64_t k = 0; k < count; ++k)
          grad[i * size + places[side][static_cast<size_t>(k)]] += grads[side][i * count + k];
    });
  }
  if (norm) {
    value = std::sqrt(value);
    scale = value > 0 ? scale / (2 * value) : 0;
  }
  if (scale != 1) std::transform(grad, grad + n * size, grad, [&](T g) { return g * static_cast<T>(scale); });
  return value;
}

Penalty orthogonality_penalty(const std::vector<Tensor>& weights, const std::vector<Tensor>& references,
                              const std::string& kind, const std::vector<int64_t>& strides,
                              const std::vector<int64_t>& paddings, bool norm, const std::optional<Tensor>& scale) {
  const bool is_conv = kind == "conv", is_energy = kind == "energy";
  STD_TORCH_CHECK(is_conv || is_energy || kind == "columns", "kind must be 'columns', 'energy' or 'conv', got '", kind,
                  "'");
  STD_TORCH_CHECK(references.size() == (is_energy ? weights.size() : 0),
                  "expected a reference per weight with 'energy'"
                  " and none else, got ",
                  references.size());
  STD_TORCH_CHECK(strides.size() == (is_conv ? weights.size() : 0) && paddings.size() == 2 * strides.size(),
                  "expected a stride and two paddings per weight with 'conv' and none else, got ", strides.size(),
                  " and ", paddings.size());
  std::vector<Tensor> all = weights;
  all.insert(all.end(), references.begin(), references.end());
  const Matrices a(all);
  const std::vector<double> scales = read_scale(scale, weights.size(), a.acc());
  std::vector<double> values;
  std::vector<Tensor> grads;
  for (size_t l = 0; l < weights.size(); ++l) {
    const Tensor& w = weights[l];
    const int64_t n = w.size(0), width = width_of(w);
    grads.push_back(new_strided(w.dim(), w.sizes().data(), w.strides().data(), a.acc()));
    if (is_energy) FP_CHECK_LIKE(references[l], w);
    if (is_conv) {
      STD_TORCH_CHECK(w.dim() == 2 || w.dim() == 4, "'conv' takes weights of 2 or 4 dimensions, got ", shape_string(w));
      STD_TORCH_CHECK(strides[l] > 0 && paddings[2 * l] >= 0 && paddings[2 * l + 1] >= 0,
                      "expected strides from 1 and paddings from 0 on, got ", strides[l], ", ", paddings[2 * l],
                      " and ", paddings[2 * l + 1]);
    }
    const auto penalty = [&](auto zero) {
      using T = decltype(zero);
      const T* from = reinterpret_cast<const T*>(a.data[l]);
      const T* reference = is_energy ? reinterpret_cast<const T*>(a.data[weights.size() + l]) : nullptr;
      T* grad = static_cast<T*>(grads[l].data_ptr());
      if (!is_conv) return columns(from, reference, is_energy, grad, n, width, scales[l]);
      const bool linear = w.dim() == 2;
      const Kernel kernel{w.size(1), linear ? 1 : w.size(2), linear ? 1 : w.size(3), !w.is_contiguous()};
      return conv(from, grad, n, kernel, strides[l], paddings.data() + 2 * l, norm, scales[l]);
    };
    values.push_back(a.is_double ? penalty(double()) : penalty(float()));
  }
  return {total(values, scales, a.acc()), grads};
}

STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("gram_penalty.cpp", TORCH_BOX(&gram_penalty));
  m.impl("orthogonality_penalty.cpp", TORCH_BOX(&orthogonality_penalty));
}

}  // namespace
}  // namespace fastprune
