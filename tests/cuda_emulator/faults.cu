// Kernels with planted faults, and their sound versions: what the emulator must see.
#include "cuda/device.h"

namespace {

using namespace fastprune::cuda;

constexpr int kThreads = 64;

enum Fault {
  kNone,
  kNoBarrier,        // reads what another thread writes, without __syncthreads
  kNotAllAtBarrier,  // half of the threads skip __syncthreads
  kNotAllInShuffle,  // some lanes have left the warp
  kBesideShared,     // writes after the end of shared memory
  kUnwritten,        // reads shared memory that nobody wrote
  kNoWait,           // reads before the asynchronous copy is waited for
  kBesideGlobal,     // reads the element after the tensor
  kMisaligned,       // loads a vector from an odd element
  kEndsTooEarly,     // a block ends while another reads its shared memory
  kFaults
};

// out[block, t] = in[63 - t] of the next block of the cluster, doubled, plus the sum over the warp of in.
__global__ void reverse(const float* in, float* out, Fault fault) {
  FP_SHARED(shared);
  float* const values = reinterpret_cast<float*>(shared);
  double* const last = reinterpret_cast<double*>(values + kThreads);
  const int t = threadIdx.x;
  if (t % 4 == 0) copy_async(values + t, in + t, 16);
  if (fault != kNoWait) copy_wait();
  if (fault == kNotAllAtBarrier && t < kThreads / 2) return;
  if (fault != kNoBarrier) __syncthreads();
  float v = values[kThreads - 1 - t];
  if (fault == kNoWait) copy_wait();
  if (fault == kNotAllInShuffle && t % 32 == 3) return;
  float sum = load(in + t);
  for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
  if (fault == kBesideShared && t == 0) values[kThreads + 4] = 1.0f;
  if (t == 0 && fault != kUnwritten) *last = v;
  if (fault == kBesideGlobal) v += load(in + t + 1);
  if (fault == kMisaligned) v += as_float(load(reinterpret_cast<const Vector*>(in + 1)).word[0]);
  cluster_sync();
  const double next = remote(last, (blockIdx.y + 1) % gridDim.y);
  if (fault != kEndsTooEarly) cluster_sync();
  store(out + blockIdx.y * kThreads + t, v + static_cast<float>(next) + sum);
}

}  // namespace

FP_EMULATOR_TESTS const char* run_fault(int fault, const float* in, float* out) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1, 2);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kThreads * sizeof(float) + sizeof(double);
  cudaLaunchAttribute attribute = {};
  attribute.val.clusterDim.x = attribute.val.clusterDim.z = 1;
  attribute.val.clusterDim.y = 2;
  config.attrs = &attribute;
  config.numAttrs = 1;
  FP_ANNOUNCE(in, kThreads * sizeof(float));
  FP_ANNOUNCE(out, 2 * kThreads * sizeof(float));
  return cudaGetErrorString(cudaLaunchKernelEx(&config, reverse, in, out, static_cast<Fault>(fault)));
}

// What a launch may not ask for: too much shared memory, a cluster of 16, a grid of 2^16 rows.
FP_EMULATOR_TESTS const char* run_refused(int which) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1, which == 2 ? 1 << 16 : 16);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = which == 0 ? 64 << 10 : 1024;
  cudaLaunchAttribute attribute = {};
  attribute.val.clusterDim.y = 16;
  config.attrs = &attribute;
  config.numAttrs = which == 1;
  const float* in = nullptr;
  float* out = nullptr;
  return cudaGetErrorString(cudaLaunchKernelEx(&config, reverse, in, out, kNone));
}

FP_EMULATOR_TESTS void convert(const float* in, int64_t n, uint16_t* half, uint16_t* bfloat, float* back) {
  for (int64_t i = 0; i < n; ++i) {
    half[i] = from_float<float16>(in[i]).bits;
    bfloat[i] = from_float<bfloat16>(in[i]).bits;
    back[i] = to_float(float16{half[i]});
  }
}
