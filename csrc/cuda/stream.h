// Device and stream of a call.  The emulator of tests/cuda_emulator runs on CPU tensors and has neither.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

namespace fastprune::cuda {

#if defined(FASTPRUNE_EMULATOR)
#define FP_DISPATCH_KEY CPU
class CurrentStream {
 public:
  explicit CurrentStream(const torch::stable::Tensor&) {}
  int device() const { return 0; }
  void* get() const { return nullptr; }
};
inline bool on_gpu(const torch::stable::Tensor& t) { return t.is_cpu(); }
#else
#define FP_DISPATCH_KEY CUDA
// Makes the tensor's device the current one, and names PyTorch's stream there.
class CurrentStream {
 public:
  explicit CurrentStream(const torch::stable::Tensor& t) : device_(t.get_device_index()), guard_(device_) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream_));
  }
  int device() const { return device_; }
  void* get() const { return stream_; }

 private:
  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};
inline bool on_gpu(const torch::stable::Tensor& t) { return t.is_cuda(); }
#endif

}  // namespace fastprune::cuda
