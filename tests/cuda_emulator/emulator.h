// Runs CUDA C++ kernels on a CPU, to find what is wrong with them without a GPU: the twin of csrc/cuda/device.h.
//
// Every thread of a cluster is a fiber with a stack of its own; they run one at a time, from one barrier to the next,
// in an order drawn at random, so that a missing barrier shows in the results.  Launches fail (as on a GPU, by a return
// code; emulator::message says why) when not all threads arrive at a barrier or a shuffle, when a thread writes beside
// its shared memory or touches global memory that was not announced, when a block reads another one's shared memory
// after that has ended, and when a launch asks for what the device does not have.  Shared memory starts as NaN, and
// asynchronous copies arrive as late as they may: at the wait.  Nothing here says anything about speed.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // those of the thread that runs

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrComputeCapabilityMajor };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulator {

constexpr size_t kStack = 128 << 10, kGuard = 1024;
constexpr unsigned char kPoison = 0xff;  // NaN in every type

struct Device {
  int shared_optin = 227 << 10, shared_default = 48 << 10, major = 9, cluster = 8;
};
inline Device device;
inline std::string message;  // why the last launch failed
inline uint64_t seed = 0;
inline int64_t launches = 0;

struct Barrier {
  const char* name;
  int expected, arrived = 0;
  std::vector<struct Fiber*> waiting;
};

struct Warp {
  Barrier barrier;
  uint64_t lanes[2][32];
};

struct Block {
  dim3 index;
  std::vector<unsigned char> memory;  // guard, shared memory, guard
  Barrier barrier;
  std::vector<Warp> warps;
  int ended = 0;
  unsigned char* shared() { return memory.data() + kGuard; }
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
  ucontext_t context;  // to start it; from then on a jump, which takes no call of the system
  jmp_buf jump;
  bool started = false;
  Block* block = nullptr;
  unsigned thread = 0;
  int shuffles = 0;
  bool done = false;
  std::vector<Copy> copies;
};

struct Cluster {
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::vector<Fiber*> ready;
  Barrier barrier;
  ucontext_t scheduler;
  jmp_buf jump;
  std::function<void()> kernel;
  dim3 grid, block;
  size_t shared = 0;
  std::string failure;
};
inline Cluster* cluster = nullptr;
inline Fiber* current = nullptr;

// Fibers' stacks, kept from launch to launch.
inline unsigned char* stack(size_t i) {
  static std::vector<unsigned char*> stacks;
  while (stacks.size() <= i) {
    void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    stacks.push_back(static_cast<unsigned char*>(p));
    mprotect(p, 4096, PROT_NONE);  // an overflow ends the process, not another fiber's data
  }
  return stacks[i];
}

__attribute__((noinline)) inline void leave() {
  if (!_setjmp(current->jump)) _longjmp(cluster->jump, 1);
}

__attribute__((noinline)) inline void resume() {
  if (_setjmp(cluster->jump)) return;
  if (current->started) _longjmp(current->jump, 1);
  current->started = true;
  swapcontext(&cluster->scheduler, &current->context);
}

[[noreturn]] inline void fail(const std::string& what) {
  if (cluster->failure.empty())
    cluster->failure = what + " (block " + std::to_string(current->block->index.x) + ", " +
                       std::to_string(current->block->index.y) + ", " + std::to_string(current->block->index.z) +
                       "; thread " + std::to_string(current->thread) + ")";
  leave();
  abort();  // a failed cluster is not resumed
}

inline void arrive(Barrier& b) {
  if (++b.arrived == b.expected) {
    b.arrived = 0;
    for (Fiber* f : b.waiting) cluster->ready.push_back(f);
    b.waiting.clear();
    cluster->ready.push_back(current);
  } else {
    b.waiting.push_back(current);
  }
  leave();
}

inline void enter() {
  cluster->kernel();
  current->done = true;
  ++current->block->ended;
  leave();
}

// Global memory that the next launch may touch.
inline std::map<uintptr_t, size_t> announced;
inline void announce(const void* p, size_t bytes) {
  if (p) announced[reinterpret_cast<uintptr_t>(p)] = bytes;
}
inline void touch(const void* p, size_t bytes, size_t alignment) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  if (at % alignment) fail("misaligned access to global memory");
  auto range = announced.upper_bound(at);
  if (range == announced.begin() || at + bytes > (--range)->first + range->second)
    fail("access to global memory that is no argument's");
}

inline std::string run(Cluster& c) {
  cluster = &c;
  blockDim = c.block;
  gridDim = c.grid;
  const unsigned threads = c.block.x;
  c.fibers = std::vector<Fiber>(c.blocks.size() * threads);
  c.barrier = {"cluster_sync", static_cast<int>(c.fibers.size()), 0, {}};
  for (size_t i = 0; i < c.fibers.size(); ++i) {
    Fiber& f = c.fibers[i];
    f.block = &c.blocks[i / threads];
    f.thread = i % threads;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stack(i);
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = &c.scheduler;
    makecontext(&f.context, enter, 0);
    c.ready.push_back(&f);
  }
  for (Block& b : c.blocks) {
    b.memory.assign(kGuard + c.shared + kGuard, kPoison);
    b.barrier = {"__syncthreads", static_cast<int>(threads), 0, {}};
    b.warps = std::vector<Warp>((threads + 31) / 32);
    for (size_t w = 0; w < b.warps.size(); ++w)
      b.warps[w].barrier = {"__shfl_sync", std::min(32, static_cast<int>(threads - 32 * w)), 0, {}};
  }
  std::mt19937_64 draw(seed + static_cast<uint64_t>(launches));
  while (!c.ready.empty() && c.failure.empty()) {
    std::swap(c.ready[draw() % c.ready.size()], c.ready.back());
    current = c.ready.back();
    c.ready.pop_back();
    threadIdx = dim3(current->thread, 0, 0);
    blockIdx = current->block->index;
    resume();
  }
  if (!c.failure.empty()) return c.failure;
  for (const Fiber& f : c.fibers) {
    if (f.done) continue;
    std::string where = "deadlock:";
    const auto count = [&](const Barrier& b) {
      if (b.arrived)
        where += " " + std::to_string(b.arrived) + " of " + std::to_string(b.expected) + " threads at " + b.name + ";";
    };
    count(c.barrier);
    for (const Block& b : c.blocks) {
      count(b.barrier);
      for (const Warp& w : b.warps) count(w.barrier);
    }
    return where + " the others have ended or wait elsewhere";
  }
  for (Block& b : c.blocks)
    for (size_t i = 0; i < kGuard; ++i)
      if (b.memory[i] != kPoison || b.memory[kGuard + c.shared + i] != kPoison)
        return "a thread wrote beside the shared memory of its block";
  return "";
}

// Bytes of shared memory that a kernel was allowed.
inline std::map<const void*, int> allowed;

inline cudaError_t refuse(const std::string& why) {
  message = why;
  return cudaErrorInvalidValue;
}

inline cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body) {
  struct Forget {
    ~Forget() { announced.clear(); }
  } forget;
  ++launches;
  message.clear();
  const dim3 grid = config.gridDim, block = config.blockDim;
  const unsigned size = config.numAttrs ? config.attrs->val.clusterDim.y : 1;
  const auto allowance = allowed.find(kernel);
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffff)
    return refuse("a grid that no device has");
  if (!block.x || block.x > 1024 || block.y != 1 || block.z != 1) return refuse("a block that no device has");
  if (size > static_cast<unsigned>(device.cluster) || grid.y % size) return refuse("a cluster that the device lacks");
  if (config.dynamicSmemBytes >
      static_cast<size_t>(allowance == allowed.end() ? device.shared_default : allowance->second))
    return refuse("more shared memory than the kernel was allowed by cudaFuncSetAttribute");
  std::vector<dim3> first;  // blocks of the clusters
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; y += size)
      for (unsigned x = 0; x < grid.x; ++x) first.emplace_back(x, y, z);
  std::mt19937_64 draw(seed * 31 + static_cast<uint64_t>(launches));
  std::shuffle(first.begin(), first.end(), draw);
  for (const dim3& at : first) {
    Cluster c;
    c.grid = grid;
    c.block = block;
    c.shared = config.dynamicSmemBytes;
    c.kernel = body;
    c.blocks = std::vector<Block>(size);
    for (unsigned i = 0; i < size; ++i) c.blocks[i].index = dim3(at.x, at.y + i, at.z);
    message = run(c);
    cluster = nullptr;
    if (!message.empty()) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

template <class T>
T shuffle_xor(T value, int offset) {
  Fiber* const self = current;
  Warp& warp = self->block->warps[self->thread / 32];
  uint64_t (&lanes)[32] = warp.lanes[self->shuffles++ % 2];  // two in turn: a lane may be one shuffle ahead
  memcpy(&lanes[self->thread % 32], &value, sizeof value);
  arrive(warp.barrier);
  memcpy(&value, &lanes[(self->thread % 32) ^ offset], sizeof value);
  return value;
}

}  // namespace emulator

// For tests, through ctypes.
#define FP_EMULATOR_TESTS extern "C" __attribute__((visibility("default"), used))
FP_EMULATOR_TESTS inline void emulator_seed(uint64_t seed) { emulator::seed = seed; }
FP_EMULATOR_TESTS inline int64_t emulator_launches() { return emulator::launches; }

// ---- what kernels see

#define FP_SHARED(name) unsigned char* const name = emulator::current->block->shared()
#define FP_ANNOUNCE(pointer, bytes) emulator::announce(pointer, bytes)

inline void __syncthreads() { emulator::arrive(emulator::current->block->barrier); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
  if (mask != 0xffffffffu) emulator::fail("a shuffle of some lanes: the emulator knows only those of all");
  return emulator::shuffle_xor(value, offset);
}

namespace fastprune::cuda {

inline void copy_async(void* shared, const void* global, int bytes) {
  emulator::Block& block = *emulator::current->block;
  const unsigned char* to = static_cast<unsigned char*>(shared);
  if (to < block.shared() || to + 16 > block.shared() + emulator::cluster->shared)
    emulator::fail("an asynchronous copy beside the shared memory of the block");
  if (reinterpret_cast<uintptr_t>(shared) % 16 || bytes < 0 || bytes > 16)
    emulator::fail("an asynchronous copy of a wrong size or to a wrong address");
  if (bytes) {
    emulator::touch(global, bytes, 1);
    if (reinterpret_cast<uintptr_t>(global) % 16) emulator::fail("misaligned access to global memory");
  }
  emulator::current->copies.push_back({shared, global, bytes});
}
inline void copy_wait() {
  for (const emulator::Copy& c : emulator::current->copies) {
    memset(c.to, 0, 16);
    if (c.bytes) memcpy(c.to, c.from, c.bytes);
  }
  emulator::current->copies.clear();
}

template <class T>
T load(const T* p) {
  emulator::touch(p, sizeof(T), alignof(T));
  return *p;
}
template <class T>
T load_constant(const T* p) {
  return load(p);
}
template <class T>
void store(T* p, T value) {
  emulator::touch(p, sizeof(T), alignof(T));
  *p = value;
}

inline void cluster_sync() { emulator::arrive(emulator::cluster->barrier); }
inline double remote(const double* shared, int rank) {
  emulator::Cluster& c = *emulator::cluster;
  if (rank < 0 || rank >= static_cast<int>(c.blocks.size())) emulator::fail("no block of this rank in the cluster");
  emulator::Block& block = c.blocks[rank];
  if (block.ended) emulator::fail("a read from the shared memory of a block that has ended");
  const size_t offset = reinterpret_cast<const unsigned char*>(shared) - emulator::current->block->shared();
  if (offset + sizeof(double) > c.shared) emulator::fail("a read beside the shared memory of another block");
  double value;
  memcpy(&value, block.shared() + offset, sizeof value);
  return value;
}

inline float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float from_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float value = exponent ? ldexpf(1024 + fraction, exponent - 25) : ldexpf(fraction, -24);
  if (exponent == 31) value = fraction ? NAN : INFINITY;
  return bits >> 15 ? -value : value;
}
inline uint16_t to_half(float value) {  // to nearest, ties to even
  const uint16_t sign = as_bits(value) >> 31 << 15;
  const float size = fabsf(value);
  if (size != size) return sign | 0x7e00;
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent = -13;  // and below: subnormal, in steps of 2^-24
  if (size >= 0x1p-14f) frexpf(size, &exponent);
  const float steps = nearbyintf(ldexpf(size, 11 - exponent));  // 0 to 2048
  return sign | static_cast<uint16_t>(((exponent + 13) << 10) + static_cast<int>(steps));
}
inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = as_bits(value);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void unpack_float16(uint32_t word, float& low, float& high) {
  low = from_half(word & 0xffff);
  high = from_half(word >> 16);
}
inline uint32_t pack_float16(float low, float high) {
  return to_half(low) | static_cast<uint32_t>(to_half(high)) << 16;
}
inline uint32_t pack_bfloat16(float low, float high) {
  return to_bfloat16(low) | static_cast<uint32_t>(to_bfloat16(high)) << 16;
}

}  // namespace fastprune::cuda

// ---- the runtime's calls

inline const char* cudaGetErrorString(cudaError_t error) {
  if (!emulator::message.empty()) return emulator::message.c_str();
  return error == cudaSuccess ? "no error" : "an error of the emulator";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? emulator::device.major : emulator::device.shared_optin;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value > emulator::device.shared_optin) return emulator::refuse("more shared memory than a block may have");
  emulator::allowed[kernel] = value;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t* config) {
  *clusters = static_cast<int>(config->attrs->val.clusterDim.y) <= emulator::device.cluster;
  return cudaSuccess;
}
template <class... Parameters, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Args... args) {
  return emulator::launch(*config, reinterpret_cast<const void*>(kernel), [=] { kernel(args...); });
}
