// Live rows and columns out of a tensor, and back among zeros.  Compiled once per ISA with -DFP_ISA=...
//
// NCHW: a column of a row is a plane of H * W elements; copies and fills of whole planes.  channels_last: a column is
// one element of each pixel.  Both are bound by memory: a gather reads whole cache lines of the full tensor.
#include <string.h>

#include "masked_conv2d.h"
#include "vec.h"

namespace fastprune {
namespace FP_ISA {
namespace {

constexpr int64_t kTaskElements = 64 << 10;  // of the full tensor: work worth a thread

FP_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
FP_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// body(row, first, last) over parts of rows: columns in NCHW, pixels in channels_last.
template <class Body>
FP_INLINE void for_parts(const MaskedCopy& a, int64_t rows, int64_t length, int64_t elements, const Body& body) {
  const int64_t parts = max(1, min(length, elements / kTaskElements));
  const int64_t rows_per_task = max(1, kTaskElements / max(1, elements));
  const int64_t blocks = (rows + rows_per_task - 1) / rows_per_task;
  parallel_for(a.parallel_for, blocks * parts, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / parts, part = task % parts;
      for (int64_t r = block * rows_per_task; r < min(rows, (block + 1) * rows_per_task); ++r)
        body(r, length * part / parts, length * (part + 1) / parts);
    }
  });
}

FP_INLINE int64_t group_of(const MaskedCopy& a, int64_t live_row) { return live_row * a.groups / a.live_rows; }

// The live elements of a pixel, `values`, among zeros; `end` of what may be read.  `chunks` and `column_of` say the
// same.
#if defined(__AVX512F__)

FP_INLINE __m512i load_lanes(const uint32_t* p, uint32_t lanes) {
  return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(lanes), p);
}
FP_INLINE __m512i load_lanes(const uint16_t* p, uint32_t lanes) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(lanes), p));
}
FP_INLINE void store_lanes(uint32_t* p, __m512i v, uint32_t lanes) {
  _mm512_mask_storeu_epi32(p, static_cast<__mmask16>(lanes), v);
}
FP_INLINE void store_lanes(uint16_t* p, __m512i v, uint32_t lanes) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(lanes), _mm512_cvtepi32_epi16(v));
}
FP_INLINE uint32_t first_lanes(uint32_t live) { return (1u << __builtin_popcount(live)) - 1u; }

FP_INLINE __m512i load_lanes(const uint32_t* p) { return _mm512_loadu_si512(p); }
FP_INLINE __m512i load_lanes(const uint16_t* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FP_INLINE void store_lanes(uint32_t* p, __m512i v) { _mm512_storeu_si512(p, v); }
FP_INLINE void store_lanes(uint16_t* p, __m512i v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
}

template <class T>
FP_INLINE void expand(const T* values, const T* end, T* pixel, int64_t columns, const Chunk* chunk, int64_t,
                      const int64_t*) {
  for (int64_t c = 0; c < columns; c += kLanes, ++chunk) {
    const T* const from = values + chunk->first;
    const __m512i packed = end - from >= kLanes ? load_lanes(from) : load_lanes(from, first_lanes(chunk->live));
    const __m512i v = _mm512_maskz_expand_epi32(static_cast<__mmask16>(chunk->live), packed);
    if (c + kLanes <= columns)
      store_lanes(pixel + c, v);
    else
      store_lanes(pixel + c, v, live(First{static_cast<int>(columns - c)}));
  }
}

#else

template <class T>
FP_INLINE void expand(const T* values, const T*, T* pixel, int64_t columns, const Chunk*, int64_t n,
                      const int64_t* column_of) {
  for (int64_t c = 0; c < columns; ++c) pixel[c] = 0;
  for (int64_t c = 0; c < n; ++c) pixel[column_of[c]] = values[c];
}

#endif

template <class T>
void gather(const MaskedCopy& a) {
  const T* const from = static_cast<const T*>(a.from);
  T* const to = static_cast<T*>(a.to);
  const int64_t full_row = a.columns * a.pixels, live_row = a.live_columns * a.pixels;
  const int64_t length = a.channels_last ? a.pixels : a.live_columns;
  for_parts(a, a.live_rows, length, full_row, [&](int64_t r, int64_t first, int64_t last) {
    const T* x = from + (a.row_of ? a.row_of[r] : r) * full_row;
    T* y = to + r * live_row;
    if (!a.column_of) {
      const int64_t step = full_row / length;
      memcpy(y + first * step, x + first * step, static_cast<size_t>((last - first) * step) * sizeof(T));
      return;
    }
    const int64_t* const column_of = a.column_of + group_of(a, r) * a.live_columns;
    if (!a.channels_last) {
      for (int64_t c = first; c < last; ++c)
        memcpy(y + c * a.pixels, x + column_of[c] * a.pixels, static_cast<size_t>(a.pixels) * sizeof(T));
      return;
    }
    // One at a time: to compress vectors and to let their stores overlap took 1.3 to 1.7 times as long.
    const int64_t columns = a.columns, n = a.live_columns;  // in registers: stores may alias what a refers to
    for (int64_t s = first; s < last; ++s)
#pragma GCC unroll 4
      for (int64_t c = 0; c < n; ++c) y[s * n + c] = x[s * columns + column_of[c]];
  });
}

template <class T>
void scatter(const MaskedCopy& a) {
  const T* const from = static_cast<const T*>(a.from);
  T* const to = static_cast<T*>(a.to);
  const int64_t full_row = a.columns * a.pixels, live_row = a.live_columns * a.pixels;
  const int64_t chunk_count = (a.columns + kLanes - 1) / kLanes;
  const int64_t length = a.channels_last ? a.pixels : a.columns, step = full_row / length;
  for_parts(a, a.rows, length, full_row, [&](int64_t r, int64_t first, int64_t last) {
    T* const y = to + r * full_row;
    const int64_t source = a.live_row_of ? a.live_row_of[r] : r;
    if (source < 0) {
      memset(y + first * step, 0, static_cast<size_t>((last - first) * step) * sizeof(T));
      return;
    }
    const T* const x = from + source * live_row;
    if (!a.column_of) {
      memcpy(y + first * step, x + first * step, static_cast<size_t>((last - first) * step) * sizeof(T));
      return;
    }
    const int64_t* const column_of = a.column_of + group_of(a, source) * a.live_columns;
    if (!a.channels_last) {
      int64_t k = 0;
      while (k < a.live_columns && column_of[k] < first) ++k;
      for (int64_t c = first; c < last;) {
        if (k < a.live_columns && column_of[k] == c) {
          memcpy(y + c++ * a.pixels, x + k++ * a.pixels, static_cast<size_t>(a.pixels) * sizeof(T));
          continue;
        }
        const int64_t next = k < a.live_columns ? min(last, column_of[k]) : last;
        memset(y + c * a.pixels, 0, static_cast<size_t>((next - c) * a.pixels) * sizeof(T));
        c = next;
      }
      return;
    }
    const Chunk* const chunks = a.chunks + group_of(a, source) * chunk_count;
    const int64_t columns = a.columns, n = a.live_columns;
    for (int64_t s = first; s < last; ++s)
      expand(x + s * n, x + last * n, y + s * columns, columns, chunks, n, column_of);
  });
}

}  // namespace

extern const MaskedConv2dKernels masked_conv2d;
const MaskedConv2dKernels masked_conv2d = {{gather<uint16_t>, gather<uint32_t>},
                                           {scatter<uint16_t>, scatter<uint32_t>}};

}  // namespace FP_ISA
}  // namespace fastprune
