#pragma once

#include <stdint.h>

namespace fastprune {

// torch_parallel_for of the stable ABI, handed to kernels as a pointer so that they need no torch header.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                             void* context);

template <class Body>
inline __attribute__((always_inline)) void parallel_for(ParallelFor run, int64_t count, const Body& body) {
  run(
      0, count, 1, [](int64_t b, int64_t e, void* context) { (*static_cast<const Body*>(context))(b, e); },
      const_cast<Body*>(&body));
}

}  // namespace fastprune
