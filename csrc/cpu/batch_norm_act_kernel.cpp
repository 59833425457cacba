// Batch norm + residual + ReLU, forward and backward.  Compiled once per ISA with -DFP_ISA=...
//
// Both directions are a reduction (sums per channel) followed by a map.  Each is written once, as a body that works on
// one vector: Moments and Normalize forward, GradSums and GradInput backward.  Two pairs of drivers bring them to
// memory:
//   planes  NCHW: runs of H * W elements of one channel; parameters are broadcast.
//   rows    channels_last: rows of C elements; parameters are vectors.  Narrow rows are folded: F rows of C channels
//   are
//           one row of F * C, so that C = 3 fills its vectors.
// Sums are float within a plane (or 128 rows), double beyond.  Work is cut by shape alone, never by the number of
// threads, and partial sums are added in a fixed order, so results do not depend on it.
#include <stdlib.h>

#include "batch_norm_act.h"
#include "vec.h"

namespace fastprune {
namespace FP_ISA {
namespace {

constexpr int64_t kRun = 512, kSegment = 4096;       // elements of a plane that one float sum, and a sum of sums, take
constexpr int64_t kFlushRows = 128;           // the same for rows
constexpr int64_t kRowBlockBytes = 8 << 10;   // rows worked through together while parameters stay in registers
constexpr int64_t kSlabBytes = 384 << 10;     // slab of channels that stays in L2 between reduction and map
constexpr int64_t kResidentBytes = 12 << 20;  // tensors up to this stay in L3: whole passes in memory order
constexpr int64_t kStreamBytes = 24 << 20;    // outputs from this on bypass the caches
constexpr int64_t kChunkElements = 64 << 10;  // work worth a task
constexpr int64_t kMaxChunks = 64;

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
  const T* x;
  const float* shift;
  struct Params {
    Vec shift;
  };
  template <class At>
  FP_INLINE Params params(int64_t at) const {
    return {At::get(shift, at)};
  }
  FP_INLINE void fetch(int64_t i) const { prefetch(x + i); }
  template <class Lanes>
  FP_INLINE void operator()(int64_t i, int64_t, Lanes lanes, const Params& p, Vec& s, Vec& q) const {
    const Vec d = keep(load(x + i, lanes) - p.shift, live(lanes));
    s = s + d;
    q = fma(d, d, q);
  }
};

template <class T, bool kResidual, bool kRelu, bool kMask, bool kStream>
struct Normalize {
  const T *x, *residual;
  T* y;
  uint16_t* mask;
  const Coefficients& k;
  struct Params {
    Vec mean, scale, bias;
  };
  template <class At>
  FP_INLINE Params params(int64_t at) const {
    return {At::get(k.mean, at), At::get(k.scale, at), At::get(k.bias, at)};
  }
  FP_INLINE void fetch(int64_t i) const {
    prefetch(x + i);
    if (kResidual) prefetch(residual + i);
  }
  template <class Lanes>
  FP_INLINE void operator()(int64_t i, int64_t word, Lanes lanes, const Params& p) const {
    Vec z = fma(load(x + i, lanes) - p.mean, p.scale, p.bias);
    if (kResidual) z = z + load(residual + i, lanes);
    if (kMask) mask[word] = static_cast<uint16_t>(passes(z) & live(lanes));
    if (kRelu) z = relu(z);
    put(y + i, z, lanes);
  }
  static FP_INLINE void put(T* p, Vec a, All) { kStream ? stream(p, a) : store(p, a); }
  static FP_INLINE void put(T* p, Vec a, First n) { store(p, a, n); }
};

// How the backward knows where the ReLU passed.
enum class Relu { kNone, kRecompute, kMask, kOutput };

template <class T, Relu kRelu>
struct Grad {
  const T *x, *dy, *y;
  const uint16_t* mask;
  const Coefficients& k;
  struct Params {
    Vec mean, scale, bias;
  };
  template <class At>
  FP_INLINE Params params(int64_t at) const {
    if (kRelu != Relu::kRecompute) return {At::get(k.mean, at), zero(), zero()};
    return {At::get(k.mean, at), At::get(k.scale, at), At::get(k.bias, at)};
  }
  FP_INLINE void fetch(int64_t i) const {
    prefetch(x + i);
    prefetch(dy + i);
    if (kRelu == Relu::kOutput) prefetch(y + i);
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

// Sums of dz and dz * (x - mean).
template <class T, Relu kRelu>
struct GradSums : Grad<T, kRelu> {
  using Params = typename Grad<T, kRelu>::Params;
  template <class Lanes>
  FP_INLINE void operator()(int64_t i, int64_t word, Lanes lanes, const Params& p, Vec& s, Vec& q) const {
    const Vec d = load(this->x + i, lanes) - p.mean;
    const Vec g = this->dz(i, word, lanes, p, d);
    s = s + g;
    q = fma(g, d, q);
  }
};

template <class T, Relu kRelu, bool kTraining, bool kStream>
struct GradInput : Grad<T, kRelu> {
  T *dx, *dresidual;
  struct Params {
    typename Grad<T, kRelu>::Params z;
    Vec scale, slope, offset;
  };
  template <class At>
  FP_INLINE Params params(int64_t at) const {
    const Coefficients& k = this->k;
    const auto z = Grad<T, kRelu>::template params<At>(at);
    if (!kTraining) return {z, At::get(k.scale, at), zero(), zero()};
    return {z, At::get(k.scale, at), At::get(k.slope, at), At::get(k.offset, at)};
  }
  template <class Lanes>
  FP_INLINE void operator()(int64_t i, int64_t word, Lanes lanes, const Params& p) const {
    const Vec d = load(this->x + i, lanes) - p.z.mean;
    const Vec g = this->dz(i, word, lanes, p.z, d);
    if (dx) put(dx + i, kTraining ? fma(g, p.scale, fma(d, p.slope, p.offset)) : g * p.scale, lanes);
    if (kRelu != Relu::kNone && dresidual) put(dresidual + i, g, lanes);
  }
  static FP_INLINE void put(T* p, Vec a, All) { kStream ? stream(p, a) : store(p, a); }
  static FP_INLINE void put(T* p, Vec a, First n) { store(p, a, n); }
};

// ---- drivers ----

// f(offset, which of four sums, lanes) for the vectors of a run of `size` elements.
template <class F>
FP_INLINE void for_vectors(int64_t size, const F& f) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
    f(i, 0, All{});
    f(i + kLanes, 1, All{});
    f(i + 2 * kLanes, 2, All{});
    f(i + 3 * kLanes, 3, All{});
  }
  if (i + kLanes <= size) {
    f(i, 0, All{});
    i += kLanes;
    if (i + kLanes <= size) {
      f(i, 1, All{});
      i += kLanes;
      if (i + kLanes <= size) {
        f(i, 2, All{});
        i += kLanes;
      }
    }
  }
  if (i < size) f(i, 3, First{static_cast<int>(size - i)});
}

struct Planes {
  int64_t channels, pixels, words;
  Range n, c;  // the part to work on
};

template <class Body>
void map_planes(const Planes& v, const Body& body) {
  for (int64_t n = v.n.begin; n < v.n.end; ++n)
    for (int64_t c = v.c.begin; c < v.c.end; ++c) {
      const auto p = body.template params<Broadcast>(c);
      const int64_t plane = n * v.channels + c, first = plane * v.pixels, word = plane * v.words;
      for_vectors(v.pixels, [&](int64_t i, int, auto lanes)
                                __attribute__((always_inline)) { body(first + i, word + i / kLanes, lanes, p); });
    }
}

struct Sums {
  Vec s = zero(), q = zero();
  FP_INLINE void add(Vec more_s, Vec more_q) {
    s = s + more_s;
    q = q + more_q;
  }
};

// sink(n, c, sum, sum) for every plane, in order.
template <class Body, class Sink>
void reduce_planes(const Planes& v, const Body& body, const Sink& sink) {
  Vec s[kLanes], q[kLanes];  // of the last planes: the lanes of 16 of them are added up together
  int waiting = 0;
  int64_t out_n = v.n.begin, out_c = v.c.begin;
  const auto flush = [&] {
    for (int k = waiting; k < kLanes; ++k) s[k] = q[k] = zero();
    float sums[2][kLanes];
    lane_sums(s, sums[0]);
    lane_sums(q, sums[1]);
    for (int k = 0; k < waiting; ++k) {
      sink(out_n, out_c, sums[0][k], sums[1][k]);
      if (++out_c == v.c.end) out_c = v.c.begin, ++out_n;
    }
    waiting = 0;
  };
  for (int64_t n = v.n.begin; n < v.n.end; ++n)
    for (int64_t c = v.c.begin; c < v.c.end; ++c) {
      const auto p = body.template params<Broadcast>(c);
      const int64_t plane = n * v.channels + c, first = plane * v.pixels, word = plane * v.words;
      Sums total;
      for (int64_t start = 0; start < v.pixels;) {  // three levels of sums: rounding errors stay near those of a tree
        Sums part;
        for (const int64_t end = min(start + kSegment, v.pixels); start < end; start += kRun) {
          Vec a[4] = {zero(), zero(), zero(), zero()}, b[4] = {zero(), zero(), zero(), zero()};
          for_vectors(min(kRun, end - start), [&](int64_t i, int k, auto lanes) __attribute__((always_inline)) {
            body(first + start + i, word + (start + i) / kLanes, lanes, p, a[k], b[k]);
          });
          part.add((a[0] + a[1]) + (a[2] + a[3]), (b[0] + b[1]) + (b[2] + b[3]));
        }
        total.add(part.s, part.q);
      }
      s[waiting] = total.s;
      q[waiting] = total.q;
      if (++waiting == kLanes) flush();
    }
  flush();
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
  for (; at + kGroup * kLanes <= width; at += kGroup * kLanes) f(at, Count<kGroup>{}, All{});
  for (; at + kLanes <= width; at += kLanes) f(at, Count<1>{}, All{});
  if (at < width) f(at, Count<1>{}, First{static_cast<int>(width - at)});
}

// Rows in blocks, columns in groups, so that parameters stay in registers over the rows of a block.
template <class F>
FP_INLINE void for_blocks(const Rows& v, int64_t row_bytes, const F& f) {
  const int64_t block = max(1, kRowBlockBytes / row_bytes);
  for (int64_t row = 0; row < v.count; row += block) {
    const Rows rows = {v.element + row * v.width, v.word + row * v.words, min(block, v.count - row), v.width, v.words};
    for_columns(v.width,
                [&](int64_t at, auto count, auto lanes) __attribute__((always_inline)) { f(rows, at, count, lanes); });
  }
}

template <class T, class Body>
void map_rows(const Rows& all, const Body& body) {
  for_blocks(all, all.width * static_cast<int64_t>(sizeof(T)),
             [&](const Rows& v, int64_t at, auto count, auto lanes) __attribute__((always_inline)) {
               constexpr int kCount = decltype(count)::value;
               typename Body::Params p[kCount];
               for (int k = 0; k < kCount; ++k) p[k] = body.template params<Lanewise>(at + k * kLanes);
               for (int64_t row = 0; row < v.count; ++row)
                 for (int k = 0; k < kCount; ++k)
                   body(v.element + row * v.width + at + k * kLanes, v.word + row * v.words + at / kLanes + k, lanes,
                        p[k]);
             });
}

// Adds the sums of each column to s and q.
template <class T, class Body>
void reduce_rows(const Rows& all, const Body& body, float* s, float* q) {
  for_blocks(all, all.width * static_cast<int64_t>(sizeof(T)),
             [&](const Rows& v, int64_t at, auto count, auto lanes) __attribute__((always_inline)) {
               constexpr int kCount = decltype(count)::value;
               typename Body::Params p[kCount];
               Vec a[kCount], b[kCount];
               for (int k = 0; k < kCount; ++k) {
                 p[k] = body.template params<Lanewise>(at + k * kLanes);
                 a[k] = load(s + at + k * kLanes);
                 b[k] = load(q + at + k * kLanes);
               }
               for (int64_t row = 0; row < v.count; ++row)
                 for (int k = 0; k < kCount; ++k)
                   body(v.element + row * v.width + at + k * kLanes, v.word + row * v.words + at / kLanes + k, lanes,
                        p[k], a[k], b[k]);
               for (int k = 0; k < kCount; ++k) {
                 store(s + at + k * kLanes, a[k]);
                 store(q + at + k * kLanes, b[k]);
               }
             });
}

// ---- one call ----

// How a call is cut into tasks.
struct Plan {
  int64_t fold = 1;  // rows of C elements that make one row of the kernels (channels_last)
  int64_t block;     // channels taken through reduction and map before the next ones; C: whole passes
  int64_t chunks;    // tasks of a whole pass
  int64_t unit = 1;  // a chunk is a multiple of this many samples (NCHW) or rows (channels_last)
  bool stream;       // outputs bypass the caches
};

// Rows to fold: full groups of vectors, with little lost at the end.
int64_t choose_fold(int64_t channels) {
  for (int64_t fold = 1; fold < kLanes; ++fold) {
    const int64_t width = fold * channels, lost = divide_up(width, kLanes) * kLanes - width;
    if (width >= 4 * kLanes && lost * kLanes <= width) return fold;
  }
  return kLanes;
}

// streams: tensors that the reduction reads; masked: rows must match those of the mask; gated: sums are per sample.
Plan make_plan(const BatchNormAct& a, int64_t streams, bool masked, bool gated, bool aligned) {
  Plan plan;
  const int64_t numel = a.samples * a.channels * a.pixels, bytes = numel * (a.is_bfloat16 ? 2 : 4);
  plan.stream = bytes >= kStreamBytes && aligned && (a.channels_last ? a.channels : a.pixels) % kLanes == 0;
  plan.chunks = min(max(numel / kChunkElements, 1), kMaxChunks);
  plan.block = a.channels;
  if (a.channels_last) {
    if (!masked || a.channels % kLanes == 0) plan.fold = choose_fold(a.channels);
    if (gated) plan.unit = a.pixels;
    plan.chunks = min(plan.chunks, a.samples * a.pixels / plan.unit);
  } else if (streams * bytes > kResidentBytes || plan.chunks > a.samples) {
    plan.block = min(a.channels, max(1, kSlabBytes * a.channels / (streams * bytes)));
    plan.chunks = 1;
  }
  return plan;
}

template <class T>
class Call {
 public:
  Call(const BatchNormAct& args, const Plan& plan)
      : a(args),
        plan(plan),
        C(args.channels),
        stride(divide_up(C, kLanes) * kLanes),
        padded(divide_up(plan.fold * C, kLanes) * kLanes),
        per_channel(static_cast<double>(args.samples) * static_cast<double>(args.pixels)),
        scratch(6 * Scratch::bytes<float>(padded) + 2 * Scratch::bytes<double>(plan.chunks * stride)) {
    float** const arrays[] = {&k.mean, &k.scale, &k.bias, &k.slope, &k.offset, &shift};
    for (float** p : arrays) {
      *p = scratch.take<float>(padded);
      __builtin_memset(*p, 0, sizeof(float) * static_cast<size_t>(padded));
    }
    sums[0] = scratch.take<double>(plan.chunks * stride);
    sums[1] = scratch.take<double>(plan.chunks * stride);
  }

  const BatchNormAct& a;
  const Plan plan;
  const int64_t C, stride, padded;  // stride: of sums from chunk to chunk; padded: floats per coefficient
  const double per_channel;         // elements
  Scratch scratch;
  Coefficients k;
  float* shift;
  double* sums[2];  // (chunks, stride)

  // prepare(channels); reduce(channels, chunk) makes sums; finish(channels, again) turns them into coefficients, or
  // asks for another reduction by returning false; map(channels, chunk) writes the outputs.
  template <class Prepare, class Reduce, class Finish, class Map>
  void run(const Prepare& prepare, const Reduce& reduce, const Finish& finish, const Map& map) {
    if (plan.block < C) {
      parallel_for(a.parallel_for, divide_up(C, plan.block), [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          const Range c = {block * plan.block, min(C, (block + 1) * plan.block)};
          prepare(c);
          for (bool again = false;; again = true) {
            reduce(c, 0);
            if (finish(c, again)) break;
          }
          map(c, 0);
        }
      });
      return;
    }
    const Range c = {0, C};
    prepare(c);
    for (bool again = false;; again = true) {
      parallel_for(a.parallel_for, plan.chunks, [&](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; ++chunk) reduce(c, chunk);
      });
      add_chunks();
      if (finish(c, again)) break;
    }
    run_map(map);
  }

  template <class Map>
  void run_map(const Map& map) {
    parallel_for(a.parallel_for, plan.chunks, [&](int64_t begin, int64_t end) {
      // backwards: what the reduction read last is still in the cache
      for (int64_t chunk = end - 1; chunk >= begin; --chunk) map({0, C}, chunk);
    });
  }

  // Adds up body over a chunk; gate_grad, if given, gets scale * sum of dz (x - mean) + bias * sum of dz per sample.
  template <class Body>
  void reduce(const Body& body, Range c, int64_t chunk, float* gate_grad = nullptr) {
    double *s = sums[0] + chunk * stride, *q = sums[1] + chunk * stride;
    for (int64_t i = c.begin; i < c.end; ++i) s[i] = q[i] = 0;
    if (a.channels_last) return reduce_chunk_of_rows(body, rows_of(chunk), s, q, gate_grad);
    reduce_planes(planes_of(chunk, c), body, [&](int64_t n, int64_t i, float plane_s, float plane_q) {
      s[i] += plane_s;
      q[i] += plane_q;
      if (gate_grad) gate_grad[n * C + i] = plane_q * k.scale[i] + plane_s * k.bias[i];
    });
  }

  template <class Body>
  void map(const Body& body, Range c, int64_t chunk) {
    if (!a.channels_last) {
      map_planes(planes_of(chunk, c), body);
    } else {
      const Range rows = rows_of(chunk);
      const int64_t folded = rows.size() / plan.fold;
      map_rows<T>(folded_rows(rows.begin, folded, plan.fold), body);
      map_rows<T>(folded_rows(rows.begin + folded * plan.fold, rows.size() - folded * plan.fold, 1), body);
    }
    if (plan.stream) stream_fence();
  }

  // Repeats the coefficients of the channels for every row of a fold.
  void repeat(float* p) const {
    for (int64_t i = C; i < plan.fold * C; ++i) p[i] = p[i - C];
  }

  void repeat_all() const {
    float* const arrays[] = {k.mean, k.scale, k.bias, k.slope, k.offset};
    for (float* p : arrays) repeat(p);
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

  Range rows_of(int64_t chunk) const {
    const Range units = part(a.samples * a.pixels / plan.unit, chunk, plan.chunks);
    return {units.begin * plan.unit, units.end * plan.unit};
  }

 private:
  Planes planes_of(int64_t chunk, Range c) const {
    return {C, a.pixels, divide_up(a.pixels, kLanes), part(a.samples, chunk, plan.chunks), c};
  }

  Rows folded_rows(int64_t row, int64_t count, int64_t fold) const {
    const int64_t words = divide_up(C, kLanes);
    return {row * C, row * words, count, fold * C, fold * words};
  }

  template <class Body>
  void reduce_chunk_of_rows(const Body& body, Range rows, double* s, double* q, float* gate_grad) {
    Scratch local(2 * Scratch::bytes<float>(padded));
    float *row_s = local.take<float>(padded), *row_q = local.take<float>(padded);
    const auto clear = [&] {
      __builtin_memset(row_s, 0, sizeof(float) * static_cast<size_t>(padded));
      __builtin_memset(row_q, 0, sizeof(float) * static_cast<size_t>(padded));
    };
    clear();
    const int64_t most = kFlushRows * plan.fold;
    for (int64_t row = rows.begin; row < rows.end;) {
      const int64_t in_sample = row % a.pixels;
      const int64_t count = min(most, gate_grad ? a.pixels - in_sample : rows.end - row), folded = count / plan.fold;
      reduce_rows<T>(folded_rows(row, folded, plan.fold), body, row_s, row_q);
      reduce_rows<T>(folded_rows(row + folded * plan.fold, count - folded * plan.fold, 1), body, row_s, row_q);
      add_rows(row_s, row_q, s, q, gate_grad ? gate_grad + row / a.pixels * C : nullptr, in_sample == 0);
      clear();
      row += count;
    }
  }

  void add_rows(float* row_s, float* row_q, double* s, double* q, float* gate_grad, bool first) const {
    for (int64_t at = C; at < plan.fold * C; at += C) {
#pragma omp simd
      for (int64_t i = 0; i < C; ++i) {
        row_s[i] += row_s[at + i];
        row_q[i] += row_q[at + i];
      }
    }
    const auto add = [&](int64_t at, auto lanes) __attribute__((always_inline)) {
      const Vec vs = load(row_s + at, lanes), vq = load(row_q + at, lanes);
      add_to(s + at, vs);
      add_to(q + at, vq);
      if (!gate_grad) return;
      const Vec g = fma(vq, load(k.scale + at), vs * load(k.bias + at));
      store(gate_grad + at, first ? g : g + load(gate_grad + at, lanes), lanes);
    };
    int64_t at = 0;
    for (; at + kLanes <= C; at += kLanes) add(at, All{});
    if (at < C) add(at, First{static_cast<int>(C - at)});
  }

  void add_chunks() {
    for (double* s : sums)
      for (int64_t chunk = 1; chunk < plan.chunks; ++chunk)
        for (int64_t c = 0; c < C; ++c) s[c] += s[chunk * stride + c];
  }
};

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

// ---- forward ----

template <class T>
struct Forward : Call<T> {
  using Call<T>::C;
  using Call<T>::k;
  using Call<T>::shift;
  using Call<T>::sums;
  using Call<T>::per_channel;
  const BatchNormActForward& f;
  const T* const x;

  explicit Forward(const BatchNormActForward& args)
      : Call<T>(args, make_plan(args, 1, args.mask, false, aligned(args.y))),
        f(args),
        x(static_cast<const T*>(args.x)) {}

  void operator()() {
    const auto normalize = [&](Range c, int64_t chunk) {
      this->plan.stream ? normalize_to<true>(c, chunk) : normalize_to<false>(c, chunk);
    };
    if (!f.training) {
      for (int64_t c = 0; c < C; ++c) set_channel(c, get(f.running_mean, c), get(f.running_var, c));
      this->repeat_all();
      return this->run_map(normalize);
    }
    this->run([&](Range c) { choose_shift(c); },
              [&](Range c, int64_t chunk) { this->reduce(Moments<T>{x, shift}, c, chunk); },
              [&](Range c, bool again) { return finish(c, again); }, normalize);
  }

  // Any value near the mean will do: the mean of a few elements.
  void choose_shift(Range c) {
    if (f.channels_last) {
      const int64_t rows = f.samples * f.pixels, taken = min(rows, 16);
      for (int64_t j = 0; j < taken; ++j)
        for (int64_t i = 0; i < C; i += kLanes) {
          const T* p = x + rows * j / taken * C + i;
          store(shift + i, load(shift + i) + (i + kLanes <= C ? load(p) : load(p, First{static_cast<int>(C - i)})));
        }
      for (int64_t i = 0; i < C; ++i) shift[i] = is_finite(shift[i]) ? shift[i] / static_cast<float>(taken) : 0.0f;
      return this->repeat(shift);
    }
    const int64_t planes = min(f.samples, 4), taken = min(f.pixels, kLanes), middle = (f.pixels - taken) / 2;
    for (int64_t i = c.begin; i < c.end; ++i) {
      Vec sum = zero();
      for (int64_t j = 0; j < planes; ++j)
        sum = sum + load(x + (f.samples * j / planes * C + i) * f.pixels + middle, First{static_cast<int>(taken)});
      const float total = lane_sum(sum);
      shift[i] = is_finite(total) ? total / static_cast<float>(planes * taken) : 0.0f;
    }
  }

  // With d = mean - shift, var = E[(x - shift)^2] - d^2 loses log2(d^2 / var) bits: then the reduction is done again
  // around the mean just found.
  bool finish(Range c, bool again) {
    bool good = true;
    for (int64_t i = c.begin; i < c.end; ++i) {
      const double d = sums[0][i] / per_channel, var = sums[1][i] / per_channel - d * d, mean = shift[i] + d;
      const bool finite = is_finite(mean) && is_finite(var);
      if (finite && !again && d * d > 4 * (var + f.eps)) {
        shift[i] = static_cast<float>(mean);
        good = false;
      }
      sums[0][i] = mean;
      sums[1][i] = var > 0 ? var : 0;
      if (!finite) exact_moments(i);
    }
    if (!good) {
      if (f.channels_last) this->repeat(shift);
      return false;
    }
    for (int64_t i = c.begin; i < c.end; ++i) {
      set_channel(i, sums[0][i], sums[1][i]);
      update(f.running_mean, i, sums[0][i]);
      update(f.running_var, i, sums[1][i] * per_channel / (per_channel - 1));
    }
    this->repeat_all();
    return true;
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
  void normalize_to(Range c, int64_t chunk) {
    if (!f.residual)
      return f.relu ? normalize<false, true, false, kStream>(c, chunk)
                    : normalize<false, false, false, kStream>(c, chunk);
    if (!f.relu) return normalize<true, false, false, kStream>(c, chunk);
    f.mask ? normalize<true, true, true, kStream>(c, chunk) : normalize<true, true, false, kStream>(c, chunk);
  }

  template <bool kResidual, bool kRelu, bool kMask, bool kStream>
  void normalize(Range c, int64_t chunk) {
    const T* residual = static_cast<const T*>(f.residual);
    this->map(Normalize<T, kResidual, kRelu, kMask, kStream>{x, residual, static_cast<T*>(f.y), f.mask, k}, c, chunk);
  }
};

// ---- backward ----

template <class T>
struct Backward : Call<T> {
  using Call<T>::C;
  using Call<T>::k;
  using Call<T>::sums;
  using Call<T>::per_channel;
  const BatchNormActBackward& b;

  explicit Backward(const BatchNormActBackward& args)
      : Call<T>(args, make_plan(args, 2, args.mask, args.gate_grad, aligned(args.dx) && aligned(args.dresidual))),
        b(args) {}

  void operator()() {
    for (int64_t c = 0; c < C; ++c) this->set_affine(c, b.stats[c], b.stats[C + c]);
    this->repeat_all();
    if (!b.relu) return run<Relu::kNone>();
    if (b.mask) return run<Relu::kMask>();
    b.y ? run<Relu::kOutput>() : run<Relu::kRecompute>();
  }

  template <Relu kRelu>
  void run() {
    const Grad<T, kRelu> grad = {static_cast<const T*>(b.x), static_cast<const T*>(b.dy), static_cast<const T*>(b.y),
                                 b.mask, k};
    Call<T>::run([](Range) {},
                 [&](Range c, int64_t chunk) { this->reduce(GradSums<T, kRelu>{grad}, c, chunk, b.gate_grad); },
                 [&](Range c, bool) { return finish(c); },
                 [&](Range c, int64_t chunk) {
                   if (!b.dx && !b.dresidual) return;
                   if (this->plan.stream)
                     b.training ? differentiate<kRelu, true, true>(grad, c, chunk)
                                : differentiate<kRelu, false, true>(grad, c, chunk);
                   else
                     b.training ? differentiate<kRelu, true, false>(grad, c, chunk)
                                : differentiate<kRelu, false, false>(grad, c, chunk);
                 });
  }

  template <Relu kRelu, bool kTraining, bool kStream>
  void differentiate(const Grad<T, kRelu>& grad, Range c, int64_t chunk) {
    this->map(GradInput<T, kRelu, kTraining, kStream>{grad, static_cast<T*>(b.dx), static_cast<T*>(b.dresidual)}, c,
              chunk);
  }

  bool finish(Range c) {
    for (int64_t i = c.begin; i < c.end; ++i) {
      const double sum_dz = sums[0][i], rstd = b.stats[C + i], sum_dz_xhat = sums[1][i] * rstd;
      double derivative;
      const double scale = this->scale_of(i, &derivative) * rstd;
      set(b.dweight, i, sum_dz_xhat * derivative);
      set(b.dbias, i, sum_dz);
      k.slope[i] = static_cast<float>(-scale * rstd * sum_dz_xhat / per_channel);
      k.offset[i] = static_cast<float>(-scale * sum_dz / per_channel);
    }
    this->repeat_all();
    return true;
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
