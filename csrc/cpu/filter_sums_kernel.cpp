// Sums over the filters or input channels of all weights of a model.  Compiled once per ISA with -DFP_ISA=...
//
// Terms are made and added in double, eight at a time: the square of any float fits, and memory is slower than that
// anyway.  A sum belongs to one task, and is made in an order that only the shape decides.
#include "filter_sums.h"
#include "vec.h"

namespace fastprune {
namespace FP_ISA {
namespace {

constexpr int kChains = 4;                   // independent sums
constexpr int64_t kColumns = 256;            // of a block with outer > 1
constexpr int64_t kTaskElements = 64 << 10;  // work worth a task
constexpr int64_t kMaxTasks = 64;

typedef double Double8 __attribute__((vector_size(64)));
typedef int64_t Long8 __attribute__((vector_size(64)));

FP_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
FP_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
FP_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

FP_INLINE void load8(const double* p, Double8& v) { __builtin_memcpy(&v, p, sizeof v); }
#if defined(__AVX512F__)  // gcc 12 converts vectors of this size by halves
FP_INLINE void load8(const float* p, Double8& v) { v = _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
FP_INLINE void load8(const BFloat16* p, Double8& v) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  v = _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
}
#else
typedef float Float8 __attribute__((vector_size(32)));
typedef uint32_t Uint8 __attribute__((vector_size(32)));
typedef uint16_t Half8 __attribute__((vector_size(16)));
FP_INLINE void load8(const float* p, Double8& v) {
  Float8 f;
  __builtin_memcpy(&f, p, sizeof f);
  v = __builtin_convertvector(f, Double8);
}
FP_INLINE void load8(const BFloat16* p, Double8& v) {
  Half8 h;
  __builtin_memcpy(&h, p, sizeof h);
  v = __builtin_convertvector(reinterpret_cast<Float8>(__builtin_convertvector(h, Uint8) << 16), Double8);
}
#endif

// sum += the terms of count elements, count <= 8
template <FilterTerm kTerm, class T>
FP_INLINE void add(const T* w, const T* g, int64_t count, Double8& sum) {
  constexpr bool kHasGrad = kTerm == FilterTerm::kProductSquare;
  T head[2][8] = {};
  if (count < 8) {
    const int bytes = static_cast<int>(count * static_cast<int64_t>(sizeof(T)));
    copy_bytes(head[0], w, bytes);
    if (kHasGrad) copy_bytes(head[1], g, bytes);
    w = head[0], g = head[1];
  }
  Double8 v;
  load8(w, v);
  if (kTerm == FilterTerm::kAbs) v = reinterpret_cast<Double8>(reinterpret_cast<Long8>(v) & INT64_MAX);
  if (kHasGrad) {
    Double8 u;
    load8(g, u);
    v *= u;
  }
  if (kTerm == FilterTerm::kSquare || kHasGrad) v *= v;
  sum += v;
}

// f(offset, chain, count) for the pieces of `size` elements
template <class F>
FP_INLINE void for_pieces(int64_t size, const F& f) {
  int64_t i = 0;
  for (; i + 8 * kChains <= size; i += 8 * kChains) {
#pragma GCC unroll 4
    for (int k = 0; k < kChains; ++k) f(i + 8 * k, k, 8);
  }
  for (; i + 8 <= size; i += 8) f(i, 0, 8);
  if (i < size) f(i, 1, size - i);
}

template <class T, class Out, FilterTerm kTerm>
class Call {
 public:
  explicit Call(const FilterSums& args) : a(args) {}

  // A unit, some channels of one weight, belongs to the task in whose share of all elements it starts.
  void operator()() const {
    int64_t total = 0;
    for (int64_t i = 0; i < a.count; ++i) total += elements(a.weights[i]);
    const int64_t tasks = min(max(total / kTaskElements, 1), kMaxTasks);
    parallel_for(a.parallel_for, tasks, [&](int64_t first, int64_t last) {
      const int64_t begin = total / tasks * first, end = last == tasks ? total : total / tasks * last;
      int64_t offset = 0;
      for (int64_t i = 0; i < a.count; offset += elements(a.weights[i++])) {
        const FilterWeight& w = a.weights[i];
        const int64_t most = w.outer == 1 ? 1 : max(1, kColumns / w.inner), size = w.outer * w.inner * most;
        const int64_t units = divide_up(w.channels, most);
        const int64_t from = max(0, divide_up(begin - offset, size)), to = min(units, divide_up(end - offset, size));
        for (int64_t unit = from; unit < to; ++unit)
          w.outer == 1 ? row(w, unit) : columns(w, unit * most, min(most, w.channels - unit * most));
      }
    });
  }

 private:
  const FilterSums& a;

  static int64_t elements(const FilterWeight& w) { return w.outer * w.channels * w.inner; }

  FP_INLINE void write(const FilterWeight& w, int64_t c, double sum) const {
    static_cast<Out*>(w.out)[c] = static_cast<Out>(a.root ? __builtin_sqrt(sum) : sum);
  }

  // One channel, whose elements are neighbours.
  void row(const FilterWeight& w, int64_t c) const {
    const T* p = static_cast<const T*>(w.weight) + c * w.inner;
    const T* g = w.grad ? static_cast<const T*>(w.grad) + c * w.inner : nullptr;
    Double8 sums[kChains] = {};
    for_pieces(w.inner, [&](int64_t i, int k, int64_t count)
                            __attribute__((always_inline)) { add<kTerm>(p + i, g ? g + i : nullptr, count, sums[k]); });
    const Double8 sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    write(w, c, ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7])));
  }

  // Channels [first, first + count): column sums over outer, kept in a buffer, of at most kColumns columns at a time.
  void columns(const FilterWeight& w, int64_t first, int64_t count) const {
    const int64_t width = count * w.inner;
    double sum = 0;  // of a channel wider than the buffer
    for (int64_t start = 0; start < width; start += kColumns) {
      const int64_t size = min(kColumns, width - start);
      Double8 sums[kColumns / 8] = {};
      for (int64_t o = 0; o < w.outer; ++o) {
        const int64_t at = (o * w.channels + first) * w.inner + start;
        const T* p = static_cast<const T*>(w.weight) + at;
        const T* g = w.grad ? static_cast<const T*>(w.grad) + at : nullptr;
        for_pieces(size, [&](int64_t i, int, int64_t n) __attribute__((always_inline)) {
          add<kTerm>(p + i, g ? g + i : nullptr, n, sums[i / 8]);
        });
      }
      const double* s = reinterpret_cast<const double*>(sums);
      for (int64_t i = 0; i < size; ++i) {
        sum += s[i];
        if ((start + i + 1) % w.inner == 0) write(w, first + (start + i) / w.inner, sum), sum = 0;
      }
    }
  }
};

template <class T, class Out>
void dispatch(const FilterSums& a) {
  switch (a.term) {
    case FilterTerm::kAbs:
      return Call<T, Out, FilterTerm::kAbs>(a)();
    case FilterTerm::kSquare:
      return Call<T, Out, FilterTerm::kSquare>(a)();
    case FilterTerm::kValue:
      return Call<T, Out, FilterTerm::kValue>(a)();
    case FilterTerm::kProductSquare:
      return Call<T, Out, FilterTerm::kProductSquare>(a)();
  }
}

}  // namespace

void filter_sums(const FilterSums& a) {
  switch (a.type) {
    case FilterType::kFloat:
      return dispatch<float, float>(a);
    case FilterType::kBFloat16:
      return dispatch<BFloat16, float>(a);
    case FilterType::kDouble:
      return dispatch<double, double>(a);
  }
}

}  // namespace FP_ISA
}  // namespace fastprune
