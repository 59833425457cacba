// Gram matrices by blocks, and their products with the weights.  Compiled once per ISA with -DFP_ISA=...
//
// G = A A^T: rows are read where they are, vectors along K, a tile of sums of products in registers: nothing is packed.
// E A: columns of A are packed into strips that stay in the L2 cache; E lies in panels of kPanel rows, each column of
// a panel side by side.  Tasks are taken as they come, but a number is made by one task in an order that only the
// shapes decide.
#include "gram_penalty.h"
#include "vec.h"

namespace fastprune {
namespace FP_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kTileI = 6, kTileJ = 4, kPanel = 14;  // 32 registers
#elif defined(__AVX2__)
constexpr int kBytes = 32, kTileI = 3, kTileJ = 4, kPanel = 6;  // 16 registers
#else
constexpr int kBytes = 16, kTileI = 3, kTileJ = 4, kPanel = 6;
#endif
static_assert(kGramBlock % kTileI == 0 && kGramBlock % kTileJ == 0 && kGramBlock % kPanel == 0);
constexpr int64_t kDepth = 3072;  // bytes of a row in a pass: the rows of a tile stay in the L1 cache

template <class T>
struct Wide {
  typedef T Type __attribute__((vector_size(kBytes)));
  static constexpr int64_t kCount = kBytes / static_cast<int64_t>(sizeof(T));
};

FP_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
FP_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class V, class T>
FP_INLINE V load_wide(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class T>
FP_INLINE T sum_of(V v) {
  T x[sizeof(V) / sizeof(T)];
  __builtin_memcpy(x, &v, sizeof v);
  for (int width = sizeof(V) / sizeof(T) / 2; width > 0; width /= 2)
    for (int k = 0; k < width; ++k) x[k] += x[k + width];
  return x[0];
}

template <class T>
FP_INLINE void sums_of(const typename Wide<T>::Type v[kTileI * kTileJ], T* out) {
  for (int k = 0; k < kTileI * kTileJ; ++k) out[k] = sum_of<typename Wide<T>::Type, T>(v[k]);
}
#if defined(__AVX512F__)
FP_INLINE void sums_of(const Wide<double>::Type v[kTileI * kTileJ], double* out) {
  for (int k = 0; k < kTileI * kTileJ; ++k) out[k] = _mm512_reduce_add_pd(reinterpret_cast<__m512d>(v[k]));
}
FP_INLINE void sums_of(const Wide<float>::Type v[kTileI * kTileJ], float* out) {
  Vec all[2 * kLanes];
  for (int k = 0; k < 2 * kLanes; ++k) all[k] = k < kTileI * kTileJ ? Vec{reinterpret_cast<__m512>(v[k])} : zero();
  float sums[2 * kLanes];
  lane_sums(all, sums);
  lane_sums(all + kLanes, sums + kLanes);
  __builtin_memcpy(out, sums, sizeof(float) * kTileI * kTileJ);
}
#endif

// out[i * kGramBlock + j] (+)= the sum over k in [begin, begin + count) of a[i][k] b[j][k]
template <class T>
void tile(const T* const* a, const T* const* b, int64_t begin, int64_t count, bool add, T* out) {
  typedef typename Wide<T>::Type V;
  constexpr int64_t kCount = Wide<T>::kCount;
  V sums[kTileI * kTileJ] = {};
  const auto step = [&](const auto& load_a, const auto& load_b) __attribute__((always_inline)) {
    V left[kTileI];
#pragma GCC unroll 8
    for (int i = 0; i < kTileI; ++i) left[i] = load_a(i);
#pragma GCC unroll 8
    for (int j = 0; j < kTileJ; ++j) {
      const V right = load_b(j);
#pragma GCC unroll 8
      for (int i = 0; i < kTileI; ++i) sums[i * kTileJ + j] += left[i] * right;
    }
  };
  const int64_t whole = begin + count / kCount * kCount;
  for (int64_t k = begin; k < whole; k += kCount)
    step([&](int i) __attribute__((always_inline)) { return load_wide<V>(a[i] + k); },
         [&](int j) __attribute__((always_inline)) { return load_wide<V>(b[j] + k); });
  if (whole < begin + count) {
    const auto rest = [&](const T* row) {
      T buffer[kCount] = {};
      for (int64_t k = whole; k < begin + count; ++k) buffer[k - whole] = row[k];
      return load_wide<V>(buffer);
    };
    step([&](int i) { return rest(a[i]); }, [&](int j) { return rest(b[j]); });
  }
  T values[kTileI * kTileJ];
  sums_of(sums, values);
  for (int i = 0; i < kTileI; ++i)
    for (int j = 0; j < kTileJ; ++j) {
      T& to = out[i * kGramBlock + j];
      to = add ? to + values[i * kTileJ + j] : values[i * kTileJ + j];
    }
}

// Rows of one group of E = weight (G - target), over the columns [from, to) that are not zero throughout.
template <class T>
struct Panels {
  T* data;
  int64_t first, from, to;

  FP_INLINE Panels(const GramLayer& a, int group)
      : data(static_cast<T*>(a.matrix)), first(group ? a.first : 0), from(begin(a, group)), to(end(a, group)) {
    if (group) data += divide_up(a.first, kPanel) * kPanel * (end(a, 0) - begin(a, 0));  // behind those of group 0
  }
  static FP_INLINE int64_t begin(const GramLayer& a, int group) { return a.weight[group] != 0 ? 0 : a.first; }
  static FP_INLINE int64_t end(const GramLayer& a, int group) { return a.weight[group + 1] != 0 ? a.n : a.first; }
  // Column j of the panel that row i is in; rows of a panel are side by side.
  FP_INLINE T* at(int64_t i, int64_t j) const {
    return data + ((i - first) / kPanel * (to - from) + (j - from)) * kPanel;
  }
};

template <class T>
double block(const GramLayer& a, const GramBlock& b) {
  T g[kGramBlock * kGramBlock];
  const bool diagonal = b.i == b.j;
  const int gi = b.i >= a.first, gj = b.j >= a.first;
  const T* rows[2][kGramBlock];  // the last ones again and again, to fill tiles
  const int64_t ends[2] = {b.rows, b.columns}, starts[2] = {b.i, b.j};
  for (int side = 0; side < 2; ++side)
    for (int64_t r = 0; r < kGramBlock; ++r)
      rows[side][r] = static_cast<const T*>((side ? a.right : a.rows)[starts[side] + min(r, ends[side] - 1)]);
  const int64_t passes = divide_up(a.depth * static_cast<int64_t>(sizeof(T)), kDepth);
  const int64_t depth = divide_up(divide_up(a.depth, passes), Wide<T>::kCount) * Wide<T>::kCount;
  for (int64_t k = 0; k < a.depth; k += depth)
    for (int64_t i = 0; i < b.rows; i += kTileI)
      for (int64_t j = 0; j < (diagonal ? min(b.columns, i + kTileI) : b.columns); j += kTileJ)
        tile(rows[0] + i, rows[1] + j, k, min(depth, a.depth - k), k > 0, g + i * kGramBlock + j);
  if (diagonal)
    for (int64_t i = 0; i < b.rows; ++i)
      for (int64_t j = i + 1; j < b.rows; ++j) g[i * kGramBlock + j] = g[j * kGramBlock + i];

  // on the diagonal of a pair of groups, j = i - shift
  const int64_t shift = gi == gj ? 0 : a.first, at = b.i - shift - b.j;
  const T weight = static_cast<T>(a.weight[gi + gj]), target = static_cast<T>(a.target[gi + gj]);
  double sum = 0;
  for (int64_t i = 0; i < b.rows; ++i) {
    T* row = g + i * kGramBlock;
    if (at + i >= 0 && at + i < b.columns) row[at + i] -= target;
    double sums[8] = {};
    int64_t j = 0;
    for (; j + 8 <= b.columns; j += 8)
      for (int k = 0; k < 8; ++k) sums[k] += static_cast<double>(row[j + k]) * static_cast<double>(row[j + k]);
    for (; j < b.columns; ++j) sums[0] += static_cast<double>(row[j]) * static_cast<double>(row[j]);
    sum += ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    for (j = 0; j < b.columns; ++j) row[j] *= weight;
  }

  if (b.i < a.grad_rows) {
    const Panels<T> to(a, gi);
    for (int64_t i = 0; i < b.rows; i += kPanel) {
      T* out = to.at(b.i + i, b.j);
      const int64_t live = min(kPanel, b.rows - i);
      for (int64_t j = 0; j < b.columns; ++j, out += kPanel)
        for (int64_t r = 0; r < live; ++r) out[r] = g[(i + r) * kGramBlock + j];
    }
  }
  if (!diagonal && b.j < a.grad_rows) {
    const Panels<T> to(a, gj);
    for (int64_t j = 0; j < b.columns; j += kPanel) {
      T* out = to.at(b.j + j, b.i);
      const int64_t live = min(kPanel, b.columns - j);
      for (int64_t i = 0; i < b.rows; ++i, out += kPanel)
        for (int64_t r = 0; r < live; ++r) out[r] = g[i * kGramBlock + j + r];
    }
  }
  return sum * a.weight[gi + gj] * (diagonal ? 1 : 2);
}

// to[r][0 .. live) = factor * the sum over j of e[j][r] strip[j], for `live_rows` of the kRows rows that are computed
template <class T, int kRows>
void multiply(const T* e, const T* strip, int64_t count, T factor, void* const* to, int64_t live_rows, int64_t offset,
              int64_t live) {
  typedef typename Wide<T>::Type V;
  constexpr int64_t kCount = Wide<T>::kCount;
  V sums[kRows][2] = {};
  for (int64_t j = 0; j < count; ++j, e += kPanel, strip += 2 * kCount) {
    const V low = load_wide<V>(strip), high = load_wide<V>(strip + kCount);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      sums[r][0] += e[r] * low;
      sums[r][1] += e[r] * high;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    if (r >= live_rows) break;
    T* out = static_cast<T*>(to[r]) + offset;
    V scaled[2] = {sums[r][0] * factor, sums[r][1] * factor};
    if (live == 2 * kCount)
      __builtin_memcpy(out, scaled, sizeof scaled);
    else
      __builtin_memcpy(out, scaled, static_cast<size_t>(live) * sizeof(T));
  }
}

template <class T>
void strip(const GramLayer& a, const GramStrip& s, T* scratch) {
  constexpr int64_t kWidth = 2 * Wide<T>::kCount;
  for (int64_t j = 0; j < a.n; ++j) {
    const T* row = static_cast<const T*>(a.rows[j]) + s.begin;
    for (int64_t k = 0; k < s.count; k += kWidth) {
      T* to = scratch + k * a.n + j * kWidth;
      const int64_t live = min(kWidth, s.count - k);
      if (live == kWidth) {
        __builtin_memcpy(to, row + k, sizeof(T) * kWidth);
      } else {
        for (int64_t c = 0; c < kWidth; ++c) to[c] = c < live ? row[k + c] : 0;
      }
    }
  }
  const T factor = static_cast<T>(a.factor);
  for (int group = 0; group < 2; ++group) {
    const Panels<T> panels(a, group);
    const int64_t end = min(group ? a.n : a.first, a.grad_rows);
    for (int64_t i = panels.first; i < end; i += kPanel) {
      const int64_t live_rows = min(kPanel, end - i);
      const T* e = panels.at(i, panels.from);
      for (int64_t k = 0; k < s.count; k += kWidth) {
        const T* from = scratch + k * a.n + panels.from * kWidth;
        const int64_t live = min(kWidth, s.count - k);
        const auto run = [&](auto function) {
          function(e, from, panels.to - panels.from, factor, a.grads + i, live_rows, s.begin + k, live);
        };
        constexpr int kHalf = (kPanel + 2) / 4 * 2;
        run(live_rows > kHalf ? multiply<T, kPanel> : live_rows > 2 ? multiply<T, kHalf> : multiply<T, 2>);
      }
    }
  }
}

// Workers take one task after the other.
template <class F>
void run(const GramCall& call, int64_t count, const F& task) {
  int64_t next = 0;
  parallel_for(call.parallel_for, call.workers, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker)
      for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < count;) task(worker, i);
  });
}

}  // namespace

void gram_blocks(const GramCall& call) {
  run(call, call.block_count, [&](int64_t, int64_t i) {
    const GramBlock& b = call.blocks[i];
    const GramLayer& a = call.layers[b.layer];
    call.sums[i] = call.is_double ? block<double>(a, b) : block<float>(a, b);
  });
}

void gram_strips(const GramCall& call) {
  run(call, call.strip_count, [&](int64_t worker, int64_t i) {
    const GramStrip& s = call.strips[i];
    const GramLayer& a = call.layers[s.layer];
    const int64_t offset = worker * call.scratch_size;
    if (call.is_double)
      strip<double>(a, s, static_cast<double*>(call.scratch) + offset);
    else
      strip<float>(a, s, static_cast<float*>(call.scratch) + offset);
  });
}

}  // namespace FP_ISA
}  // namespace fastprune
