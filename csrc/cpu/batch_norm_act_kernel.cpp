// Batch norm + residual + ReLU, forward and backward.  Compiled once per ISA with -DFP_ISA=...
//
// Both directions are a reduction (sums per channel) followed by a map.  Each is written once, as a body that works on
// one vector: Moments and Normalize forward, GradSums and GradInput backward.  Two pairs of drivers bring them to
// memory.  Planes, for NCHW: runs of H * W elements of one channel; parameters are broadcast.  Rows, for channels_last:
// rows of C elements; parameters are vectors.  Narrow rows are folded, F rows of C channels taken as one row of F * C,
// so that C = 3 fills its vectors.
//
// Each pass goes through memory in order.  Slabs of channels that stay in cache between reduction and map were slower
// (measured at 12 to 200 MB): their short strides cost more than the second read.
//
// Sums are float within a few elements a lane, or 128 rows, and double beyond.  Work is cut by shape alone, never by
// the number of threads, and partial sums are added in a fixed order, so results do not depend on it.
#include <stdlib.h>

#include "batch_norm_act.h"
#include "vec.h"

namespace fastprune {
namespace FP_ISA {
namespace {

constexpr int64_t kRun = 64 * kUnroll;       // elements of a plane that a float sum takes, four a lane; double beyond
constexpr int64_t kFlushRows = 128;          // rows that a float sum takes
constexpr int64_t kAhead = 1024;             // elements of each tensor prefetched at a time
constexpr int64_t kTaskElements = 64 << 10;  // work worth a task
constexpr int64_t kMaxTasks = 64;
constexpr int64_t kStreamBytes = 12 << 20;  // outputs of this size and more bypass the caches

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};
FP_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
FP_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
FP_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
FP_INLINE Range part(int64_t total, int64_t k, int64_t parts) { return {total * k / parts, total * (k + 1) / parts}; }
FP_INLINE bool is_finite(double a) { return a - a == 0; }

FP_INLINE double value(float a) { return a; }
FP_INLINE double value(BFloat16 a) {
  const uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}
double get(const Parameter& p, int64_t c) {
  return p.is_bfloat16 ? value(static_cast<const BFloat16*>(p.data)[c]) : value(static_cast<const float*>(p.data)[c]);
}
void set(const Parameter& p, int64_t c, double value) {
  if (!p.data) return;
  if (!p.is_bfloat16)
    static_cast<float*>(p.data)[c] = static_cast<float>(value);
  else
    store(static_cast<BFloat16*>(p.data) + c, broadcast(static_cast<float>(value)), First{1});
}

// Scratch of one call: one malloc, freed at the end.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : memory_(malloc(static_cast<size_t>(bytes + 64))) {
    if (!memory_) abort();
    next_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory_) + 63) & ~uintptr_t{63});
  }
  ~Scratch() { free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(count);
    return p;
  }
  template <class T>
  static int64_t bytes(int64_t count) {
    return divide_up(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
  }

 private:
  void* memory_;
  char* next_;
};

template <class T>
FP_INLINE void prefetch_span(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) prefetch(p + i);
}

// Where a body finds its parameters: one channel for all lanes, or one channel a lane.
struct Broadcast {
  static FP_INLINE Vec get(const float* p, int64_t at) { return broadcast(p[at]); }
};
struct Lanewise {
  static FP_INLINE Vec get(const float* p, int64_t at) { return load(p + at); }
};

// Per channel, or per position of a folded row.
// z = (x - mean) * scale + bias,  dx = scale * dz + slope * (x - mean) + offset
struct Coefficients {
  float *mean, *scale, *bias, *slope, *offset;
};

// ---- bodies: element i, its mask word, the lanes that exist, the parameters of its channels ----

// Sums of x - shift and (x - shift)^2.
template <class T>
struct Moments {
  static constexpr int kSums = 2, kThird = 0;  // the sums, and the Gates buffer of the third
  const T* x;
  const float* shift;
  struct Params {
    Vec shift;
  };
  template <class At>
  FP_INLINE Params params(int64_t at) const {
    return {At::get(shift, at)};
  }
  FP_INLINE void fetch(int64_t i, int64_t n) const { prefetch_span(x + i, n); }
  template <class Lanes>
  FP_INLINE void operator()(int64_t i, int64_t, Lanes lanes, const Params& p, Vec (&sums)[kSums]) const {
    const Vec d = keep(load(x + i, lanes) - p.shift, live(lanes));
    sums[0] = sums[0] + d;
    sums[1] = fma(d, d, sums[1]);
  }
};

template <bool kStream, class T>
FP_INLINE void put(T* p, Vec a, All) {
  kStream ? stream(p, a) : store(p, a);
}
template <bool kStream, class T>
FP_INLINE void put(T* p, Vec a, First n) {
  store(p, a, n);
}

template <class T, bool kResidual, bool kRelu, bool kMask, bool kStream>
struct Normalize {
  const T *x, *residual;
  T* y;
  uint16_t* mask;
  Coefficients k;
  struct Params {
    Vec mean, scale, bias;
  };
  template <class At>
  FP_INLINE Params params(int64_t at) const {
    return {At::get(k.mean, at), At::get(k.scale, at), At::get(k.bias, at)};
  }
  FP_INLINE void fetch(int64_t i, int64_t n) const {
    prefetch_span(x + i, n);
    if (kResidual) prefetch_span(residual + i, n);
  }
  template <class Lanes>
  FP_INLINE void operator()(int64_t i, int64_t word, Lanes lanes, const Params& p) const {
    Vec z = fma(load(x + i, lanes) - p.mean, p.scale, p.bias);
    if (kResidual) z = z + load(residual + i, lanes);
    if (kMask) mask[word] = static_cast<uint16_t>(passes(z) & live(lanes));
    if (kRelu) z = relu(z);
    put<kStream>(y + i, z, lanes);
  }
};

// How the backward knows where the ReLU passed.
enum class Relu { kNone, kRecompute, kMask, kOutput };

template <class T, Relu kRelu>
struct Grad {
  const T *x, *dy, *y;
  const uint16_t* mask;
  Coefficients k;
  struct Params {
    Vec mean, scale, bias, slope, offset;
  };
  template <class At>
  FP_INLINE Params params(int64_t at) const {
    return {At::get(k.mean, at), At::get(k.scale, at), At::get(k.bias, at), At::get(k.slope, at),
            At::get(k.offset, at)};
  }
  FP_INLINE void fetch(int64_t i, int64_t n) const {
    prefetch_span(x + i, n);
    prefetch_span(dy + i, n);
    if (kRelu == Relu::kOutput) prefetch_span(y + i, n);
  }
  // dz, for d = x - mean
  template <class Lanes>
  FP_INLINE Vec dz(int64_t i, int64_t word, Lanes lanes, const Params& p, Vec d) const {
    const Vec g = load(dy + i, lanes);
    if (kRelu == Relu::kRecompute) return keep_where_passes(g, fma(d, p.scale, p.bias));
    if (kRelu == Relu::kMask) return keep(g, mask[word]);
    if (kRelu == Relu::kOutput) return keep_where_passes(g, load(y + i, lanes));
    return g;
  }
};

// Sums of dz and dz * (x - mean); then, if asked, of |dz * z|, and of dz * y and |dz * y|.
template <class T, Relu kRelu, bool kAbs, bool kOut>
struct GradSums : Grad<T, kRelu> {
  static constexpr int kSums = 2 + kAbs + 2 * kOut, kThird = kAbs ? 1 : 2;
  using Params = typename Grad<T, kRelu>::Params;
  FP_INLINE void fetch(int64_t i, int64_t n) const {
    Grad<T, kRelu>::fetch(i, n);
    if (kOut) prefetch_span(this->y + i, n);
  }
  template <class Lanes>
  FP_INLINE void operator()(int64_t i, int64_t word, Lanes lanes, const Params& p, Vec (&sums)[kSums]) const {
    const Vec d = load(this->x + i, lanes) - p.mean;
    const Vec g = this->dz(i, word, lanes, p, d);
    sums[0] = sums[0] + g;
    sums[1] = fma(g, d, sums[1]);
    if constexpr (kAbs) sums[2] = sums[2] + abs(g * fma(d, p.scale, p.bias));
    if constexpr (kOut) {
      const Vec product = g * load(this->y + i, lanes);
      sums[kSums - 2] = sums[kSums - 2] + product;
      sums[kSums - 1] = sums[kSums - 1] + abs(product);
    }
  }
};

template <class T, Relu kRelu, bool kTraining, bool kStream>
struct GradInput : Grad<T, kRelu> {
  T *dx, *dresidual;
  using Params = typename Grad<T, kRelu>::Params;
  template <class Lanes>
  FP_INLINE void operator()(int64_t i, int64_t word, Lanes lanes, const Params& p) const {
    const Vec d = load(this->x + i, lanes) - p.mean;
    const Vec g = this->dz(i, word, lanes, p, d);
    if (dx) put<kStream>(dx + i, kTraining ? fma(g, p.scale, fma(d, p.slope, p.offset)) : g * p.scale, lanes);
    if ((kRelu == Relu::kMask || kRelu == Relu::kOutput) && dresidual) put<kStream>(dresidual + i, g, lanes);
  }
};

// ---- drivers ----
//
// They take bodies by value: stores through vector types may alias anything, so that the pointers in a body would be
// loaded again after each store.

// f(offset, which of kUnroll sums, lanes) for the vectors of a run of `size` elements.
template <class F>
FP_INLINE void for_vectors(int64_t size, const F& f) {
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= size; i += kUnroll * kLanes) {
#pragma GCC unroll 4
    for (int k = 0; k < kUnroll; ++k) f(i + k * kLanes, k, All{});
  }
  for (; i + kLanes <= size; i += kLanes) f(i, 0, All{});
  if (i < size) f(i, kUnroll - 1, First{static_cast<int>(size - i)});
}

// Planes [begin, end) of the N * C.
struct Planes {
  int64_t begin, end, channels, pixels, words;
};

// Prefetches ahead of the position, a page of each tensor at a time: with tensors taking turns line by line, memory
// would open and close its own pages all the time.
template <class Body>
class Ahead {
 public:
  Ahead(const Body& body, int64_t start) : body_(body), fetched_(start) {}
  FP_INLINE void at(int64_t i) {
    if (i + kAhead <= fetched_) return;
    body_.fetch(fetched_, kAhead);
    fetched_ += kAhead;
  }

 private:
  const Body body_;
  int64_t fetched_;
};

template <class Body>
void map_planes(const Planes v, const Body body) {
  Ahead<Body> ahead(body, v.begin * v.pixels);
  int64_t c = v.begin % v.channels;
  for (int64_t plane = v.begin; plane < v.end; ++plane) {
    const auto p = body.template params<Broadcast>(c);
    for (int64_t start = 0; start < v.pixels; start += kAhead) {
      const int64_t first = plane * v.pixels + start, word = plane * v.words + start / kLanes;
      ahead.at(first);
      for_vectors(min(kAhead, v.pixels - start), [&](int64_t i, int, auto lanes) __attribute__((always_inline)) {
        body(first + i, word + i / kLanes, lanes, p);
      });
    }
    if (++c == v.channels) c = 0;
  }
}

template <int kSums>
struct Sums {
  Vec v[kSums];
  FP_INLINE Sums() {
    for (Vec& sum : v) sum = zero();
  }
  FP_INLINE Sums operator+(const Sums& other) const {
    Sums total;
    for (int j = 0; j < kSums; ++j) total.v[j] = v[j] + other.v[j];
    return total;
  }
};
template <int kCount, int kSums>
FP_INLINE Sums<kSums> add_up(const Sums<kSums>* sums) {
  if constexpr (kCount == 1)
    return sums[0];
  else
    return add_up<kCount / 2>(sums) + add_up<kCount / 2>(sums + kCount / 2);
}

// Sums over `size` elements of one channel.
template <class Body>
FP_INLINE Sums<Body::kSums> reduce_run(const Body& body, int64_t first, int64_t word, int64_t size,
                                       const typename Body::Params& p) {
  Sums<Body::kSums> sums[kUnroll];
  for_vectors(size, [&](int64_t i, int k, auto lanes)
                        __attribute__((always_inline)) { body(first + i, word + i / kLanes, lanes, p, sums[k].v); });
  return add_up<kUnroll>(sums);
}

// sink(sample, channel, sums) for every plane, in order.
template <class Body, class Sink>
void reduce_small_planes(const Planes v, const Body body, const Sink& sink) {
  constexpr int kSums = Body::kSums;
  Vec last[kSums][kLanes];  // sums of the last planes: the lanes of 16 of them are added up together
  int64_t done = v.begin, done_n = v.begin / v.channels, done_c = v.begin % v.channels;
  const auto flush = [&](int64_t end) {
    float lane[kSums][kLanes];
    for (int j = 0; j < kSums; ++j) {
      for (int64_t k = end - done; k < kLanes; ++k) last[j][k] = zero();
      lane_sums(last[j], lane[j]);
    }
    for (int k = 0; done < end; ++k, ++done) {
      double sums[kSums];
      for (int j = 0; j < kSums; ++j) sums[j] = lane[j][k];
      sink(done_n, done_c, sums);
      if (++done_c == v.channels) done_c = 0, ++done_n;
    }
  };
  Ahead<Body> ahead(body, v.begin * v.pixels);
  int64_t c = done_c;
  for (int64_t plane = v.begin; plane < v.end; ++plane) {
    ahead.at(plane * v.pixels);
    const auto sums = reduce_run(body, plane * v.pixels, plane * v.words, v.pixels, body.template params<Broadcast>(c));
    for (int j = 0; j < kSums; ++j) last[j][plane - done] = sums.v[j];
    if (plane + 1 - done == kLanes) flush(plane + 1);
    if (++c == v.channels) c = 0;
  }
  flush(v.end);
}

template <class Body, class Sink>
void reduce_large_planes(const Planes v, const Body body, const Sink& sink) {
  constexpr int kSums = Body::kSums;
  Ahead<Body> ahead(body, v.begin * v.pixels);
  int64_t n = v.begin / v.channels, c = v.begin % v.channels;
  for (int64_t plane = v.begin; plane < v.end; ++plane) {
    const auto p = body.template params<Broadcast>(c);
    double lane[kSums][kLanes] = {}, sums[kSums];
    for (int64_t start = 0; start < v.pixels; start += kRun) {
      const int64_t first = plane * v.pixels + start;
      ahead.at(first);
      const auto run = reduce_run(body, first, plane * v.words + start / kLanes, min(kRun, v.pixels - start), p);
      for (int j = 0; j < kSums; ++j) add_to(lane[j], run.v[j]);
    }
    for (int j = 0; j < kSums; ++j) {
      for (int k = kLanes / 2; k; k /= 2)
        for (int i = 0; i < k; ++i) lane[j][i] += lane[j][i + k];
      sums[j] = lane[j][0];
    }
    sink(n, c, sums);
    if (++c == v.channels) c = 0, ++n;
  }
}

struct Rows {
  int64_t element, word;        // where the first row starts
  int64_t count, width, words;  // elements and mask words of a row
};

// f(column, how many vectors, lanes) for the columns of a row.
template <int kCount>
struct Count {
  static constexpr int value = kCount;
};
template <class F>
FP_INLINE void for_columns(int64_t width, const F& f) {
  int64_t at = 0;
  if (kGroup > 1)
    for (; at + kGroup * kLanes <= width; at += kGroup * kLanes) f(at, Count<kGroup>{}, All{});
  for (; at + kLanes <= width; at += kLanes) f(at, Count<1>{}, All{});
  if (at < width) f(at, Count<1>{}, First{static_cast<int>(width - at)});
}

// f(rows, column, how many vectors, lanes): rows in blocks, columns in groups, so that parameters stay in registers
// over the rows of a block while memory is read in order.
template <class Body, class F>
FP_INLINE void for_blocks(const Rows& v, const Body& body, const F& f) {
  const int64_t most = max(1, kAhead / v.width);
  for (int64_t row = 0; row < v.count; row += most) {
    const Rows block = {v.element + row * v.width, v.word + row * v.words, min(most, v.count - row), v.width, v.words};
    const int64_t size = block.count * block.width;
    body.fetch(block.element + size, size);
    for_columns(v.width,
                [&](int64_t at, auto count, auto lanes) __attribute__((always_inline)) { f(block, at, count, lanes); });
  }
}

template <class Body>
void map_rows(const Rows& all, const Body body) {
  for_blocks(all, body, [&](const Rows& v, int64_t at, auto count, auto lanes) __attribute__((always_inline)) {
    constexpr int kCount = decltype(count)::value;
    typename Body::Params p[kCount];
    for (int k = 0; k < kCount; ++k) p[k] = body.template params<Lanewise>(at + k * kLanes);
    for (int64_t row = 0; row < v.count; ++row)
      for (int k = 0; k < kCount; ++k)
        body(v.element + row * v.width + at + k * kLanes, v.word + row * v.words + at / kLanes + k, lanes, p[k]);
  });
}

// Adds the sums of each column to `columns`, arrays of `stride` floats one after the other.
template <class Body>
void reduce_rows(const Rows& all, const Body body, float* columns, int64_t stride) {
  for_blocks(all, body, [&](const Rows& v, int64_t at, auto count, auto lanes) __attribute__((always_inline)) {
    constexpr int kCount = decltype(count)::value;
    typename Body::Params p[kCount];
    Sums<Body::kSums> sums[kCount];
    for (int k = 0; k < kCount; ++k) p[k] = body.template params<Lanewise>(at + k * kLanes);
    for (int64_t row = 0; row < v.count; ++row)
      for (int k = 0; k < kCount; ++k)
        body(v.element + row * v.width + at + k * kLanes, v.word + row * v.words + at / kLanes + k, lanes, p[k],
             sums[k].v);
    for (int k = 0; k < kCount; ++k)
      for (int j = 0; j < Body::kSums; ++j) {
        float* to = columns + j * stride + at + k * kLanes;
        store(to, load(to) + sums[k].v[j]);
      }
  });
}

// ---- one call ----

// How a call is brought to the drivers and cut into tasks.
struct Plan {
  bool rows;         // or planes
  int64_t repeat;    // positions of a channel next to each other in a row: H * W for NCHW as rows, else 1
  int64_t width;     // elements of a row in memory: channels * repeat
  int64_t fold = 1;  // rows in memory that make one row for the driver
  int64_t unit = 1;  // a task is a multiple of this many rows
  int64_t tasks;
  bool stream;  // outputs bypass the caches
};

// Rows to fold: full groups of vectors, with little lost at the end.
int64_t choose_fold(int64_t width) {
  for (int64_t fold = 1; fold < kLanes; ++fold) {
    const int64_t lost = divide_up(fold * width, kLanes) * kLanes - fold * width;
    if (fold * width >= 4 * kLanes && lost * kLanes <= fold * width) return fold;
  }
  return kLanes;
}

// masked: rows must match those of the mask; gated: sums must not run across samples.
Plan make_plan(const BatchNormAct& a, bool masked, bool gated, bool aligned) {
  Plan plan;
  const bool tiny = !a.channels_last && a.pixels < kLanes && !masked && !gated;  // planes too small to fill a vector
  plan.rows = a.channels_last || tiny;
  plan.repeat = tiny ? a.pixels : 1;
  plan.width = a.channels * plan.repeat;
  if (plan.rows && (!masked || plan.width % kLanes == 0)) plan.fold = choose_fold(plan.width);
  if (plan.rows && gated) plan.unit = a.pixels;
  const int64_t numel = a.samples * a.channels * a.pixels,
                units = numel / (plan.rows ? plan.width * plan.unit : a.pixels);
  plan.tasks = min(min(max(numel / kTaskElements, 1), kMaxTasks), units);
  plan.stream =
      numel * (a.is_bfloat16 ? 2 : 4) >= kStreamBytes && aligned && (plan.rows ? plan.width : a.pixels) % kLanes == 0;
  return plan;
}

// Where sums per sample go: gate_grad, gate_abs, out_grad, out_abs.
struct Gates {
  GateBuffer of[4];
  bool any() const { return of[0].data || of[1].data || of[2].data || of[3].data; }
  FP_INLINE void put(int which, int64_t n, int64_t c, double sum) const {
    const GateBuffer& g = of[which];
    if (g.data) g.data[n * g.stride + c] = static_cast<float>(sum);
  }
  template <class Lanes>
  FP_INLINE void put(int which, int64_t n, int64_t c, Lanes lanes, Vec sum, bool first) const {
    const GateBuffer& g = of[which];
    if (!g.data) return;
    float* p = g.data + n * g.stride + c;
    store(p, first ? sum : sum + load(p, lanes), lanes);
  }
};

template <class T>
class Call {
 public:
  Call(const BatchNormAct& args, const Plan& plan)
      : a(args),
        plan(plan),
        C(args.channels),
        per_channel(static_cast<double>(args.samples) * static_cast<double>(args.pixels)),
        padded(divide_up(plan.rows ? plan.fold * plan.width : C, kLanes) * kLanes),
        stride(divide_up(C, kLanes) * kLanes),
        scratch(6 * Scratch::bytes<float>(padded) + 2 * Scratch::bytes<double>(plan.tasks * stride)) {
    float** const arrays[] = {&k.mean, &k.scale, &k.bias, &k.slope, &k.offset, &shift};
    for (float** p : arrays) {
      *p = scratch.take<float>(padded);
      clear(*p);
    }
    for (double*& p : sums) p = scratch.take<double>(plan.tasks * stride);
  }

 protected:
  const BatchNormAct& a;
  const Plan plan;
  const int64_t C;
  const double per_channel;  // elements
  const int64_t padded;      // floats of a coefficient: one for each position of a row of the driver
  const int64_t stride;      // of sums, from task to task
  Scratch scratch;
  Coefficients k;
  float* shift;
  double* sums[2];  // (tasks, stride) each; task 0 is also the total

  template <class Body>
  void reduce(const Body& body, const Gates& gates = {}) {
    parallel_for(a.parallel_for, plan.tasks, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) reduce_task(body, task, gates);
    });
    for (double* s : sums)
      for (int64_t task = 1; task < plan.tasks; ++task)
        for (int64_t c = 0; c < C; ++c) s[c] += s[task * stride + c];
  }

  template <class Body>
  void map(const Body& body) {
    parallel_for(a.parallel_for, plan.tasks, [&](int64_t begin, int64_t end) {
      // backwards: what the reduction read last is still in the cache
      for (int64_t task = end - 1; task >= begin; --task) {
        if (!plan.rows) {
          map_planes(planes_of(task), body);
        } else {
          const Range rows = rows_of(task);
          const int64_t folded = rows.size() / plan.fold * plan.fold;
          map_rows(driver_rows(rows.begin, folded, plan.fold), body);
          map_rows(driver_rows(rows.begin + folded, rows.size() - folded, 1), body);
        }
        if (plan.stream) stream_fence();
      }
    });
  }

  // From one value a channel to one a position of a row of the driver.
  void spread(float* p) const {
    if (!plan.rows) return;
    for (int64_t c = C - 1; plan.repeat > 1 && c >= 0; --c)
      for (int64_t i = plan.repeat - 1; i >= 0; --i) p[c * plan.repeat + i] = p[c];
    for (int64_t i = plan.width; i < plan.fold * plan.width; ++i) p[i] = p[i - plan.width];
  }
  void spread_coefficients() const {
    float* const arrays[] = {k.mean, k.scale, k.bias, k.slope, k.offset};
    for (float* p : arrays) spread(p);
  }

  // sigmoid(weight) or weight, and its derivative
  double scale_of(int64_t c, double* derivative = nullptr) const {
    if (derivative) *derivative = 1;
    if (!a.weight.data) return 1;
    const double w = get(a.weight, c);
    if (!a.sigmoid) return w;
    const double e = __builtin_exp(w < 0 ? w : -w), small = e / (1 + e);  // sigmoid(-|w|), without overflow
    if (derivative) *derivative = small / (1 + e);
    return w < 0 ? small : 1 / (1 + e);
  }

  // Of both directions, from the same float rstd: the backward must find the forward's ReLU mask again.
  void set_affine(int64_t c, float mean, float rstd) {
    k.mean[c] = mean;
    k.scale[c] = static_cast<float>(scale_of(c) * rstd);
    k.bias[c] = a.bias.data ? static_cast<float>(get(a.bias, c)) : 0.0f;
  }

  void clear(float* p) const { __builtin_memset(p, 0, sizeof(float) * static_cast<size_t>(padded)); }

 private:
  Planes planes_of(int64_t task) const {
    const Range planes = part(a.samples * C, task, plan.tasks);
    return {planes.begin, planes.end, C, a.pixels, divide_up(a.pixels, kLanes)};
  }

  Range rows_of(int64_t task) const {
    const Range units = part(a.samples * a.pixels / plan.repeat / plan.unit, task, plan.tasks);
    return {units.begin * plan.unit, units.end * plan.unit};
  }

  // `count` rows in memory, a multiple of fold
  Rows driver_rows(int64_t first, int64_t count, int64_t fold) const {
    const int64_t words = divide_up(plan.width, kLanes);
    return {first * plan.width, first * words, count / fold, fold * plan.width, fold * words};
  }

  template <class Body>
  void reduce_task(const Body& body, int64_t task, const Gates& gates) {
    constexpr int kSums = Body::kSums;
    double *s = sums[0] + task * stride, *q = sums[1] + task * stride;
    for (int64_t i = 0; i < stride; ++i) s[i] = q[i] = 0;
    if (!plan.rows) {
      const auto sink = [&](int64_t n, int64_t c, const double* plane) {
        s[c] += plane[0];
        q[c] += plane[1];
        gates.put(0, n, c, plane[1] * k.scale[c] + plane[0] * k.bias[c]);
        for (int j = 2; j < kSums; ++j) gates.put(Body::kThird + j - 2, n, c, plane[j]);
      };
      if (a.pixels <= kRun)
        reduce_small_planes(planes_of(task), body, sink);
      else
        reduce_large_planes(planes_of(task), body, sink);
      return;
    }
    Scratch local(Scratch::bytes<float>(kSums * padded));
    float* const columns = local.take<float>(kSums * padded);
    const Range rows = rows_of(task);
    for (int64_t row = rows.begin; row < rows.end;) {
      const int64_t in_sample = row % plan.unit, left = gates.any() ? plan.unit - in_sample : rows.end - row;
      const int64_t count = min(kFlushRows * plan.fold, left), folded = count / plan.fold * plan.fold;
      for (int j = 0; j < kSums; ++j) clear(columns + j * padded);
      reduce_rows(driver_rows(row, folded, plan.fold), body, columns, padded);
      reduce_rows(driver_rows(row + folded, count - folded, 1), body, columns, padded);
      for (int j = 0; j < kSums; ++j) gather(columns + j * padded);
      add_rows<Body>(columns, s, q, gates, row / plan.unit, in_sample == 0);
      row += count;
    }
  }

  // From one sum a position of a row of the driver to one a channel.
  void gather(float* p) const {
    for (int64_t at = plan.width; at < plan.fold * plan.width; at += plan.width)
      for (int64_t i = 0; i < plan.width; ++i) p[i] += p[at + i];
    for (int64_t c = 0; plan.repeat > 1 && c < C; ++c) {
      float sum = 0;
      for (int64_t i = 0; i < plan.repeat; ++i) sum += p[c * plan.repeat + i];
      p[c] = sum;
    }
  }

  template <class Body>
  void add_rows(const float* columns, double* s, double* q, const Gates& gates, int64_t n, bool first) const {
    const auto add = [&](int64_t at, auto lanes) __attribute__((always_inline)) {
      const Vec vs = load(columns + at, lanes), vq = load(columns + padded + at, lanes);
      add_to(s + at, vs);
      add_to(q + at, vq);
      gates.put(0, n, at, lanes, fma(vq, load(k.scale + at), vs * load(k.bias + at)), first);
      for (int j = 2; j < Body::kSums; ++j)
        gates.put(Body::kThird + j - 2, n, at, lanes, load(columns + j * padded + at, lanes), first);
    };
    int64_t at = 0;
    for (; at + kLanes <= C; at += kLanes) add(at, All{});
    if (at < C) add(at, First{static_cast<int>(C - at)});
  }
};

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

// ---- forward ----

template <class T>
struct Forward : Call<T> {
  using Call<T>::C;
  using Call<T>::k;
  using Call<T>::plan;
  using Call<T>::shift;
  using Call<T>::sums;
  using Call<T>::per_channel;
  const BatchNormActForward& f;
  const T* const x;

  explicit Forward(const BatchNormActForward& args)
      : Call<T>(args, make_plan(args, args.mask, false, aligned(args.y))), f(args), x(static_cast<const T*>(args.x)) {}

  void operator()() {
    if (f.training) {
      choose_shift();
      this->reduce(Moments<T>{x, shift});
      if (!find_moments(false)) {
        this->reduce(Moments<T>{x, shift});
        find_moments(true);
      }
      for (int64_t c = 0; c < C; ++c) {
        set_channel(c, sums[0][c], sums[1][c]);
        update(f.running_mean, c, sums[0][c]);
        update(f.running_var, c, sums[1][c] * per_channel / (per_channel - 1));
      }
    } else {
      for (int64_t c = 0; c < C; ++c) set_channel(c, get(f.running_mean, c), get(f.running_var, c));
    }
    this->spread_coefficients();
    plan.stream ? normalize<kCanStream>() : normalize<false>();
  }

  // Any value near the mean will do: the mean of a few elements.
  void choose_shift() {
    if (plan.rows) {
      const int64_t rows = f.samples * f.pixels / plan.repeat, taken = min(rows, 16);
      const auto add = [&](const T* row, int64_t at, auto lanes) {
        store(shift + at, load(shift + at) + load(row + at, lanes));
      };
      for (int64_t j = 0; j < taken; ++j) {
        const T* row = x + rows * j / taken * plan.width;
        int64_t at = 0;
        for (; at + kLanes <= plan.width; at += kLanes) add(row, at, All{});
        if (at < plan.width) add(row, at, First{static_cast<int>(plan.width - at)});
      }
      for (int64_t c = 0; c < C; ++c) {
        float sum = 0;
        for (int64_t i = 0; i < plan.repeat; ++i) sum += shift[c * plan.repeat + i];
        shift[c] = is_finite(sum) ? sum / static_cast<float>(taken * plan.repeat) : 0.0f;
      }
    } else {
      const int64_t planes = min(f.samples, 4), taken = min(f.pixels, kLanes), middle = (f.pixels - taken) / 2;
      for (int64_t c = 0; c < C; ++c) {
        Vec sum = zero();
        for (int64_t j = 0; j < planes; ++j)
          sum = sum + load(x + (f.samples * j / planes * C + c) * f.pixels + middle, First{static_cast<int>(taken)});
        const float total = lane_sum(sum);
        shift[c] = is_finite(total) ? total / static_cast<float>(planes * taken) : 0.0f;
      }
    }
    this->spread(shift);
  }

  // Sums to mean and variance.  With d = mean - shift, var = E[(x - shift)^2] - d^2 loses log2(d^2 / var) bits: false
  // asks for another reduction, around the mean just found.
  bool find_moments(bool again) {
    bool good = true;
    for (int64_t c = 0; c < C; ++c) {
      const double d = sums[0][c] / per_channel, var = sums[1][c] / per_channel - d * d;
      sums[0][c] = shift[c * plan.repeat] + d;
      sums[1][c] = var > 0 ? var : 0;
      if (!is_finite(d) || !is_finite(var))
        exact_moments(c);
      else if (d * d > 4 * (sums[1][c] + f.eps))
        good = false;
    }
    if (good || again) return true;
    for (int64_t c = 0; c < C; ++c) shift[c] = is_finite(sums[0][c]) ? static_cast<float>(sums[0][c]) : 0.0f;
    this->spread(shift);
    return false;
  }

  // Infinities, NaN, or squares beyond float: the two passes of PyTorch, in double.
  void exact_moments(int64_t c) {
    const int64_t step = f.channels_last ? C : 1;
    const auto sum = [&](double mean, bool squares) {
      double total = 0;
      for (int64_t n = 0; n < f.samples; ++n) {
        const T* p = x + (f.channels_last ? n * f.pixels * C + c : (n * C + c) * f.pixels);
        for (int64_t i = 0; i < f.pixels; ++i) {
          const double d = value(p[i * step]) - mean;
          total += squares ? d * d : d;
        }
      }
      return total;
    };
    sums[0][c] = sum(0, false) / per_channel;
    sums[1][c] = sum(sums[0][c], true) / per_channel;
  }

  void set_channel(int64_t c, double mean, double var) {
    f.stats[c] = static_cast<float>(mean);
    f.stats[C + c] = static_cast<float>(1 / __builtin_sqrt(var + f.eps));
    this->set_affine(c, f.stats[c], f.stats[C + c]);
  }

  void update(const Parameter& running, int64_t c, double now) const {
    if (running.data) set(running, c, (1 - f.momentum) * get(running, c) + f.momentum * now);
  }

  template <bool kStream>
  void normalize() {
    if (f.residual && f.mask) return normalize<true, true, true, kStream>();
    if (f.residual) return f.relu ? normalize<true, true, false, kStream>() : normalize<true, false, false, kStream>();
    f.relu ? normalize<false, true, false, kStream>() : normalize<false, false, false, kStream>();
  }

  template <bool kResidual, bool kRelu, bool kMask, bool kStream>
  void normalize() {
    const T* residual = static_cast<const T*>(f.residual);
    this->map(Normalize<T, kResidual, kRelu, kMask, kStream>{x, residual, static_cast<T*>(f.y), f.mask, k});
  }
};

// ---- backward ----

template <class T>
struct Backward : Call<T> {
  using Call<T>::C;
  using Call<T>::k;
  using Call<T>::plan;
  using Call<T>::sums;
  using Call<T>::per_channel;
  const BatchNormActBackward& b;
  const Gates gates;

  explicit Backward(const BatchNormActBackward& args)
      : Backward(args, {{args.gate_grad, args.gate_abs, args.out_grad, args.out_abs}}) {}
  Backward(const BatchNormActBackward& args, const Gates& gates)
      : Call<T>(args, make_plan(args, args.mask, gates.any(), aligned(args.dx) && aligned(args.dresidual))),
        b(args),
        gates(gates) {}

  void operator()() {
    for (int64_t c = 0; c < C; ++c) this->set_affine(c, b.stats[c], b.stats[C + c]);
    if (!b.relu) return run<Relu::kNone>();
    if (b.mask) return run<Relu::kMask>();
    b.y ? run<Relu::kOutput>() : run<Relu::kRecompute>();
  }

  template <Relu kRelu>
  void run() {
    const auto as = [](const void* p) { return static_cast<const T*>(p); };
    const Grad<T, kRelu> grad = {as(b.x), as(b.dy), as(b.y), b.mask, k};
    this->spread_coefficients();
    reduce_grad(grad);
    for (int64_t c = 0; c < C; ++c) finish(c);
    if (!b.dx && !b.dresidual) return;
    this->spread(k.slope);
    this->spread(k.offset);
    if (!b.training)
      differentiate<kRelu, false, false>(grad);
    else
      plan.stream ? differentiate<kRelu, true, kCanStream>(grad) : differentiate<kRelu, true, false>(grad);
  }

  template <Relu kRelu>
  void reduce_grad(const Grad<T, kRelu>& grad) {
    if constexpr (kRelu == Relu::kNone || kRelu == Relu::kMask)  // else refused, or without a residual and so without y
      if (b.out_grad.data || b.out_abs.data) return reduce_grad<true>(grad);
    reduce_grad<false>(grad);
  }
  template <bool kOut, Relu kRelu>
  void reduce_grad(const Grad<T, kRelu>& grad) {
    b.gate_abs.data ? this->reduce(GradSums<T, kRelu, true, kOut>{grad}, gates)
                    : this->reduce(GradSums<T, kRelu, false, kOut>{grad}, gates);
  }

  void finish(int64_t c) {
    const double sum_dz = sums[0][c], rstd = b.stats[C + c], sum_dz_xhat = sums[1][c] * rstd;
    double derivative;
    const double scale = this->scale_of(c, &derivative) * rstd;
    set(b.dweight, c, sum_dz_xhat * derivative);
    set(b.dbias, c, sum_dz);
    k.slope[c] = static_cast<float>(-scale * rstd * sum_dz_xhat / per_channel);
    k.offset[c] = static_cast<float>(-scale * sum_dz / per_channel);
  }

  template <Relu kRelu, bool kTraining, bool kStream>
  void differentiate(const Grad<T, kRelu>& grad) {
    this->map(GradInput<T, kRelu, kTraining, kStream>{grad, static_cast<T*>(b.dx), static_cast<T*>(b.dresidual)});
  }
};

void forward(const BatchNormActForward& args) { args.is_bfloat16 ? Forward<BFloat16>(args)() : Forward<float>(args)(); }
void backward(const BatchNormActBackward& args) {
  args.is_bfloat16 ? Backward<BFloat16>(args)() : Backward<float>(args)();
}

}  // namespace

extern const BatchNormActKernels batch_norm_act = {forward, backward};

}  // namespace FP_ISA
}  // namespace fastprune
