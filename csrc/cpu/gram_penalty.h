#pragma once

#include "parallel.h"

namespace fastprune {

constexpr int64_t kGramBlock = 84;   // rows and columns of a block of a Gram matrix: whole panels on every ISA
constexpr int64_t kGramStrip = 128;  // columns of a gradient that a task makes

// sum over i, j of weight (G_ij - target_ij)^2, G = A A^T, or A B^T where that is symmetric.  The rows are wherever the
// pointers say, in two groups, [0, first) and [first, n); a pair of groups has a weight, and a target on its diagonal.
struct GramLayer {
  const void *const *rows, *const *right;     // (n,), of `depth` elements each; of A, and of B or of A again
  void* const* grads;                         // (n,), of `width` elements; read for [0, grad_rows)
  int64_t n, first, depth, width, grad_rows;  // gradients are of the first `width` elements
  double weight[3], target[3];                // of 0 x 0, 0 x 1 and 1 x 1
  void* matrix;   // gram_matrix_size() elements: weight (G - target), written where it is needed
  double factor;  // gradient = factor * matrix * A
};

// What the panels of both groups can take: 16 rows high at most, over the columns that are not zero throughout.
inline int64_t gram_matrix_size(const GramLayer& a) {
  const int64_t last = a.n - a.first;
  const auto columns = [&](int group) {
    return (a.weight[group] != 0 ? a.first : 0) + (a.weight[group + 1] != 0 ? last : 0);
  };
  return (a.first + 16) * columns(0) + (last + 16) * columns(1);
}

// Rows [i, i + rows) x rows [j, j + columns) of G, each within one group; i >= j.
struct GramBlock {
  int64_t layer, i, rows, j, columns;
};

struct GramStrip {
  int64_t layer, begin, count;
};

struct GramCall {
  const GramLayer* layers;
  const GramBlock* blocks;
  int64_t block_count;
  double* sums;  // (block_count,): a block's share of the value
  const GramStrip* strips;
  int64_t strip_count;
  void* scratch;  // (workers, scratch_size) elements, scratch_size >= n * kGramStrip
  int64_t scratch_size, workers;
  bool is_double;
  ParallelFor parallel_for;
};

namespace base {
void gram_blocks(const GramCall&);
void gram_strips(const GramCall&);
}  // namespace base
namespace avx2 {
void gram_blocks(const GramCall&);
void gram_strips(const GramCall&);
}  // namespace avx2
namespace avx512 {
void gram_blocks(const GramCall&);
void gram_strips(const GramCall&);
}  // namespace avx512
namespace avx512_bf16 {
void gram_blocks(const GramCall&);
void gram_strips(const GramCall&);
}  // namespace avx512_bf16

}  // namespace fastprune
