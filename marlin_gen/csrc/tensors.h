// Tensors as the op reads them: borrowed from their handles, which somebody else deletes.
#pragma once
#include <cstdint>

#include "torch_shims.h"

namespace marlin_gen {

constexpr int64_t kMaxDim = 16;  // more is left to Python

struct Tensor {
  void* data = nullptr;
  int32_t dtype = 0, device_type = 0, device = 0;
  int64_t dim = 0;
  int64_t const *sizes = nullptr, *strides = nullptr;
  bool contiguous = false;

  // False when torch will not say, which no strided tensor on a device does.
  static bool read(AtenTensorHandle handle, Tensor& tensor);

  bool on_device_of(Tensor const& other) const { return device_type == other.device_type && device == other.device; }
  bool aligned() const { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }
};

// A handle that is deleted at the end of the scope unless it is released.
class OwnedTensor {
 public:
  explicit OwnedTensor(AtenTensorHandle handle = nullptr) : handle_(handle) {}
  OwnedTensor(OwnedTensor const&) = delete;
  OwnedTensor& operator=(OwnedTensor const&) = delete;
  ~OwnedTensor() {
    if (handle_ != nullptr) torch.aoti_torch_delete_tensor_object(handle_);
  }
  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle* out() { return &handle_; }
  AtenTensorHandle release() {
    AtenTensorHandle const handle = handle_;
    handle_ = nullptr;
    return handle;
  }

 private:
  AtenTensorHandle handle_;
};

// A new contiguous tensor on another's device; false when there is no memory.
bool allocate(Tensor const& like, int32_t dtype, int64_t dim, int64_t const* sizes, OwnedTensor& out);

}  // namespace marlin_gen
