#pragma once

#include "parallel.h"

namespace fastprune {

enum class FilterTerm { kAbs, kSquare, kValue, kProductSquare };  // |w|, w^2, w, (w g)^2
enum class FilterType { kFloat, kBFloat16, kDouble };

// A weight as (outer, channels, inner), dense; out[c] is the sum over outer and inner.  Filters have outer = 1.
struct FilterWeight {
  const void *weight, *grad;  // grad only for kProductSquare
  int64_t outer, channels, inner;
  void* out;  // (channels,), float, or double for double weights
};

struct FilterSums {
  const FilterWeight* weights;
  int64_t count;
  FilterTerm term;
  FilterType type;
  bool root;  // store the square roots
  ParallelFor parallel_for;
};

namespace base {
void filter_sums(const FilterSums&);
}
namespace avx2 {
void filter_sums(const FilterSums&);
}
namespace avx512 {
void filter_sums(const FilterSums&);
}
namespace avx512_bf16 {
void filter_sums(const FilterSums&);
}

}  // namespace fastprune
