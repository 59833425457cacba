// What the kernels use of a GPU beyond C++.  tests/cuda_emulator/emulator.h is its twin: the same names, run by a CPU.
#pragma once

#include <stdint.h>

namespace fastprune::cuda {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};
struct alignas(16) Vector {  // what one load or store moves
  uint32_t word[4];
};

}  // namespace fastprune::cuda

#if defined(FASTPRUNE_EMULATOR)
#include "emulator.h"
#else
#include <cuda_runtime.h>

// The dynamic shared memory of the block.
#define FP_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
// Tells the emulator which global memory a launch may touch; on a GPU, compute-sanitizer knows.
#define FP_ANNOUNCE(pointer, bytes)

namespace fastprune::cuda {

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Starts a copy of `bytes` (0 to 16) to shared memory, zeros behind; only this thread may wait for it.
__device__ inline void copy_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
__device__ inline void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Of memory that no thread of the launch writes.
__device__ inline Vector load_constant(const Vector* p) {
  Vector v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
      : "l"(p));
  return v;
}
template <class T>
__device__ inline T load_constant(const T* p) {
  return *p;
}
template <class T>
__device__ inline T load(const T* p) {
  return *p;
}
template <class T>
__device__ inline void store(T* p, T value) {
  *p = value;
}

// Thread block clusters; before sm_90 a block is its own cluster.  Not .aligned: threads come here from loops of their
// own.
__device__ inline void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
#else
  __syncthreads();
#endif
}
// What lies at `shared` in the block of this rank.
__device__ inline double remote(const double* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  uint32_t address;
  double value;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
  asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(value) : "r"(address) : "memory");
  return value;
#else
  return *shared;
#endif
}

__device__ inline float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline uint32_t as_bits(float value) { return __float_as_uint(value); }

// Two float16 in a word, the first in the low half.
__device__ inline void unpack_float16(uint32_t word, float& low, float& high) {
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(low), "=f"(high)
      : "r"(word));
}
__device__ inline uint32_t pack_float16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ inline uint32_t pack_bfloat16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

}  // namespace fastprune::cuda
#endif

namespace fastprune::cuda {

// ---- element types

template <class T>
constexpr int kElements = sizeof(Vector) / sizeof(T);  // in a vector

__device__ inline float to_float(float t) { return t; }
__device__ inline float to_float(bfloat16 t) { return as_float(static_cast<uint32_t>(t.bits) << 16); }
__device__ inline float to_float(float16 t) {
  float low, high;
  unpack_float16(t.bits, low, high);
  return low;
}
template <class T>
__device__ inline T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline bfloat16 from_float<bfloat16>(float value) {
  return {static_cast<uint16_t>(pack_bfloat16(value, 0.0f))};
}
template <>
__device__ inline float16 from_float<float16>(float value) {
  return {static_cast<uint16_t>(pack_float16(value, 0.0f))};
}

__device__ inline void unpack(const Vector& v, float (&out)[4], float) {
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = as_float(v.word[i]);
}
__device__ inline void unpack(const Vector& v, float (&out)[8], bfloat16) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = as_float(v.word[i] << 16);
    out[2 * i + 1] = as_float(v.word[i] & 0xffff0000u);
  }
}
__device__ inline void unpack(const Vector& v, float (&out)[8], float16) {
#pragma unroll
  for (int i = 0; i < 4; ++i) unpack_float16(v.word[i], out[2 * i], out[2 * i + 1]);
}
__device__ inline Vector pack(const float (&in)[4], float) {
  return {{as_bits(in[0]), as_bits(in[1]), as_bits(in[2]), as_bits(in[3])}};
}
__device__ inline Vector pack(const float (&in)[8], bfloat16) {
  return {{pack_bfloat16(in[0], in[1]), pack_bfloat16(in[2], in[3]), pack_bfloat16(in[4], in[5]),
           pack_bfloat16(in[6], in[7])}};
}
__device__ inline Vector pack(const float (&in)[8], float16) {
  return {
      {pack_float16(in[0], in[1]), pack_float16(in[2], in[3]), pack_float16(in[4], in[5]), pack_float16(in[6], in[7])}};
}

}  // namespace fastprune::cuda
