// Batch norm with scale w or sigmoid(w), residual add and ReLU, forward and backward; any C, H * W, alignment; two
// layouts.
//
// A thread goes through its vectors of 16 bytes in the same order whenever it meets them.  The first `resident` of them
// wait for it in its own part of shared memory, so nothing but sums is ever shared between threads, and no barrier
// stands between load, sum and output.
//
//   one launch     a cluster of blocks owns a slab of whole channels from sums to output; sums travel through
//                  distributed shared memory.  Traffic in passes over a tensor: forward reads 1 and writes 1 (a
//                  residual adds a read), backward reads 2 and writes 1 (a residual: reads 3, writes 2).  Of vectors
//                  that do not fit, x (backward: dy or dz, and x) is read again, as far as L2 does not have it.
//   three launches sums, finalise, apply, for few channels with large planes: forward reads 2 and writes 1 (eval: apply
//                  alone, reads 1), backward reads 4 and writes 1 (a residual: reads 5, writes 2).
//
// Gate sums write 4 bytes per plane.  Sums of dy * y read y.  Every sum has a fixed order and no atomics.
//
// Planes that do not start on a vector (7 x 7) are read from the vector before; foreign elements are dropped after the
// load, and such vectors are stored element by element.  channels_last rows of a ragged C are joined until they are
// whole vectors.  What is not aligned at all is loaded element by element (kVec = 1).
#include <math.h>

#include <initializer_list>

#include "batch_norm_act.h"
#include "device.h"

namespace fastprune::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
__device__ inline float parameter(const Parameter& p, int64_t i, float absent) {
  if (!p.data) return absent;
  if (p.is_float) return static_cast<const float*>(p.data)[i];
  return to_float(static_cast<const T*>(p.data)[i]);
}
template <class T>
__device__ inline void set_parameter(const Parameter& p, int64_t i, float value) {
  if (!p.data) return;
  if (p.is_float)
    static_cast<float*>(p.data)[i] = value;
  else
    static_cast<T*>(p.data)[i] = from_float<T>(value);
}

__device__ inline float sigmoid(float w) { return 1.0f / (1.0f + expf(-w)); }
template <class T>
__device__ inline float scale_of(const Parameter& weight, bool bounded, int64_t c) {
  const float w = parameter<T>(weight, c, 1.0f);
  return bounded ? sigmoid(w) : w;
}
__device__ inline float rstd_of(double var, double eps) { return 1.0f / sqrtf(static_cast<float>(var + eps)); }
// By name, so that backward finds the very sign that forward saw.
__device__ inline float normalise(float x, float mean, float factor, float bias) {
  return fmaf(x - mean, factor, bias);
}

// ---- who does what

// Elements first .. last of the vector at `at` are a thread's; first == last: there is no vector.
struct Place {
  int64_t at;
  int first, last;
};

template <int kVec, bool kPlanes>
struct Walker {
  static constexpr int kAcc = kPlanes ? 1 : kVec;  // channels of a thread

  const Geometry& g;
  int row, rows;       // team among those of the same channels
  int member;          // lane in the team (planes), row within the warp's rows (columns)
  int local;           // first channel of the thread in the slab
  int channel;         // and in the tensor
  int64_t begin, end;  // segments
  int64_t from;        // planes: the part's first pixel
  int size;            // planes: pixels of the part

  __device__ explicit Walker(const Geometry& g) : g(g) {
    const int thread = threadIdx.x, lane = thread % kWarp;
    if (kPlanes) {
      const int teams = blockDim.x / g.lanes, team = thread / g.lanes;
      local = team % g.slab;
      row = team / g.slab;
      rows = teams / g.slab;
      member = thread % g.lanes;
      from = static_cast<int64_t>(blockIdx.z) * g.part;
      size = static_cast<int>(g.pixels - from < g.part ? g.pixels - from : g.part);
    } else {
      local = lane % g.lanes * kVec;
      row = thread / kWarp;
      rows = blockDim.x / kWarp;
      member = lane / g.lanes;
      from = size = 0;
    }
    channel = blockIdx.x * g.slab + local;
    begin = static_cast<int64_t>(blockIdx.y) * g.chunk;
    end = begin + g.chunk < g.segments ? begin + g.chunk : g.segments;
  }

  __device__ int64_t segment(int round) const { return begin + row + static_cast<int64_t>(round) * rows; }
  __device__ bool exists(int64_t segment) const { return segment < end && channel < g.channels; }
  // Whether a thread speaks for its team after a reduction.
  __device__ bool leads() const { return member == 0; }

  __device__ Place place(int round, int step) const {
    const int64_t n = segment(round);
    if (!exists(n)) return {0, 0, 0};
    if (kPlanes) {
      const int64_t start = (n * g.channels + channel) * g.pixels + from;
      const int skip = static_cast<int>(start % kVec), offset = (member + step * g.lanes) * kVec;
      const int first = skip - offset > 0 ? skip - offset : 0, left = skip + size - offset;
      if (left <= first) return {0, 0, 0};
      return {start - skip + offset, first, left < kVec ? left : kVec};
    }
    const int r = member + step * (kWarp / g.lanes);
    const int64_t at = n * g.pixels + r;
    if (r >= g.pixels || at >= g.rows) return {0, 0, 0};
    return {at * g.channels + channel, 0, kVec};
  }

  // Sums of the lanes that have the same channels, in every one of them (in the same order only in the leader).
  template <class F>
  __device__ void reduce(const F& join) const {
    for (int o = kPlanes ? g.lanes / 2 : kWarp / 2; o >= (kPlanes ? 1 : g.lanes); o /= 2) join(o);
  }
  // Where a leader's sums go among those to join: rows of slab channels.
  __device__ int slot() const { return row * g.slab + local; }
};

struct Cursor {
  int round, step;
  __device__ void advance(const Geometry& g) {
    if (++step == g.steps) {
      step = 0;
      ++round;
    }
  }
};
__device__ inline Cursor cursor(const Geometry& g, int i) { return {i / g.steps, i % g.steps}; }

// ---- loads and stores of a vector, or of an element where kVec is 1

template <class T, int kVec>
struct Item {
  Vector bits;
  __device__ void get(float (&v)[kVec]) const { unpack(bits, v, T()); }
  __device__ void put(const float (&v)[kVec]) { bits = pack(v, T()); }
};
template <class T>
struct Item<T, 1> {
  T bits;
  __device__ void get(float (&v)[1]) const { v[0] = to_float(bits); }
  __device__ void put(const float (&v)[1]) { bits = from_float<T>(v[0]); }
};

// A vector within which the tensor ends; out of line, since there is one of them.
template <class T>
__device__ __noinline__ Vector read_end(const T* from, int count) {
  float v[kElements<T>];
#pragma unroll
  for (int e = 0; e < kElements<T>; ++e) v[e] = e < count ? to_float(load(from + e)) : 0.0f;
  return pack(v, T());
}

// kConstant: nothing in this launch writes there.
template <class T, int kVec, bool kConstant = true>
__device__ inline Item<T, kVec> read(const void* base, const Place& p, int64_t numel) {
  Item<T, kVec> item = {};
  const T* from = static_cast<const T*>(base) + p.at;
  if (p.first == p.last) return item;
  if constexpr (kVec == 1) {
    item.bits = kConstant ? load_constant(from) : load(from);
  } else if (p.at + kVec <= numel) {
    const Vector* vector = reinterpret_cast<const Vector*>(from);
    item.bits = kConstant ? load_constant(vector) : load(vector);
  } else {
    item.bits = read_end<T>(from, static_cast<int>(numel - p.at));
  }
  return item;
}

template <class T, int kVec>
__device__ inline void write(void* base, const Place& p, const float (&v)[kVec]) {
  T* to = static_cast<T*>(base) + p.at;
  Item<T, kVec> item;
  item.put(v);
  if constexpr (kVec == 1) {
    if (p.first < p.last) store(to, item.bits);
  } else if (p.last - p.first == kVec) {
    store(reinterpret_cast<Vector*>(to), item.bits);
  } else {  // neighbours are another thread's
#pragma unroll
    for (int e = 0; e < kVec; ++e)
      if (e >= p.first && e < p.last) store(to + e, from_float<T>(v[e]));
  }
}

// A thread's own places in shared memory, one vector each per tensor.
struct Slots {
  Vector* first;
  __device__ Vector* at(int i) const { return first + i * static_cast<int>(blockDim.x) + threadIdx.x; }
};

template <class T, int kVec, class Walk>
__device__ inline void request(const Slots& slots, const void* base, const Walk& walk) {
  if constexpr (kVec > 1) {
    Cursor k = {0, 0};
    for (int i = 0; i < walk.g.resident; ++i, k.advance(walk.g)) {
      const Place p = walk.place(k.round, k.step);
      const int64_t left = (walk.g.numel - p.at) * static_cast<int64_t>(sizeof(T));
      const int bytes = p.first == p.last ? 0 : left < 16 ? static_cast<int>(left) : 16;
      copy_async(slots.at(i), static_cast<const T*>(base) + p.at, bytes);
    }
  }
}

// A tile's vectors, first..first + kUnroll - 1 of the thread's.  Tiles are wholly resident or not at all.
template <class T, int kVec, int kUnroll>
__device__ inline void fetch(Item<T, kVec> (&items)[kUnroll], const Slots& slots, const void* base,
                             const Place (&places)[kUnroll], int first, const Geometry& g, bool resident) {
  if (kVec > 1 && resident) {
    if constexpr (kVec > 1) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) items[u].bits = *slots.at(first + u);
    }
  } else {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) items[u] = read<T, kVec>(base, places[u], g.numel);
  }
}

// Shared memory of a block behind the slots.
struct Tables {
  double* partial;  // (3, slab): what the cluster exchanges
  float* joined;    // (5, slab): what every thread reads
  float* table;     // (rows, slab, 3): what the teams found
  __device__ Tables(unsigned char* shared, const Geometry& g, int streams) {
    partial = reinterpret_cast<double*>(shared + sizeof(Vector) * streams * g.resident * blockDim.x);
    joined = reinterpret_cast<float*>(partial + 3 * g.slab);
    table = joined + 5 * g.slab;
  }
};

// ---- forward

struct Moments {
  float count = 0.0f, mean = 0.0f, squares = 0.0f;  // squared deviations from the mean
  // Chan, Golub, LeVeque 1983
  __device__ void join(float n, float m, float s) {
    const float all = count + n;
    if (n == 0.0f) return;
    const float d = m - mean, w = n / all;
    mean = fabsf(mean) < INFINITY ? fmaf(d, w, mean) : mean + m;  // an infinite mean stays one
    squares += fmaf(d * d * count, w, s);
    count = all;
  }
};

template <class T, int kVec, bool kPlanes, int kUnroll>
__device__ inline void add_tile(const Item<T, kVec> (&items)[kUnroll], const Place (&places)[kUnroll],
                                const float (&shift)[kPlanes ? 1 : kVec], Moments (&out)[kPlanes ? 1 : kVec]) {
  float v[kUnroll][kVec];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) items[u].get(v[u]);
  const auto live = [&](int u, int e) { return e >= places[u].first && e < places[u].last; };
  float counts = 0.0f;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) counts += kPlanes ? places[u].last - places[u].first : places[u].last > 0;
  if (counts == 0.0f) return;
  const float inverse = 1.0f / counts;
  if constexpr (kPlanes) {
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int e = 0; e < kVec; ++e) sum += v[u][e] = live(u, e) ? v[u][e] - shift[0] : 0.0f;
    const float mean = sum * inverse;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        const float d = live(u, e) ? v[u][e] - mean : 0.0f;
        squares = fmaf(d, d, squares);
      }
    out[0].join(counts, mean, squares);
  } else {
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      float sum = 0.0f, squares = 0.0f;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) sum += v[u][e] = places[u].last > 0 ? v[u][e] - shift[e] : 0.0f;
      const float mean = sum * inverse;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const float d = places[u].last > 0 ? v[u][e] - mean : 0.0f;
        squares = fmaf(d, d, squares);
      }
      out[e].join(counts, mean, squares);
    }
  }
}

// Runs body(items..., places, first index) over tiles of kUnroll vectors, from .. to of the thread's.
template <int kUnroll, class Walk, class Body>
__device__ inline void tiles(const Walk& walk, int from, int to, const Body& body) {
  Cursor k = cursor(walk.g, from);
  for (int i = from; i < to; i += kUnroll) {
    Place places[kUnroll];
    Cursor at[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u, k.advance(walk.g)) {
      at[u] = k;
      places[u] = i + u < to ? walk.place(k.round, k.step) : Place{0, 0, 0};
    }
    body(places, at, i);
  }
}

// First what is not resident: for sums, copies to shared memory are under way meanwhile; for output, L2 may still have
// it.
template <int kUnroll, class Walk, class Body>
__device__ inline void two_passes(const Walk& walk, const Body& body) {
#pragma unroll 1
  for (int resident = 0; resident < 2; ++resident) {
    if (resident) copy_wait();
    tiles<kUnroll>(walk, resident ? 0 : walk.g.resident, resident ? walk.g.resident : walk.g.rounds * walk.g.steps,
                   [&](const auto& places, const auto& at, int i) { body(places, at, i, resident != 0); });
  }
}

// Means and variances of channel c of the tensor, its running statistics; returns the rstd.
template <class T>
__device__ inline float finish_statistics(const Forward& a, int64_t c, double mean, double var) {
  const float rstd = rstd_of(var, a.eps), m = static_cast<float>(mean);
  a.stats[c] = m;
  a.stats[a.g.parameters + c] = rstd;
  const float factor = a.cumulative ? 1.0f / static_cast<float>(*a.tracked + 1) : static_cast<float>(a.momentum);
  const auto update = [&](const Parameter& p, float now) {
    set_parameter<T>(p, c, (1.0f - factor) * parameter<T>(p, c, 0.0f) + factor * now);
  };
  update(a.running_mean, m);
  update(a.running_var, static_cast<float>(var * a.unbiased));
  return rstd;
}

template <class T, int kVec, bool kPlanes>
__global__ void __launch_bounds__(kMaxThreads, 1) forward_kernel(const Forward a) {
  constexpr int kUnroll = kTile;
  using Walk = Walker<kVec, kPlanes>;
  constexpr int kAcc = Walk::kAcc;
  FP_SHARED(shared);
  const Geometry& g = a.g;
  const Walk walk(g);
  const Slots slots = {reinterpret_cast<Vector*>(shared)};
  const Tables t(shared, g, 1);
  const int slab_start = blockIdx.x * g.slab;

  if (a.mode != kApply) {
    request<T, kVec>(slots, a.x, walk);
    // Sums are made of x - shift, the same shift in all blocks: a large offset then costs no digits.
    float shift[kAcc];
#pragma unroll
    for (int e = 0; e < kAcc; ++e) {
      shift[e] = 0.0f;
      if (walk.channel + e < g.channels) {
        const int64_t at = kPlanes ? static_cast<int64_t>(walk.channel) * g.pixels : walk.channel + e;
        shift[e] = to_float(load(static_cast<const T*>(a.x) + at));
        if (!(fabsf(shift[e]) < INFINITY)) shift[e] = 0.0f;  // inf must reach the mean as inf, not as inf - inf
      }
    }
    Moments moments[kAcc];
    two_passes<kUnroll>(walk, [&](const auto& places, const auto&, int i, bool resident) {
      Item<T, kVec> items[kUnroll];
      fetch<T, kVec>(items, slots, a.x, places, i, g, resident);
      add_tile<T, kVec, kPlanes>(items, places, shift, moments);
    });
#pragma unroll
    for (int e = 0; e < kAcc; ++e) {
      walk.reduce([&](int o) {
        const float n = __shfl_xor_sync(kAllLanes, moments[e].count, o);
        const float m = __shfl_xor_sync(kAllLanes, moments[e].mean, o);
        const float s = __shfl_xor_sync(kAllLanes, moments[e].squares, o);
        moments[e].join(n, m, s);
      });
      if (walk.leads()) {
        float* out = t.table + 3 * (walk.slot() + e);
        out[0] = moments[e].count;
        out[1] = moments[e].mean;
        out[2] = moments[e].squares;
        if (walk.row == 0) t.joined[walk.local + e] = shift[e];
      }
    }
    __syncthreads();
    for (int c = threadIdx.x; c < g.slab; c += blockDim.x) {
      double count = 0.0, sum = 0.0, squares = 0.0;
      for (int r = 0; r < walk.rows; ++r) {
        const float* in = t.table + 3 * (r * g.slab + c);
        count += in[0];
        if (in[0] > 0.0f) sum += static_cast<double>(in[0]) * in[1];
      }
      const double mean = count > 0.0 ? sum / count : 0.0;
      for (int r = 0; r < walk.rows; ++r) {
        const float* in = t.table + 3 * (r * g.slab + c);
        if (in[0] > 0.0f) squares += in[2] + in[0] * (in[1] - mean) * (in[1] - mean);
      }
      t.partial[c] = count;
      t.partial[g.slab + c] = mean + t.joined[c];
      t.partial[2 * g.slab + c] = squares;
    }
    if (a.tracked && !a.cumulative && threadIdx.x == 0 && blockIdx.x + blockIdx.y + blockIdx.z == 0) ++*a.tracked;
    if (a.mode == kSums) {
      const int64_t P = static_cast<int64_t>(gridDim.y) * gridDim.z, p = blockIdx.y * gridDim.z + blockIdx.z;
      for (int c = threadIdx.x; c < g.slab; c += blockDim.x)  // written by this very thread
        for (int k = 0; k < 3 && slab_start + c < g.channels; ++k)
          a.partials[(k * static_cast<int64_t>(g.channels) + slab_start + c) * P + p] = t.partial[k * g.slab + c];
      return;
    }
    cluster_sync();
    for (int c = threadIdx.x; c < g.slab; c += blockDim.x) {
      double sum = 0.0, squares = 0.0;
      for (int r = 0; r < static_cast<int>(gridDim.y); ++r) {
        const double n = remote(t.partial + c, r);
        if (n > 0.0) sum += n * remote(t.partial + g.slab + c, r);
      }
      const double mean = sum * a.inverse;
      for (int r = 0; r < static_cast<int>(gridDim.y); ++r) {
        const double n = remote(t.partial + c, r), d = remote(t.partial + g.slab + c, r) - mean;
        if (n > 0.0) squares += remote(t.partial + 2 * g.slab + c, r) + n * d * d;
      }
      const int channel = slab_start + c;
      const double var = squares * a.inverse;
      if (channel < g.channels) {
        const float rstd = blockIdx.y == 0 ? finish_statistics<T>(a, channel, mean, var) : rstd_of(var, a.eps);
        t.joined[c] = static_cast<float>(mean);
        t.joined[g.slab + c] = scale_of<T>(a.weight, a.sigmoid, channel) * rstd;
        t.joined[2 * g.slab + c] = parameter<T>(a.bias, channel, 0.0f);
      }
    }
    cluster_sync();  // also: a block may end only when no other reads its shared memory
  } else {
    for (int c = threadIdx.x; c < g.slab && slab_start + c < g.channels; c += blockDim.x) {
      const int channel = (slab_start + c) % g.parameters;
      float mean, rstd;
      if (a.training) {
        mean = a.stats[channel];
        rstd = a.stats[g.parameters + channel];
      } else {
        mean = parameter<T>(a.running_mean, channel, 0.0f);
        rstd = rstd_of(parameter<T>(a.running_var, channel, 1.0f), a.eps);
        if (slab_start + c < g.parameters && blockIdx.y + blockIdx.z == 0) {
          a.stats[channel] = mean;
          a.stats[g.parameters + channel] = rstd;
        }
      }
      t.joined[c] = mean;
      t.joined[g.slab + c] = scale_of<T>(a.weight, a.sigmoid, channel) * rstd;
      t.joined[2 * g.slab + c] = parameter<T>(a.bias, channel, 0.0f);
    }
    __syncthreads();
  }

  float mean[kAcc], factor[kAcc], bias[kAcc];
#pragma unroll
  for (int e = 0; e < kAcc; ++e) {
    mean[e] = t.joined[walk.local + e];
    factor[e] = t.joined[g.slab + walk.local + e];
    bias[e] = t.joined[2 * g.slab + walk.local + e];
  }
  const auto finish = [&](const Item<T, kVec>(&items)[kUnroll], const Place(&places)[kUnroll]) {
    Item<T, kVec> residual[kUnroll];
    if (a.residual) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) residual[u] = read<T, kVec>(a.residual, places[u], g.numel);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float v[kVec], r[kVec];
      items[u].get(v);
      if (a.residual) residual[u].get(r);
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        constexpr int kLast = kAcc - 1;
        const int k = e < kLast ? e : kLast;
        v[e] = normalise(v[e], mean[k], factor[k], bias[k]);
        if (a.residual) v[e] += r[e];
        if (a.relu) v[e] = v[e] <= 0.0f ? 0.0f : v[e];  // keeps nan, as torch.relu does
      }
      if (places[u].first < places[u].last) write<T, kVec>(a.y, places[u], v);
    }
  };
  two_passes<kUnroll>(walk, [&](const auto& places, const auto&, int i, bool resident) {
    Item<T, kVec> items[kUnroll];
    fetch<T, kVec>(items, slots, a.x, places, i, g, resident);
    finish(items, places);
  });
}

__device__ inline double shuffle(double v, int o) { return __shfl_xor_sync(kAllLanes, v, o); }
__device__ inline double sum_of_warp(double v) {
  for (int o = kWarp / 2; o > 0; o /= 2) v += shuffle(v, o);
  return v;
}

// A warp per channel: Chan's formula over its partials, in float64.  Reads 24 bytes of each.
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1) finalise_forward_kernel(const Forward a, const Finalise f) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (c >= f.parameters) return;  // the whole warp
  const int64_t plane = static_cast<int64_t>(f.parameters) * f.join * f.partials;
  const auto each = [&](const auto& body) {
    for (int j = 0; j < f.join; ++j)
      for (int p = threadIdx.x % kWarp; p < f.partials; p += kWarp) {
        const double* at = a.partials + (j * static_cast<int64_t>(f.parameters) + c) * f.partials + p;
        if (at[0] > 0.0) body(at);
      }
  };
  double sum = 0.0, squares = 0.0;
  each([&](const double* at) { sum += at[0] * at[plane]; });
  const double mean = sum_of_warp(sum) * a.inverse;
  each([&](const double* at) { squares += at[2 * plane] + at[0] * (at[plane] - mean) * (at[plane] - mean); });
  squares = sum_of_warp(squares);
  if (threadIdx.x % kWarp == 0) finish_statistics<T>(a, c, mean, squares * a.inverse);
}

// ---- backward

template <class T>
__device__ inline void finish_sums(const Backward& a, int64_t c, double dz, double dot, float rstd, bool write,
                                   float& mean_dz, float& slope) {
  const double r = rstd;
  if (write) {
    float dweight = static_cast<float>(dot * r);
    if (a.sigmoid) {
      const float s = sigmoid(parameter<T>(a.weight, c, 0.0f));
      dweight *= s * (1.0f - s);
    }
    set_parameter<T>(a.dweight, c, dweight);
    set_parameter<T>(a.dbias, c, static_cast<float>(dz));
  }
  mean_dz = static_cast<float>(dz * a.inverse);
  slope = static_cast<float>(dot * r * r * a.inverse);
}

template <class T, int kVec, bool kPlanes, bool kGates>
__global__ void __launch_bounds__(kMaxThreads, 1) backward_kernel(const Backward a) {
  constexpr int kUnroll = kGates && !kPlanes && kVec > 1 ? 1 : kTile;  // more would spill
  using Walk = Walker<kVec, kPlanes>;
  constexpr int kAcc = Walk::kAcc, kLast = kAcc - 1;
  FP_SHARED(shared);
  const Geometry& g = a.g;
  const Walk walk(g);
  const Slots x_slots = {reinterpret_cast<Vector*>(shared)};
  const Slots dy_slots = {x_slots.first + g.resident * static_cast<int>(blockDim.x)};
  const Tables t(shared, g, 2);
  const int slab_start = blockIdx.x * g.slab, all = g.rounds * g.steps;
  if (a.mode != kApply) {
    request<T, kVec>(x_slots, a.x, walk);
    request<T, kVec>(dy_slots, a.dy, walk);
  }
  for (int c = threadIdx.x; c < g.slab && slab_start + c < g.channels; c += blockDim.x) {
    const int channel = (slab_start + c) % g.parameters;
    t.joined[c] = a.stats[channel];
    t.joined[g.slab + c] = scale_of<T>(a.weight, a.sigmoid, channel) * a.stats[g.parameters + channel];
    t.joined[2 * g.slab + c] = parameter<T>(a.bias, channel, 0.0f);
    if (a.mode == kApply) {
      t.joined[3 * g.slab + c] = a.projection[channel];
      t.joined[4 * g.slab + c] = a.projection[g.parameters + channel];
    }
  }
  __syncthreads();
  float mean[kAcc], factor[kAcc], bias[kAcc];
#pragma unroll
  for (int e = 0; e < kAcc; ++e) {
    mean[e] = t.joined[walk.local + e];
    factor[e] = t.joined[g.slab + walk.local + e];
    bias[e] = t.joined[2 * g.slab + walk.local + e];
  }
  // dz is dy where the ReLU passed, judged by y if there is one, else by the forward done again.
  const auto passed = [&](float x, float y, int k) {
    return !((a.y ? y : normalise(x, mean[k], factor[k], bias[k])) <= 0.0f);
  };

  if (a.mode != kApply) {
    float sum_dz[kAcc] = {}, sum_dot[kAcc] = {};
    float dz_n[kAcc] = {}, dot_n[kAcc] = {}, abs_n[kAcc] = {}, out_n[kAcc] = {}, out_abs_n[kAcc] = {};
    const auto add = [&](Item<T, kVec>(&dys)[kUnroll], const Item<T, kVec>(&xs)[kUnroll], const Place(&places)[kUnroll],
                         const Cursor(&at)[kUnroll], int i, int to) {
      Item<T, kVec> ys[kUnroll];
      if (a.y) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) ys[u] = read<T, kVec>(a.y, places[u], g.numel);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        float x[kVec], dz[kVec], y[kVec];
        xs[u].get(x);
        dys[u].get(dz);
        if (a.y) ys[u].get(y);
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          const int k = e < kLast ? e : kLast;
          const bool live = e >= places[u].first && e < places[u].last;
          if (a.relu && !passed(x[e], y[e], k)) dz[e] = 0.0f;
          const float z = normalise(x[e], mean[k], factor[k], bias[k]);
          const float sum = live ? dz[e] : 0.0f, dot = live ? dz[e] * (x[e] - mean[k]) : 0.0f;
          if constexpr (kGates) {
            dz_n[k] += sum;
            dot_n[k] += dot;
            const float out = live ? dz[e] * (a.y ? y[e] : z) : 0.0f;
            abs_n[k] += live ? fabsf(dz[e] * z) : 0.0f;
            out_n[k] += out;
            out_abs_n[k] += fabsf(out);
          } else {
            sum_dz[k] += sum;
            sum_dot[k] += dot;
          }
        }
        if (places[u].first < places[u].last) {
          dys[u].put(dz);
          if (a.dresidual) write<T, kVec>(a.dresidual, places[u], dz);
        }
        if constexpr (kGates) {
          if (i + u < to && at[u].step == g.steps - 1) {  // the same for all threads
            const int64_t n = walk.segment(at[u].round);
            const auto put = [&](const GateBuffer& gate, float (&part)[kAcc]) {
#pragma unroll
              for (int k = 0; k < kAcc; ++k) {
                float v = part[k];
                part[k] = 0.0f;
                if (!gate.data) continue;
                walk.reduce([&](int o) { v += __shfl_xor_sync(kAllLanes, v, o); });
                if (walk.leads() && walk.exists(n)) gate.data[n * gate.stride + walk.channel + k] = v;
              }
            };
            float grad[kAcc];
#pragma unroll
            for (int k = 0; k < kAcc; ++k) {
              grad[k] = fmaf(factor[k], dot_n[k], bias[k] * dz_n[k]);
              sum_dz[k] += dz_n[k];
              sum_dot[k] += dot_n[k];
              dz_n[k] = dot_n[k] = 0.0f;
            }
            put(a.gate_grad, grad);
            put(a.gate_abs, abs_n);
            put(a.out_grad, out_n);
            put(a.out_abs, out_abs_n);
          }
        }
      }
    };
    // Segments in their order, so resident vectors first: a segment may have both.
    copy_wait();
    tiles<kUnroll>(walk, 0, all, [&](const auto& places, const auto& at, int i) {
      const bool resident = i < g.resident;
      Item<T, kVec> dys[kUnroll], xs[kUnroll];
      fetch<T, kVec>(xs, x_slots, a.x, places, i, g, resident);
      fetch<T, kVec>(dys, dy_slots, a.dy, places, i, g, resident);
      add(dys, xs, places, at, i, all);
      if constexpr (kVec > 1) {
        if (resident) {
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) *dy_slots.at(i + u) = dys[u].bits;  // dz from now on
        }
      }
    });
#pragma unroll
    for (int k = 0; k < kAcc; ++k) {
      walk.reduce([&](int o) {
        sum_dz[k] += __shfl_xor_sync(kAllLanes, sum_dz[k], o);
        sum_dot[k] += __shfl_xor_sync(kAllLanes, sum_dot[k], o);
      });
      if (walk.leads()) {
        float* out = t.table + 3 * (walk.slot() + k);
        out[0] = sum_dz[k];
        out[1] = sum_dot[k];
      }
    }
    __syncthreads();
    for (int c = threadIdx.x; c < g.slab; c += blockDim.x) {
      double dz = 0.0, dot = 0.0;
      for (int r = 0; r < walk.rows; ++r) {
        dz += t.table[3 * (r * g.slab + c)];
        dot += t.table[3 * (r * g.slab + c) + 1];
      }
      t.partial[c] = dz;
      t.partial[g.slab + c] = dot;
    }
    if (a.mode == kSums) {
      const int64_t P = static_cast<int64_t>(gridDim.y) * gridDim.z, p = blockIdx.y * gridDim.z + blockIdx.z;
      for (int c = threadIdx.x; c < g.slab; c += blockDim.x)
        for (int k = 0; k < 2 && slab_start + c < g.channels; ++k)
          a.partials[(k * static_cast<int64_t>(g.channels) + slab_start + c) * P + p] = t.partial[k * g.slab + c];
      return;
    }
    cluster_sync();
    for (int c = threadIdx.x; c < g.slab; c += blockDim.x) {
      double dz = 0.0, dot = 0.0;
      for (int r = 0; r < static_cast<int>(gridDim.y); ++r) {
        dz += remote(t.partial + c, r);
        dot += remote(t.partial + g.slab + c, r);
      }
      const int channel = slab_start + c;
      if (channel < g.channels)
        finish_sums<T>(a, channel, dz, dot, a.stats[g.parameters + channel], blockIdx.y == 0, t.joined[3 * g.slab + c],
                       t.joined[4 * g.slab + c]);
    }
    cluster_sync();
  }
  if (!a.dx) return;

  float mean_dz[kAcc], slope[kAcc];
#pragma unroll
  for (int e = 0; e < kAcc; ++e) {
    mean_dz[e] = a.training ? t.joined[3 * g.slab + walk.local + e] : 0.0f;
    slope[e] = a.training ? t.joined[4 * g.slab + walk.local + e] : 0.0f;
  }
  const auto finish = [&](const Item<T, kVec>& dz_item, const Item<T, kVec>& x_item, const Place& p, bool relu) {
    Item<T, kVec> y_item = {};
    if (relu && a.y) y_item = read<T, kVec>(a.y, p, g.numel);
    float x[kVec], dx[kVec], y[kVec];
    x_item.get(x);
    dz_item.get(dx);
    y_item.get(y);
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      const int k = e < kLast ? e : kLast;
      if (relu && !passed(x[e], y[e], k)) dx[e] = 0.0f;
      if (a.training) dx[e] = dx[e] - mean_dz[k] - (x[e] - mean[k]) * slope[k];
      dx[e] *= factor[k];
    }
    if (p.first < p.last) write<T, kVec>(a.dx, p, dx);
  };
  two_passes<kUnroll>(walk, [&](const auto& places, const auto&, int i, bool resident) {
    Item<T, kVec> dys[kUnroll], xs[kUnroll];
    fetch<T, kVec>(xs, x_slots, a.x, places, i, g, resident);
    if (!resident && a.dresidual) {  // dz already, written above or by the launch before
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) dys[u] = read<T, kVec, false>(a.dresidual, places[u], g.numel);
    } else {
      fetch<T, kVec>(dys, dy_slots, a.dy, places, i, g, resident);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) finish(dys[u], xs[u], places[u], a.relu && !resident && !a.dresidual);
  });
}

// A warp per channel.  Reads 16 bytes of each partial.
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1) finalise_backward_kernel(const Backward a, const Finalise f) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (c >= f.parameters) return;
  const int64_t plane = static_cast<int64_t>(f.parameters) * f.join * f.partials;
  double dz = 0.0, dot = 0.0;
  for (int j = 0; j < f.join; ++j)
    for (int p = threadIdx.x % kWarp; p < f.partials; p += kWarp) {
      const double* at = a.partials + (j * static_cast<int64_t>(f.parameters) + c) * f.partials + p;
      dz += at[0];
      dot += at[plane];
    }
  dz = sum_of_warp(dz);
  dot = sum_of_warp(dot);
  if (threadIdx.x % kWarp == 0)
    finish_sums<T>(a, c, dz, dot, a.stats[f.parameters + c], true, a.projection[c], a.projection[f.parameters + c]);
}

__global__ void join_gates_kernel(const JoinGates j) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, n = i / j.channels;
  if (n >= j.samples) return;
  const float* from = j.parts + n * j.rows * j.channels + i % j.channels;
  float sum = 0.0f;
  for (int r = 0; r < j.rows; ++r) sum += from[static_cast<int64_t>(r) * j.channels];
  j.gate.data[n * j.gate.stride + i % j.channels] = sum;
}

__global__ void count_kernel(int64_t* tracked) { ++*tracked; }

// ---- launches

// An error that was seen must not meet PyTorch once more.
cudaError_t seen(cudaError_t error) {
  const cudaError_t last = cudaGetLastError();
  return error != cudaSuccess ? error : last;
}

// `allowed` bytes of shared memory, and not `shared`, so that launches from two threads do not take it from each other.
template <class Kernel, class... Args>
cudaError_t launch(Kernel* kernel, dim3 grid, int threads, int cluster, size_t shared, int allowed, void* stream,
                   Args... args) {
  if (shared > 48 << 10) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, allowed);
    if (error != cudaSuccess) return seen(error);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = 1;
  attribute.val.clusterDim.y = cluster;
  attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1;
  return seen(cudaLaunchKernelEx(&config, kernel, args...));
}

template <class Kernel, class Args>
int launch_grid(const Launch& l, Kernel* kernel, const Args& args, int streams, void* stream) {
  const dim3 grid(l.slabs, l.chunks, l.parts);
  return launch(kernel, grid, l.threads, l.fused ? l.chunks : 1, shared_bytes(l, streams), l.allowed, stream, args);
}

template <class T>
int launch_forward_of(const Launch& l, const Forward& a, void* stream) {
  constexpr int kVec = kElements<T>;
  if (l.vectors)
    return launch_grid(l, l.planes ? forward_kernel<T, kVec, true> : forward_kernel<T, kVec, false>, a, 1, stream);
  return launch_grid(l, l.planes ? forward_kernel<T, 1, true> : forward_kernel<T, 1, false>, a, 1, stream);
}

template <class T>
int launch_backward_of(const Launch& l, const Backward& a, void* stream) {
  constexpr int kVec = kElements<T>;
  if (!l.vectors)  // rare: one kernel, with and without gates
    return launch_grid(l, l.planes ? backward_kernel<T, 1, true, true> : backward_kernel<T, 1, false, true>, a, 2,
                       stream);
  if (a.gates && a.mode != kApply)
    return launch_grid(l, l.planes ? backward_kernel<T, kVec, true, true> : backward_kernel<T, kVec, false, true>, a, 2,
                       stream);
  return launch_grid(l, l.planes ? backward_kernel<T, kVec, true, false> : backward_kernel<T, kVec, false, false>, a, 2,
                     stream);
}

template <class F>
int by_element(Element element, const F& f) {
  if (element == kBFloat16) return f(bfloat16());
  if (element == kFloat16) return f(float16());
  return f(float());
}

void announce(std::initializer_list<const void*> tensors, int64_t numel, Element element) {
  for (const void* t : tensors) FP_ANNOUNCE(t, numel * (element == kFloat32 ? 4 : 2));
}

constexpr int kFinaliseThreads = 4 * kWarp;
dim3 finalise_grid(const Finalise& f) { return dim3((f.parameters + 3) / 4); }

}  // namespace

int launch_forward(const Launch& l, const Forward& a, Element element, void* stream) {
  announce({a.x, a.residual, a.y}, a.g.numel, element);
  return by_element(element, [&](auto t) { return launch_forward_of<decltype(t)>(l, a, stream); });
}

int launch_backward(const Launch& l, const Backward& a, Element element, void* stream) {
  announce({a.dy, a.x, a.y, a.dx, a.dresidual}, a.g.numel, element);
  return by_element(element, [&](auto t) { return launch_backward_of<decltype(t)>(l, a, stream); });
}

int launch_finalise_forward(const Forward& a, const Finalise& f, Element element, void* stream) {
  return by_element(element, [&](auto t) -> int {
    return launch(finalise_forward_kernel<decltype(t)>, finalise_grid(f), kFinaliseThreads, 1, 0, 0, stream, a, f);
  });
}

int launch_finalise_backward(const Backward& a, const Finalise& f, Element element, void* stream) {
  return by_element(element, [&](auto t) -> int {
    return launch(finalise_backward_kernel<decltype(t)>, finalise_grid(f), kFinaliseThreads, 1, 0, 0, stream, a, f);
  });
}

int launch_join_gates(const JoinGates& j, void* stream) {
  const dim3 grid(static_cast<unsigned>((j.samples * j.channels + kMaxThreads - 1) / kMaxThreads));
  return launch(join_gates_kernel, grid, kMaxThreads, 1, 0, 0, stream, j);
}

int launch_count(int64_t* tracked, void* stream) { return launch(count_kernel, dim3(1), 1, 1, 0, 0, stream, tracked); }

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int limits_of(int device, Limits& limits) {
  int major = 0;
  cudaError_t error = cudaDeviceGetAttribute(&limits.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  limits.cluster = 1;
  if (error != cudaSuccess || major < 9) return seen(error);
  // The largest portable cluster that the device can hold when its blocks take all shared memory (a slice of a GPU
  // may hold less than 8).
  const auto kernel = backward_kernel<bfloat16, 8, true, false>;
  error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               limits.shared);
  for (int cluster = 8; error == cudaSuccess && cluster > 1; cluster /= 2) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(1, cluster);
    config.blockDim = dim3(limits.threads);
    config.dynamicSmemBytes = limits.shared;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = 1;
    attribute.val.clusterDim.y = cluster;
    attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (error == cudaSuccess && clusters > 0) {
      limits.cluster = cluster;
      break;
    }
  }
  return seen(error);
}

}  // namespace fastprune::cuda
