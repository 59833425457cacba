// Outputs and arguments of the C++ ops, through the C shim: an empty of torch::stable costs 3 us more, boxed dispatch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "cpu/parallel.h"

namespace fastprune {

// Where a tensor lies; by default the CPU.
struct Place {
  int32_t type = aoti_torch_device_type_cpu(), index = 0;
};

inline Place place_of(const Tensor& t) {
  Place place;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &place.type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &place.index));
  return place;
}

inline Tensor new_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, ScalarType dtype,
                          Place place = {}) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, static_cast<int32_t>(dtype), place.type, place.index, &handle));
  return Tensor(handle);
}

inline Tensor new_like(const Tensor& t, Place place = {}) {
  return new_strided(t.dim(), t.sizes().data(), t.strides().data(), t.scalar_type(), place);
}

template <size_t kDim>
Tensor new_tensor(const int64_t (&sizes)[kDim], ScalarType dtype, Place place = {}) {
  int64_t strides[kDim], numel = 1;
  for (size_t d = kDim; d-- > 0; numel *= sizes[d]) strides[d] = numel;
  return new_strided(kDim, sizes, strides, dtype, place);
}

inline const Tensor* pointer(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

inline void run_parallel(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                         void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

}  // namespace fastprune
