// Which kernels run a batch norm on the GPU, and how its elements are shared out.  Reasoned from bytes in flight and
// shared memory per multiprocessor; not yet measured on a GPU.  Everything that decides is in this file.
#include <algorithm>
#include <numeric>

#include "batch_norm_act.h"

namespace fastprune::cuda {
namespace {

constexpr int64_t kVectorBytes = 16;
constexpr int64_t kSmall = 16 << 20;   // bytes that L2 surely still has when they are read again (A100: 40 MB)
constexpr int64_t kTiny = 2 << 20;     // bytes below which one launch wins, whatever its loads look like
constexpr int kReserved = 1 << 10;     // bytes of shared memory that each block costs besides its own
constexpr int64_t kRun = 256;          // bytes of a sample that a slab of small planes should have side by side
constexpr int kBlocksAtLeast = 128;    // of a fused launch, so that most multiprocessors have one
constexpr double kKeepAtLeast = 0.25;  // of a large tensor in shared memory, else three launches

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t power_of_two(int64_t n) {  // not below n
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

struct Shape {
  Problem p;
  int64_t vec, rows, channels, pixels;  // columns: of joined rows
  int join;
};

// A segment's vectors shared by the lanes of a team, with as little idling as can be; wider teams when in doubt.
int lanes_for(int64_t vectors, int64_t smallest) {
  int best = 32;
  double most = 0;
  for (int lanes = 32; lanes >= smallest; lanes /= 2) {
    const double busy = static_cast<double>(vectors) / (ceil_div(vectors, lanes) * lanes);
    if (busy > most + 0.02) {
      most = busy;
      best = lanes;
    }
  }
  return best;
}

// Rounds and steps of a thread; what is kept in `room` bytes.  Returns the share that is kept.
double finish(Launch& l, const Shape& s, int64_t chunks, int64_t room) {
  Geometry& g = l.geometry;
  g.numel = s.p.samples * s.p.channels * s.p.pixels;
  g.parameters = static_cast<int>(s.p.channels);
  g.channels = static_cast<int>(s.channels);
  g.rows = l.planes ? 0 : s.rows;
  l.join = s.join;
  l.vectors = s.vec > 1;
  l.slabs = static_cast<int>(ceil_div(g.channels, g.slab));
  g.chunk = static_cast<int>(ceil_div(g.segments, chunks));
  l.chunks = static_cast<int>(l.fused ? chunks : ceil_div(g.segments, g.chunk));
  const int teams = l.planes ? l.threads / g.lanes / g.slab : l.threads / kWarp;
  g.rounds = static_cast<int>(ceil_div(g.chunk, teams));
  const bool whole = g.pixels % s.vec == 0 && g.part == g.pixels;
  const int64_t cover = l.planes ? (whole ? g.pixels / s.vec : (g.part + 2 * s.vec - 2) / s.vec) : g.pixels;
  g.steps = static_cast<int>(ceil_div(cover, l.planes ? g.lanes : kWarp / g.lanes));
  g.resident = 0;
  const int64_t all = static_cast<int64_t>(g.rounds) * g.steps, tile = kVectorBytes * l.threads * s.p.streams * kTile;
  const int64_t fits = l.fused && l.vectors ? std::max<int64_t>(room - shared_bytes(l, s.p.streams), 0) / tile : 0;
  g.resident = static_cast<int>(std::min(ceil_div(all, kTile), fits)) * kTile;
  return std::min(1.0, static_cast<double>(g.resident) / all);
}

Launch planes(const Shape& s, const Limits& limits, bool fused, int64_t chunks, int64_t room, double& kept) {
  Launch l;
  Geometry& g = l.geometry;
  l.planes = true;
  l.fused = fused;
  l.threads = limits.threads;
  l.allowed = limits.shared;
  g.segments = static_cast<int>(s.p.samples);
  g.pixels = g.part = static_cast<int>(s.pixels);
  const int64_t per_block = ceil_div(g.segments, chunks), cover = ceil_div(s.pixels, s.vec);
  // Channels of a slab: a run of some length in every sample.  No more teams than planes.
  int64_t slab = std::min(power_of_two(s.channels), power_of_two(ceil_div(kRun, s.pixels * s.p.itemsize)));
  slab = std::min<int64_t>(slab, l.threads / kWarp);
  const int64_t smallest = std::max(std::min<int64_t>(8, power_of_two(cover)),
                                    std::min<int64_t>(kWarp, l.threads / slab / power_of_two(per_block)));
  g.lanes = lanes_for(cover, std::max<int64_t>(smallest, 1));
  const int64_t teams = l.threads / g.lanes;
  if (!fused) slab = std::max(slab, std::min(power_of_two(s.channels), teams / power_of_two(per_block)));
  g.slab = static_cast<int>(std::min(slab, teams));
  if (!fused && !s.p.per_sample) {  // large planes of few channels and samples
    const int64_t blocks = ceil_div(s.channels, g.slab) * chunks, unit = s.vec * kWarp;
    const int64_t parts = std::min(ceil_div(limits.programs, blocks), ceil_div(s.pixels, unit));
    g.part = static_cast<int>(std::min(s.pixels, ceil_div(ceil_div(s.pixels, parts), unit) * unit));
    l.parts = static_cast<int>(ceil_div(s.pixels, g.part));
  }
  kept = finish(l, s, chunks, room);
  return l;
}

Launch columns(const Shape& s, const Limits& limits, bool fused, int lanes, int64_t chunks, int64_t room,
               double& kept) {
  Launch l;
  Geometry& g = l.geometry;
  l.fused = fused;
  l.threads = limits.threads;
  l.allowed = limits.shared;
  g.lanes = static_cast<int>(std::min<int64_t>(lanes, power_of_two(ceil_div(s.channels, s.vec))));
  g.slab = static_cast<int>(g.lanes * s.vec);
  if (s.p.per_sample) {
    // A warp takes whole segments, so large samples are halved as long as warps are wanting.
    const int64_t slabs = ceil_div(s.channels, g.slab), warps = limits.threads / kWarp, at_once = kWarp / g.lanes;
    const int64_t wanted = fused ? chunks * warps : ceil_div(limits.programs * warps, slabs);
    int64_t pixels = s.pixels;
    while (pixels % 2 == 0 && pixels >= 8 * at_once && s.p.samples * l.share < wanted) {
      pixels /= 2;
      l.share *= 2;
    }
    g.pixels = static_cast<int>(pixels);
    g.segments = static_cast<int>(s.p.samples * l.share);
  } else {
    g.pixels = 4 * kWarp / g.lanes;
    while (ceil_div(s.rows, g.pixels) > 1 << 30) g.pixels *= 2;
    g.segments = static_cast<int>(ceil_div(s.rows, g.pixels));
  }
  kept = finish(l, s, std::min<int64_t>(chunks, fused ? chunks : g.segments), room);
  return l;
}

}  // namespace

size_t shared_bytes(const Launch& l, int streams) {
  const Geometry& g = l.geometry;
  const size_t rows = l.planes ? l.threads / g.lanes / g.slab : l.threads / kWarp, slab = g.slab;
  return kVectorBytes * l.threads * streams * g.resident + slab * (3 * sizeof(double) + 5 * sizeof(float)) +
         3 * sizeof(float) * rows * slab;
}

Launch plan(const Problem& p, const Limits& limits) {
  Shape s = {p, p.aligned ? kVectorBytes / p.itemsize : 1, p.samples * p.pixels, p.channels, p.pixels, 1};
  const int64_t bytes = p.samples * p.channels * p.pixels * p.itemsize * p.streams;
  if (p.channels_last) {
    const int64_t join = s.vec / std::gcd(p.channels, s.vec);
    if (join > 1 && ((p.per_sample ? p.pixels : s.rows) % join || (bytes <= kTiny && limits.cluster > 0))) {
      s.vec = 1;  // element by element
    } else {
      s.join = static_cast<int>(join);
      s.rows /= join;
      s.pixels /= join;
      s.channels *= join;
    }
  }

  // One launch: as many blocks in a cluster as let two of them share a multiprocessor, so that one loads while the
  // other stores; else as many as there can be, each taking all shared memory.
  double kept = 0;
  const auto fused = [&](int64_t cluster, int64_t room) {
    if (!p.channels_last) return planes(s, limits, true, cluster, room, kept);
    // A sector of 32 bytes is the least to read of a row; two of them if they can be kept.
    Launch l = columns(s, limits, true, 4, cluster, room, kept);
    if (kept < 1) l = columns(s, limits, true, 2, cluster, room, kept);
    return l;
  };
  const int64_t most = std::min<int64_t>(limits.cluster, p.channels_last ? limits.cluster : p.samples);
  if (s.join == 1 && most > 0) {
    Launch l;
    for (int64_t cluster = 1; cluster <= most; cluster *= 2) {
      l = fused(cluster, (limits.shared - kReserved) / 2);
      const bool enough = bytes <= kTiny || int64_t{l.slabs} * l.chunks >= kBlocksAtLeast;
      if (kept == 1 && enough) return l;
      if (cluster * 2 > most) l = fused(cluster, limits.shared);
    }
    const bool enough = bytes <= kTiny || int64_t{l.slabs} * l.chunks >= kBlocksAtLeast / 2;
    if (enough && (kept >= kKeepAtLeast || bytes <= kSmall)) return l;
  }

  const auto split = [&](int64_t chunks) {
    return p.channels_last ? columns(s, limits, false, 8, chunks, 0, kept)
                           : planes(s, limits, false, std::min(chunks, p.samples), 0, kept);
  };
  return split(std::max<int64_t>(1, ceil_div(limits.programs, split(1).slabs)));
}

}  // namespace fastprune::cuda
