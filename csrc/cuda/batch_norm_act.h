// batch_norm_act in CUDA C++: arguments and geometry of its kernels.  No torch, no CUDA header.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace fastprune::cuda {

enum Element { kFloat32, kBFloat16, kFloat16 };
constexpr int kWarp = 32, kMaxThreads = 256;
constexpr int kTile = 2;  // vectors that a thread takes at once

struct Parameter {  // (C,), null if absent
  void* data = nullptr;
  bool is_float = false;  // else of the type of x
};
struct GateBuffer {  // (N, C) float32, null if absent
  float* data = nullptr;
  int64_t stride = 0;
};

// What a launch does of the op.
enum Mode {
  kFused,  // all of it: the blocks of a cluster own whole channels
  kSums,   // the sums of a share, to partials
  kApply,  // the elementwise pass, from statistics in global memory
};

// How blocks and threads share the work.  A team of lanes goes through segments of a slab of neighbouring channels:
//   planes (NCHW)            a segment is a sample, a team has one channel of it: pixels that lie side by side
//   columns (channels_last)  a segment is some rows (those of a sample for sums per sample), a team is a warp
struct Geometry {
  int64_t numel = 0;
  int64_t rows = 0;    // columns: N * H * W / join
  int channels = 0;    // planes: C; columns: C * join, the elements of a row
  int parameters = 0;  // C: channel k has parameter k % C
  int segments = 0;
  int pixels = 0;    // planes: H * W; columns: rows of a segment
  int part = 0;      // planes: pixels of a plane that one block takes
  int slab = 0;      // channels of a block
  int lanes = 0;     // planes: lanes of a team; columns: vectors across a slab; a power of two up to 32
  int chunk = 0;     // segments of a block
  int rounds = 0;    // segments of a team
  int steps = 0;     // vectors of a thread in a segment
  int resident = 0;  // of a thread's rounds * steps vectors, how many it keeps in shared memory; whole tiles
};

struct Launch {
  Geometry geometry;
  int threads = 0, slabs = 0, chunks = 0, parts = 1;  // grid (slabs, chunks, parts); fused: chunks blocks in a cluster
  int allowed = 0;                                    // bytes of shared memory that a block may have here
  bool planes = false, vectors = false, fused = false;
  int join = 1;   // rows of C joined to one of whole vectors
  int share = 1;  // segments of a sample
};

struct Forward {
  Geometry g;
  Mode mode;
  const void *x, *residual;
  void* y;
  Parameter weight, bias, running_mean, running_var;
  int64_t* tracked;
  float* stats;                             // (2, C): mean, rstd
  double* partials;                         // (3, channels, P): count, mean, squared deviations
  double eps, momentum, inverse, unbiased;  // 1 / m, m / (m - 1)
  bool training, cumulative, sigmoid, relu;
};

struct Backward {
  Geometry g;
  Mode mode;
  const void *dy, *x, *y;
  void *dx, *dresidual;
  Parameter weight, bias, dweight, dbias;
  const float* stats;
  GateBuffer gate_grad, gate_abs, out_grad, out_abs;
  double* partials;   // (2, channels, P): sums of dz and of dz * (x - mean)
  float* projection;  // (2, C): what dx loses along 1 and xhat
  double inverse;
  bool training, sigmoid, relu, gates;
};

struct Finalise {
  int parameters, join, partials;  // P of each of `join` channels
};

struct JoinGates {  // gate[n, c] = sum of parts[n, 0 .. rows, c]
  const float* parts;
  GateBuffer gate;
  int64_t samples;
  int rows, channels;
};

// What a device offers; tests lower it to reach every path with small tensors.
struct Limits {
  int shared = 0;       // bytes of shared memory that a block may have
  int cluster = 1;      // blocks of a cluster
  int threads = 256;    // of a block
  int programs = 1024;  // blocks wanted of a launch that reads all of x; the same on every device
};

struct Problem {
  int64_t samples, channels, pixels;
  bool channels_last, aligned, per_sample;
  int itemsize, streams;  // streams: tensors that the fused kernel keeps, x | dy and x
};

// Which kernels run a problem, and how.
Launch plan(const Problem& p, const Limits& limits);

size_t shared_bytes(const Launch& l, int streams);

// Launchers.  Each returns a cudaError_t; a stream is a cudaStream_t.
int limits_of(int device, Limits& limits);
int launch_forward(const Launch& l, const Forward& a, Element element, void* stream);
int launch_backward(const Launch& l, const Backward& a, Element element, void* stream);
int launch_finalise_forward(const Forward& a, const Finalise& f, Element element, void* stream);
int launch_finalise_backward(const Backward& a, const Finalise& f, Element element, void* stream);
int launch_join_gates(const JoinGates& j, void* stream);
int launch_count(int64_t* tracked, void* stream);
const char* error_string(int error);

}  // namespace fastprune::cuda
