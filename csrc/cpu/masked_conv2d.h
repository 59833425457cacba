// What masked_conv2d_op.cpp hands to its kernels.  No header of torch or the C++ library: see vec.h.
#pragma once

#include <stdint.h>

#include "parallel.h"

namespace fastprune {

// Which of 16 columns are live, and the place of the first of those among all live ones.
struct Chunk {
  int32_t first;
  uint32_t live;
};

// A 4-D tensor and the smaller one of some of its rows (dimension 0) and columns (dimension 1).
struct MaskedCopy {
  int64_t rows, columns, pixels;    // of the full tensor; pixels = H * W
  int64_t live_rows, live_columns;  // of the live one
  const int64_t* row_of;            // gather: (live_rows,) full row of a live one; null: the same
  const int64_t* live_row_of;       // scatter: (rows,) live row of a full one, -1: none; null: the same
  const int64_t* column_of;         // (groups, live_columns) ascending in each group; null: the same
  int64_t groups;                   // live row r belongs to group r * groups / live_rows
  bool channels_last;               // order of both in memory
  const void* from;                 // gather: full, scatter: live
  void* to;
  const Chunk* chunks;  // (groups, columns / 16 rounded up), of column_of; only in channels_last
  ParallelFor parallel_for;
};

struct MaskedConv2dKernels {
  void (*gather[2])(const MaskedCopy&);  // elements of 2 and of 4 bytes
  void (*scatter[2])(const MaskedCopy&);
};

namespace base {
extern const MaskedConv2dKernels masked_conv2d;
}
namespace avx2 {
extern const MaskedConv2dKernels masked_conv2d;
}
namespace avx512 {
extern const MaskedConv2dKernels masked_conv2d;
}
namespace avx512_bf16 {
extern const MaskedConv2dKernels masked_conv2d;
}

}  // namespace fastprune
