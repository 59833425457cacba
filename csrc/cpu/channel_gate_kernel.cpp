// dx = dy * gate and the sums of dy * x and |dy * x| over the pixels of each sample and channel, in one pass.  The
// forward is the same kernel without sums.  Compiled once per ISA with -DFP_ISA=...
//
// A sum belongs to one task and is made in an order that only the shape decides: floats over a few elements a lane,
// doubles beyond.
#include "channel_gate.h"
#include "vec.h"

namespace fastprune {
namespace FP_ISA {
namespace {

constexpr int64_t kRun = 64 * kUnroll;       // elements of a plane that a float sum takes, four a lane
constexpr int64_t kBlock = 4096;             // elements of a block of rows, whose columns are summed in floats
constexpr int64_t kWidth = 512;              // most columns of a block
constexpr int64_t kTaskElements = 64 << 10;  // work worth a task
constexpr int64_t kMaxTasks = 64;
constexpr int64_t kStreamBytes = 12 << 20;  // outputs of this size and more bypass the caches

FP_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
FP_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
FP_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One vector: its share of dx, and what it adds to the sums.
template <class T, bool kMap, bool kSums, bool kStream>
struct Body {
  const T *dy, *x;
  T* dx;
  template <class Lanes>
  FP_INLINE void operator()(int64_t i, Lanes lanes, Vec gate, Vec& s, Vec& q) const {
    const Vec g = load(dy + i, lanes);
    if (kMap) put(dx + i, g * gate, lanes);
    if (!kSums) return;
    const Vec p = g * load(x + i, lanes);
    s = s + p;
    q = q + abs(p);
  }
  static FP_INLINE void put(T* p, Vec a, All) { kStream ? stream(p, a) : store(p, a); }
  static FP_INLINE void put(T* p, Vec a, First n) { store(p, a, n); }
};

template <class T, bool kMap, bool kSums, bool kStream>
class Call {
  using One = Body<T, kMap, kSums, kStream>;

 public:
  explicit Call(const ChannelGate& args)
      : a(args), N(args.samples), C(args.channels), S(args.pixels), body{as(args.dy), as(args.x), as(args.dx)} {}

  void operator()() const {
    if (a.channels_last)
      run(N * divide_up(C, kWidth), [&](int64_t unit) { rows(unit); });
    else if (S < kLanes)
      run(divide_up(N, kTinySamples) * divide_up(C, tiny_channels()), [&](int64_t unit) { tiny_planes(unit); });
    else
      run(divide_up(N * C, kLanes), [&](int64_t unit) { planes(unit); });
  }

 private:
  static constexpr int64_t kTinySamples = 32;
  const ChannelGate& a;
  const int64_t N, C, S;
  const One body;

  static const T* as(const void* p) { return static_cast<const T*>(p); }
  static T* as(void* p) { return static_cast<T*>(p); }

  template <class F>
  void run(int64_t units, const F& f) const {
    const int64_t tasks = min(min(max(N * C * S / kTaskElements, 1), kMaxTasks), units);
    parallel_for(a.parallel_for, tasks, [&](int64_t begin, int64_t end) {
      for (int64_t unit = units * begin / tasks, last = units * end / tasks; unit < last; ++unit) f(unit);
      if (kStream) stream_fence();
    });
  }

  FP_INLINE float gate_of(int64_t c) const {
    if (!kMap) return 0;
    if (!a.gate_is_bfloat16) return static_cast<const float*>(a.gate)[c];
    const uint32_t bits = static_cast<uint32_t>(static_cast<const BFloat16*>(a.gate)[c].bits) << 16;
    float f;
    __builtin_memcpy(&f, &bits, sizeof f);
    return f;
  }

  FP_INLINE void write(int64_t n, int64_t c, double s, double q) const {
    if (a.grad) a.grad[n * a.grad_stride + c] = static_cast<float>(s);
    if (a.abs) a.abs[n * a.abs_stride + c] = static_cast<float>(q);
  }

  struct Sums {
    Vec s = zero(), q = zero();
  };

  // `size` elements of one plane
  FP_INLINE Sums run_of(const One& one, int64_t first, int64_t size, Vec gate) const {
    Sums sums[kUnroll];
    int64_t i = 0;
    for (; i + kUnroll * kLanes <= size; i += kUnroll * kLanes) {
#pragma GCC unroll 4
      for (int k = 0; k < kUnroll; ++k) one(first + i + k * kLanes, All{}, gate, sums[k].s, sums[k].q);
    }
    for (; i + kLanes <= size; i += kLanes) one(first + i, All{}, gate, sums[0].s, sums[0].q);
    if (i < size) {
      Sums& last = sums[kUnroll - 1];
      one(first + i, First{static_cast<int>(size - i)}, gate, last.s, last.q);
    }
    for (int k = 1; k < kUnroll; ++k) sums[0].s = sums[0].s + sums[k].s, sums[0].q = sums[0].q + sums[k].q;
    return sums[0];
  }

  // Sixteen planes (n, c), so that their lanes are added up together.
  void planes(int64_t unit) const {
    const One one = body;  // a copy: stores through vector types may alias *this
    const int64_t begin = unit * kLanes, count = min(kLanes, N * C - begin);
    Vec s[kLanes], q[kLanes];
    int64_t n = begin / C, c = begin % C;
    for (int64_t k = 0; k < kLanes; ++k) s[k] = q[k] = zero();
    for (int64_t k = 0; k < count; ++k) {
      const Vec gate = broadcast(gate_of(c));
      const int64_t first = (begin + k) * S;
      if (S <= kRun || !kSums) {
        const Sums sums = run_of(one, first, S, gate);
        s[k] = sums.s, q[k] = sums.q;
      } else {
        double wide_s[kLanes] = {}, wide_q[kLanes] = {};
        for (int64_t start = 0; start < S; start += kRun) {
          const Sums sums = run_of(one, first + start, min(kRun, S - start), gate);
          add_to(wide_s, sums.s);
          add_to(wide_q, sums.q);
        }
        for (int j = 1; j < kLanes; ++j) wide_s[0] += wide_s[j], wide_q[0] += wide_q[j];
        write(n, c, wide_s[0], wide_q[0]);
      }
      if (++c == C) c = 0, ++n;
    }
    if (!kSums || S > kRun) return;
    float sum_s[kLanes], sum_q[kLanes];
    lane_sums(s, sum_s);
    lane_sums(q, sum_q);
    n = begin / C, c = begin % C;
    for (int64_t k = 0; k < count; ++k) {
      write(n, c, sum_s[k], sum_q[k]);
      if (++c == C) c = 0, ++n;
    }
  }

  // Planes too small to fill a vector: those of neighbouring channels as one row, the products kept and summed after.
  int64_t tiny_channels() const { return kWidth / S; }
  void tiny_planes(int64_t unit) const {
    const One one = body;
    const int64_t blocks = divide_up(C, tiny_channels()), n_first = unit / blocks * kTinySamples;
    const int64_t c_first = unit % blocks * tiny_channels(), count = min(tiny_channels(), C - c_first);
    const int64_t width = count * S;
    float gate[kWidth], product[kWidth];
    for (int64_t c = 0; kMap && c < count; ++c)
      for (int64_t i = 0; i < S; ++i) gate[c * S + i] = gate_of(c_first + c);
    for (int64_t n = n_first; n < min(N, n_first + kTinySamples); ++n) {
      const int64_t first = (n * C + c_first) * S;
      const auto step = [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        Vec p = zero(), unused = zero();
        one(first + i, lanes, kMap ? load(gate + i, lanes) : zero(), p, unused);
        if (kSums) store(product + i, p, lanes);
      };
      int64_t i = 0;
      for (; i + kLanes <= width; i += kLanes) step(i, All{});
      if (i < width) step(i, First{static_cast<int>(width - i)});
      for (int64_t c = 0; kSums && c < count; ++c) {
        double s = 0, q = 0;
        for (int64_t k = c * S; k < c * S + S; ++k) s += product[k], q += __builtin_fabsf(product[k]);
        write(n, c_first + c, s, q);
      }
    }
  }

  // Rows to take as one, so that C = 3 fills its vectors: full groups of vectors, with little lost at the end.
  static int64_t choose_fold(int64_t width) {
    for (int64_t fold = 1; fold < kLanes; ++fold) {
      const int64_t lost = divide_up(fold * width, kLanes) * kLanes - fold * width;
      if (fold * width >= 4 * kLanes && lost * kLanes <= fold * width) return fold;
    }
    return kLanes;
  }

  // Where the sums of a block of rows go: straight to the results of sample n when there is no other, else into
  // doubles.
  struct Columns {
    int64_t n, c_first;
    bool direct;
    float gate[kWidth];
    double s[kWidth], q[kWidth];
  };

  // Up to kWidth channels of one sample in channels_last.
  void rows(int64_t unit) const {
    const int64_t parts = divide_up(C, kWidth), n = unit / parts, c_first = unit % parts * kWidth;
    const int64_t count = min(kWidth, C - c_first);
    const int64_t fold = C < 4 * kLanes ? choose_fold(C) : 1, width = fold * count, full = S / fold;
    const int64_t most = max(4, kBlock / width), first = n * S * C + c_first;
    Columns columns;
    columns.n = n, columns.c_first = c_first, columns.direct = fold == 1 && S <= most;
    for (int64_t i = 0; kMap && i < count; ++i) columns.gate[i] = gate_of(c_first + i);
    for (int64_t i = count; kMap && i < width; ++i) columns.gate[i] = columns.gate[i - count];
    for (int64_t i = 0; !columns.direct && i < divide_up(width, kLanes) * kLanes; ++i) columns.s[i] = columns.q[i] = 0;
    for (int64_t row = 0; row < full; row += most)
      block(first + row * fold * C, min(most, full - row), width, fold * C, columns);
    if (full * fold < S) block(first + full * fold * C, 1, (S - full * fold) * C, 0, columns);
    for (int64_t c = 0; kSums && !columns.direct && c < count; ++c) {
      for (int64_t i = c + count; i < width; i += count) columns.s[c] += columns.s[i], columns.q[c] += columns.q[i];
      write(n, c_first + c, columns.s[c], columns.q[c]);
    }
  }

  // Sums the columns of a few rows.
  void block(int64_t first, int64_t count, int64_t width, int64_t stride, Columns& to) const {
    const One one = body;
    const auto columns = [&](int64_t at, auto vectors, auto lanes) __attribute__((always_inline)) {
      constexpr int kVectors = decltype(vectors)::value;
      Vec gate[kVectors];
      Sums sums[kVectors];
      for (int k = 0; k < kVectors; ++k) gate[k] = kMap ? load(to.gate + at + k * kLanes, lanes) : zero();
      for (int64_t row = 0; row < count; ++row)
        for (int k = 0; k < kVectors; ++k)
          one(first + row * stride + at + k * kLanes, lanes, gate[k], sums[k].s, sums[k].q);
      for (int k = 0; kSums && k < kVectors; ++k) {
        const int64_t c = at + k * kLanes;
        if (!to.direct) {
          add_to(to.s + c, sums[k].s);
          add_to(to.q + c, sums[k].q);
          continue;
        }
        if (a.grad) store(a.grad + to.n * a.grad_stride + to.c_first + c, sums[k].s, lanes);
        if (a.abs) store(a.abs + to.n * a.abs_stride + to.c_first + c, sums[k].q, lanes);
      }
    };
    int64_t at = 0;
    for (; at + kGroup * kLanes <= width; at += kGroup * kLanes) columns(at, Count<kGroup>{}, All{});
    for (; at + kLanes <= width; at += kLanes) columns(at, Count<1>{}, All{});
    if (at < width) columns(at, Count<1>{}, First{static_cast<int>(width - at)});
  }

  template <int kCount>
  struct Count {
    static constexpr int value = kCount;
  };
};

template <class T>
void dispatch(const ChannelGate& a) {
  if (!a.dx) return Call<T, false, true, false>(a)();
  const int64_t row = a.channels_last ? a.channels : a.pixels;
  const bool streams = a.samples * a.channels * a.pixels * static_cast<int64_t>(sizeof(T)) >= kStreamBytes &&
                       row % kLanes == 0 && reinterpret_cast<uintptr_t>(a.dx) % 64 == 0;
  if (a.sums)
    streams ? Call<T, true, true, kCanStream>(a)() : Call<T, true, true, false>(a)();
  else
    streams ? Call<T, true, false, kCanStream>(a)() : Call<T, true, false, false>(a)();
}

}  // namespace

void channel_gate(const ChannelGate& a) { a.is_bfloat16 ? dispatch<BFloat16>(a) : dispatch<float>(a); }

}  // namespace FP_ISA
}  // namespace fastprune
