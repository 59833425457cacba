// SGD step over all parameters of a model.  Compiled once per ISA with -DFP_ISA=...
//
// Every element is on its own, and the end of a tensor takes the same arithmetic as its middle, so neither tasks nor
// threads show in the result.  The order of roundings is that of PyTorch's vectorised add, mul and add with alpha.
#include "growing_sgd.h"
#include "vec.h"

namespace fastprune {
namespace FP_ISA {
namespace {

constexpr int64_t kChunk = 512;              // elements whose regularisation and mask are laid out in a buffer
constexpr int64_t kTaskElements = 32 << 10;  // work worth a task
constexpr int64_t kMaxTasks = 64;

FP_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
FP_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
FP_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A vector of one: the compiler makes wider ones of it where it can.
struct Double {
  double v;
};
FP_INLINE Double operator*(Double a, Double b) { return {a.v * b.v}; }
FP_INLINE Double fma(Double a, Double b, Double c) {
#if defined(__FMA__)
  return {__builtin_fma(a.v, b.v, c.v)};
#else
  return {a.v * b.v + c.v};
#endif
}
FP_INLINE Double keep_where_passes(Double a, Double z) { return {z.v > 0 ? a.v : 0}; }
FP_INLINE Double load(const double* p, All = {}) { return {*p}; }
FP_INLINE void store(double* p, Double a, All = {}) { *p = a.v; }

template <class T>
struct Of {  // what elements of type T are computed in
  using V = Vec;
  using Scalar = float;
  static constexpr int kWidth = kLanes;
};
template <>
struct Of<double> {
  using V = Double;
  using Scalar = double;
  static constexpr int kWidth = 1;
};
FP_INLINE Vec splat(float a) { return broadcast(a); }
FP_INLINE Double splat(double a) { return {a}; }

// f(offset, lanes) for the vectors of `count` elements
template <int kWidth, class F>
FP_INLINE void for_vectors(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) f(i, All{});
  if constexpr (kWidth > 1)
    if (i < count) f(i, First{static_cast<int>(count - i)});
}

// Lays elements [begin, begin + count) of the parameter's memory order out in `buffer`, unless they lie so already.
template <class From, int kWidth, class To>
const To* spread(const SpreadOut& from, int64_t begin, int64_t count, To* buffer) {
  const From* data = static_cast<const From*>(from.data);
  if constexpr (sizeof(From) == sizeof(To))
    if (from.dims == 1 && from.stride[0] == 1) return data + begin;
  const int last = from.dims - 1;
  int64_t index[kMaxDims], at = 0;
  for (int d = last; d >= 0; begin /= from.size[d--]) {
    index[d] = begin % from.size[d];
    at += index[d] * from.stride[d];
  }
  const int64_t stride = from.stride[last];
  for (To* out = buffer; count > 0;) {
    const int64_t run = min(count, from.size[last] - index[last]);
    if (stride == 0) {
      const auto value = splat(static_cast<To>(data[at]));
      for (int64_t i = 0; i < run; i += kWidth) store(out + i, value);  // what is too much is overwritten, or padding
    } else {
      for (int64_t i = 0; i < run; ++i) out[i] = static_cast<To>(data[at + i * stride]);
    }
    out += run, count -= run;
    at -= index[last] * stride, index[last] = 0;
    for (int d = last - 1; d >= 0; --d) {
      at += from.stride[d];
      if (++index[d] < from.size[d]) break;
      at -= index[d] * from.stride[d], index[d] = 0;
    }
  }
  return buffer;
}

template <class T>
class Call {
  using V = typename Of<T>::V;
  using Scalar = typename Of<T>::Scalar;
  static constexpr int kWidth = Of<T>::kWidth;

 public:
  explicit Call(const SgdStep& args) : a(args) {}

  // A chunk belongs to the task in whose share of all elements it starts.
  void operator()() const {
    int64_t total = 0;
    for (int64_t i = 0; i < a.count; ++i) total += a.tensors[i].size;
    const int64_t tasks = min(max(total / kTaskElements, 1), kMaxTasks);
    parallel_for(a.parallel_for, tasks, [&](int64_t first, int64_t last) {
      const int64_t begin = total / tasks * first, end = last == tasks ? total : total / tasks * last;
      int64_t offset = 0;
      for (int64_t i = 0; i < a.count && offset < end; offset += a.tensors[i++].size) {
        const SgdTensor& t = a.tensors[i];
        const int64_t from = divide_up(max(0, begin - offset), kChunk) * kChunk, to = min(t.size, end - offset);
        for (int64_t at = from; at < to; at += kChunk) chunk(t, at, min(kChunk, t.size - at));
      }
    });
  }

 private:
  const SgdStep& a;

  void chunk(const SgdTensor& t, int64_t at, int64_t count) const {
    alignas(64) Scalar reg_buffer[kChunk + kWidth], keep_buffer[kChunk + kWidth];
    const Scalar* reg = t.reg.data ? spread<Scalar, kWidth>(t.reg, at, count, reg_buffer) : nullptr;
    const Scalar* keep = t.keep.data ? spread<uint8_t, kWidth>(t.keep, at, count, keep_buffer) : nullptr;
    T* p = static_cast<T*>(t.param) + at;
    T* g = t.grad ? static_cast<T*>(t.grad) + at : nullptr;
    T* momentum = t.momentum ? static_cast<T*>(t.momentum) + at : nullptr;
    switch (a.work) {
      case SgdWork::kStep:
        return step(p, g, momentum, reg, keep, count);
      case SgdWork::kGrow:
        return for_vectors<kWidth>(count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
          store(g + i, fma(load(reg + i, lanes), load(p + i, lanes), load(g + i, lanes)), lanes);
        });
      case SgdWork::kHold:
        int dropped = 0;
        for (int64_t i = 0; i < count; ++i) dropped += keep[i] == 0;
        if (dropped == 0) return;
        return for_vectors<kWidth>(count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
          store(p + i, keep_where_passes(load(p + i, lanes), load(keep + i, lanes)), lanes);
        });
    }
  }

  void step(T* p, T* grad, T* momentum, const Scalar* reg, const Scalar* keep, int64_t count) const {
    const V unscale = splat(static_cast<Scalar>(a.unscale)), decay = splat(static_cast<Scalar>(a.weight_decay));
    const V mu = splat(static_cast<Scalar>(a.momentum)), share = splat(static_cast<Scalar>(a.one_minus_dampening));
    const V minus_lr = splat(static_cast<Scalar>(a.minus_lr)), minus = splat(static_cast<Scalar>(-1));
    for_vectors<kWidth>(count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      V w = load(p + i, lanes), g = load(grad + i, lanes), kept = minus;
      if (a.unscale != 1) store(grad + i, g = g * unscale, lanes);
      if (a.maximize) g = g * minus;
      if (a.weight_decay != 0) g = fma(w, decay, g);
      if (reg) g = fma(load(reg + i, lanes), w, g);
      if (keep) kept = load(keep + i, lanes);
      if (a.momentum != 0) {
        const V b = a.first ? g : fma(g, share, load(momentum + i, lanes) * mu);
        g = a.nesterov ? fma(b, mu, g) : b;
        store(momentum + i, keep ? keep_where_passes(b, kept) : b, lanes);
      }
      w = fma(g, minus_lr, w);
      store(p + i, keep ? keep_where_passes(w, kept) : w, lanes);
    });
  }
};

}  // namespace

void growing_sgd(const SgdStep& a) {
  switch (a.type) {
    case SgdType::kFloat:
      return Call<float>(a)();
    case SgdType::kBFloat16:
      return Call<BFloat16>(a)();
    case SgdType::kDouble:
      return Call<double>(a)();
  }
}

}  // namespace FP_ISA
}  // namespace fastprune
