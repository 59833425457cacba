// Sixteen float lanes on every ISA: one zmm, two ymm, or four 16-byte vectors of the compiler's own kind.
//
// One width everywhere means one summation order and one mask format (a uint16 per vector) whatever the machine.
// Included only by files compiled once per ISA (-DFP_ISA=...): all of it has internal linkage, and no header of torch
// or the C++ library may join it, since the linker could keep an AVX-512 copy of their inline functions for everybody.
#pragma once

#include <stdint.h>
#if defined(__SSE2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 warns about its own header (PR 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define FP_INLINE inline __attribute__((always_inline))

namespace fastprune {
namespace FP_ISA {
namespace {

constexpr int kLanes = 16;

struct BFloat16 {
  uint16_t bits;
};

// How many lanes of a vector exist in memory.  The others read as zero and are not written.
struct All {};
struct First {
  int count;
};
FP_INLINE uint32_t live(All) { return 0xffffu; }
FP_INLINE uint32_t live(First lanes) { return (1u << lanes.count) - 1u; }

FP_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// memcpy of at most 64 bytes without a call.
FP_INLINE void copy_bytes(void* to, const void* from, int bytes) {
  char* t = static_cast<char*>(to);
  const char* f = static_cast<const char*>(from);
  for (; bytes >= 16; bytes -= 16, t += 16, f += 16) __builtin_memcpy(t, f, 16);
  if (bytes & 8) __builtin_memcpy(t, f, 8), t += 8, f += 8;
  if (bytes & 4) __builtin_memcpy(t, f, 4), t += 4, f += 4;
  if (bytes & 2) __builtin_memcpy(t, f, 2);
}

#if defined(__AVX512F__)

constexpr int kGroup = 4;   // vectors of a row whose parameters and sums stay in registers together
constexpr int kUnroll = 4;  // independent sums of a plane
constexpr bool kCanStream = true;

struct Vec {
  __m512 v;
};
FP_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
FP_INLINE Vec broadcast(float a) { return {_mm512_set1_ps(a)}; }
FP_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
FP_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
FP_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
FP_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FP_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
FP_INLINE Vec relu(Vec a) { return {_mm512_max_ps(_mm512_setzero_ps(), a.v)}; }  // the second operand wins on NaN
FP_INLINE uint32_t passes(Vec z) { return _mm512_cmp_ps_mask(z.v, _mm512_setzero_ps(), _CMP_NLE_UQ); }
FP_INLINE Vec keep(Vec a, uint32_t bits) { return {_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), a.v)}; }
FP_INLINE Vec keep_where_passes(Vec a, Vec z) { return keep(a, passes(z)); }

FP_INLINE Vec widen(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }
#if defined(__AVX512BF16__)
FP_INLINE __m256i narrow(Vec a) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)); }
#else
FP_INLINE __m256i narrow(Vec a) {  // round to nearest even, in integers
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16));
}
#endif
FP_INLINE Vec load(const float* p, All = {}) { return {_mm512_loadu_ps(p)}; }
FP_INLINE Vec load(const float* p, First n) { return {_mm512_maskz_loadu_ps(static_cast<__mmask16>(live(n)), p)}; }
FP_INLINE Vec load(const BFloat16* p, All = {}) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FP_INLINE Vec load(const BFloat16* p, First n) {
  return widen(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(live(n)), p));
}
FP_INLINE void store(float* p, Vec a, All = {}) { _mm512_storeu_ps(p, a.v); }
FP_INLINE void store(float* p, Vec a, First n) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>(live(n)), a.v); }
FP_INLINE void store(BFloat16* p, Vec a, All = {}) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
FP_INLINE void store(BFloat16* p, Vec a, First n) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(live(n)), narrow(a));
}
FP_INLINE void stream(float* p, Vec a) { _mm512_stream_ps(p, a.v); }
FP_INLINE void stream(BFloat16* p, Vec a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
FP_INLINE void add_to(double* acc, Vec a) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a.v));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1));
  _mm512_storeu_pd(acc, _mm512_add_pd(_mm512_loadu_pd(acc), low));
  _mm512_storeu_pd(acc + 8, _mm512_add_pd(_mm512_loadu_pd(acc + 8), high));
}
FP_INLINE float lane_sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
// out[k] = sum of the lanes of v[k].  Four rounds of transpose and add: 2 instructions a vector instead of about 8.
FP_INLINE void lane_sums(const Vec v[kLanes], float* out) {
  __m512 pairs[8], quads[4];
  for (int k = 0; k < 8; ++k)
    pairs[k] =
        _mm512_add_ps(_mm512_unpacklo_ps(v[2 * k].v, v[2 * k + 1].v), _mm512_unpackhi_ps(v[2 * k].v, v[2 * k + 1].v));
  for (int k = 0; k < 4; ++k) {
    const __m512d a = _mm512_castps_pd(pairs[2 * k]), b = _mm512_castps_pd(pairs[2 * k + 1]);
    quads[k] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const __m512 low =
      _mm512_add_ps(_mm512_shuffle_f32x4(quads[0], quads[1], 0x88), _mm512_shuffle_f32x4(quads[0], quads[1], 0xdd));
  const __m512 high =
      _mm512_add_ps(_mm512_shuffle_f32x4(quads[2], quads[3], 0x88), _mm512_shuffle_f32x4(quads[2], quads[3], 0xdd));
  _mm512_storeu_ps(out, _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd)));
}

#elif defined(__AVX2__)

constexpr int kGroup = 2;
constexpr int kUnroll = 2;
constexpr bool kCanStream = true;

struct Vec {
  __m256 lo, hi;
};
FP_INLINE Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
FP_INLINE Vec broadcast(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
FP_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
FP_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
FP_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
FP_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
FP_INLINE Vec abs(Vec a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
FP_INLINE Vec relu(Vec a) {  // the second operand wins on NaN
  return {_mm256_max_ps(_mm256_setzero_ps(), a.lo), _mm256_max_ps(_mm256_setzero_ps(), a.hi)};
}
FP_INLINE __m256 not_le_zero(__m256 z) { return _mm256_cmp_ps(z, _mm256_setzero_ps(), _CMP_NLE_UQ); }
FP_INLINE uint32_t passes(Vec z) {
  return static_cast<uint32_t>(_mm256_movemask_ps(not_le_zero(z.lo)) | _mm256_movemask_ps(not_le_zero(z.hi)) << 8);
}
FP_INLINE __m256 lanes_of(uint32_t bits) {  // bit k of the low byte to all bits of lane k
  const __m256i one_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i all = _mm256_set1_epi32(static_cast<int>(bits));
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, one_bit), one_bit));
}
FP_INLINE Vec keep(Vec a, uint32_t bits) {
  return {_mm256_and_ps(a.lo, lanes_of(bits)), _mm256_and_ps(a.hi, lanes_of(bits >> 8))};
}
FP_INLINE Vec keep_where_passes(Vec a, Vec z) {
  return {_mm256_and_ps(a.lo, not_le_zero(z.lo)), _mm256_and_ps(a.hi, not_le_zero(z.hi))};
}

FP_INLINE __m256 widen(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
FP_INLINE __m256i round_half(__m256 a) {  // bfloat16 bits in the low half of each lane, to nearest even
  const __m256i u = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
}
FP_INLINE __m256i narrow(Vec a) {  // pack works within 128-bit halves: put the quarters back in order
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(round_half(a.lo), round_half(a.hi)), 0xd8);
}
FP_INLINE Vec load(const float* p, All = {}) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
FP_INLINE Vec load(const float* p, First n) {
  const __m256i lo = _mm256_castps_si256(lanes_of(live(n))), hi = _mm256_castps_si256(lanes_of(live(n) >> 8));
  return {_mm256_maskload_ps(p, lo), _mm256_maskload_ps(p + 8, hi)};
}
FP_INLINE Vec load(const BFloat16* p, All = {}) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {widen(_mm256_castsi256_si128(h)), widen(_mm256_extracti128_si256(h, 1))};
}
FP_INLINE Vec load(const BFloat16* p, First n) {
  BFloat16 buffer[kLanes] = {};
  copy_bytes(buffer, p, 2 * n.count);
  return load(buffer);
}
FP_INLINE void store(float* p, Vec a, All = {}) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
FP_INLINE void store(float* p, Vec a, First n) {
  _mm256_maskstore_ps(p, _mm256_castps_si256(lanes_of(live(n))), a.lo);
  _mm256_maskstore_ps(p + 8, _mm256_castps_si256(lanes_of(live(n) >> 8)), a.hi);
}
FP_INLINE void store(BFloat16* p, Vec a, All = {}) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
FP_INLINE void store(BFloat16* p, Vec a, First n) {
  BFloat16 buffer[kLanes];
  store(buffer, a);
  copy_bytes(p, buffer, 2 * n.count);
}
FP_INLINE void stream(float* p, Vec a) {
  _mm256_stream_ps(p, a.lo);
  _mm256_stream_ps(p + 8, a.hi);
}
FP_INLINE void stream(BFloat16* p, Vec a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
FP_INLINE void add_to(double* acc, __m256 a) {
  _mm256_storeu_pd(acc, _mm256_add_pd(_mm256_loadu_pd(acc), _mm256_cvtps_pd(_mm256_castps256_ps128(a))));
  _mm256_storeu_pd(acc + 4, _mm256_add_pd(_mm256_loadu_pd(acc + 4), _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1))));
}
FP_INLINE void add_to(double* acc, Vec a) {
  add_to(acc, a.lo);
  add_to(acc + 8, a.hi);
}
FP_INLINE float lane_sum(Vec a) {
  const __m256 s = _mm256_add_ps(a.lo, a.hi);
  const __m128 quad = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  const __m128 pair = _mm_hadd_ps(quad, quad);
  return _mm_cvtss_f32(_mm_hadd_ps(pair, pair));
}
// out[k] = sum of the lanes of v[k], eight vectors at a time by horizontal adds.
FP_INLINE void lane_sums(const Vec v[kLanes], float* out) {
  for (int k = 0; k < kLanes; k += 8) {
    __m256 pairs[4];
    for (int j = 0; j < 4; ++j) {
      const Vec a = v[k + 2 * j], b = v[k + 2 * j + 1];
      pairs[j] = _mm256_hadd_ps(_mm256_add_ps(a.lo, a.hi), _mm256_add_ps(b.lo, b.hi));
    }
    const __m256 a = _mm256_hadd_ps(pairs[0], pairs[1]), b = _mm256_hadd_ps(pairs[2], pairs[3]);
    _mm256_storeu_ps(out + k, _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)));
  }
}

#else

constexpr int kGroup = 1;
constexpr int kUnroll = 1;
constexpr bool kCanStream = false;

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef uint32_t Uint4 __attribute__((vector_size(16)));
typedef uint16_t Half4 __attribute__((vector_size(8)));

struct Vec {
  Float4 q[4];
};
template <class F>
FP_INLINE Vec each(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}
FP_INLINE Vec broadcast(float a) {
  return each([&](int) { return Float4{a, a, a, a}; });
}
FP_INLINE Vec zero() { return broadcast(0.0f); }
FP_INLINE Vec operator+(Vec a, Vec b) {
  return each([&](int k) { return a.q[k] + b.q[k]; });
}
FP_INLINE Vec operator-(Vec a, Vec b) {
  return each([&](int k) { return a.q[k] - b.q[k]; });
}
FP_INLINE Vec operator*(Vec a, Vec b) {
  return each([&](int k) { return a.q[k] * b.q[k]; });
}
FP_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return each([&](int k) { return a.q[k] * b.q[k] + c.q[k]; });
}
FP_INLINE Float4 and_not(Int4 drop, Float4 a) { return reinterpret_cast<Float4>(~drop & reinterpret_cast<Int4>(a)); }
FP_INLINE Vec keep_where_passes(Vec a, Vec z) {
  return each([&](int k) { return and_not(z.q[k] <= Float4{}, a.q[k]); });
}
FP_INLINE Vec abs(Vec a) {
  return each([&](int k) { return reinterpret_cast<Float4>(reinterpret_cast<Int4>(a.q[k]) & 0x7fffffff); });
}
FP_INLINE Vec relu(Vec a) { return keep_where_passes(a, a); }
FP_INLINE uint32_t passes(Vec z) {
  uint32_t bits = 0;
  for (int k = 0; k < 4; ++k) {
    const Int4 dropped = z.q[k] <= Float4{};
#if defined(__SSE2__)
    bits |= static_cast<uint32_t>(~_mm_movemask_ps(reinterpret_cast<__m128>(dropped)) & 15) << (4 * k);
#else
    for (int j = 0; j < 4; ++j) bits |= static_cast<uint32_t>(dropped[j] + 1) << (4 * k + j);
#endif
  }
  return bits;
}
FP_INLINE Vec keep(Vec a, uint32_t bits) {
  const Int4 one_bit = {1, 2, 4, 8};
  return each([&](int k) {
    const int32_t b = static_cast<int32_t>(bits >> (4 * k));
    return and_not((Int4{b, b, b, b} & one_bit) == Int4{}, a.q[k]);
  });
}
FP_INLINE Vec load(const float* p, All = {}) {
  Vec a;
  __builtin_memcpy(&a, p, sizeof a);
  return a;
}
FP_INLINE Vec load(const float* p, First n) {
  float buffer[kLanes] = {};
  copy_bytes(buffer, p, 4 * n.count);
  return load(buffer);
}
FP_INLINE Vec load(const BFloat16* p, All = {}) {
  return each([&](int k) {
    Half4 h;
    __builtin_memcpy(&h, p + 4 * k, sizeof h);
    return reinterpret_cast<Float4>(__builtin_convertvector(h, Uint4) << 16);
  });
}
FP_INLINE Vec load(const BFloat16* p, First n) {
  BFloat16 buffer[kLanes] = {};
  copy_bytes(buffer, p, 2 * n.count);
  return load(buffer);
}
FP_INLINE void store(float* p, Vec a, All = {}) { __builtin_memcpy(p, &a, sizeof a); }
FP_INLINE void store(float* p, Vec a, First n) { copy_bytes(p, &a, 4 * n.count); }
FP_INLINE void store(BFloat16* p, Vec a, All = {}) {
  for (int k = 0; k < 4; ++k) {
    const Uint4 u = reinterpret_cast<Uint4>(a.q[k]);
    const Uint4 nan = reinterpret_cast<Uint4>(a.q[k] != a.q[k]);
    const Uint4 rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    const Half4 h = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Half4);
    __builtin_memcpy(p + 4 * k, &h, sizeof h);
  }
}
FP_INLINE void store(BFloat16* p, Vec a, First n) {
  BFloat16 buffer[kLanes];
  store(buffer, a);
  copy_bytes(p, buffer, 2 * n.count);
}
template <class T>
FP_INLINE void stream(T* p, Vec a) {
  store(p, a);
}
FP_INLINE void add_to(double* acc, Vec a) {
  for (int k = 0; k < kLanes; ++k) acc[k] += a.q[k / 4][k % 4];
}
FP_INLINE float lane_sum(Vec a) {
  const Float4 s = (a.q[0] + a.q[1]) + (a.q[2] + a.q[3]);
  return (s[0] + s[1]) + (s[2] + s[3]);
}
FP_INLINE void lane_sums(const Vec v[kLanes], float* out) {
  for (int k = 0; k < kLanes; ++k) out[k] = lane_sum(v[k]);
}

#endif

FP_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace FP_ISA
}  // namespace fastprune
