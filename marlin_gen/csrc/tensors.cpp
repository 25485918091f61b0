#include "tensors.h"

namespace marlin_gen {

bool Tensor::read(AtenTensorHandle handle, Tensor& tensor) {
  int64_t *sizes = nullptr, *strides = nullptr;
  bool const failed = torch.aoti_torch_get_data_ptr(handle, &tensor.data) ||
                      torch.aoti_torch_get_dtype(handle, &tensor.dtype) ||
                      torch.aoti_torch_get_device_type(handle, &tensor.device_type) ||
                      torch.aoti_torch_get_device_index(handle, &tensor.device) ||
                      torch.aoti_torch_get_dim(handle, &tensor.dim) || torch.aoti_torch_get_sizes(handle, &sizes) ||
                      torch.aoti_torch_get_strides(handle, &strides) ||
                      torch.aoti_torch_is_contiguous(handle, &tensor.contiguous);
  tensor.sizes = sizes;
  tensor.strides = strides;
  return !failed;
}

bool allocate(Tensor const& like, int32_t dtype, int64_t dim, int64_t const* sizes, OwnedTensor& out) {
  int64_t strides[kMaxDim];
  int64_t stride = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i];
  }
  return torch.aoti_torch_empty_strided(dim, sizes, strides, dtype, like.device_type, like.device, out.out()) == 0;
}

}  // namespace marlin_gen
