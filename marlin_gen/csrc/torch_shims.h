// What the library uses of PyTorch: C functions of its stable ABI, all of them there since 2.9, found at run time.
//
// They are declared here, not taken from torch's headers, so that a wheel is built where torch is not installed and the
// library is linked against nothing of it. tests/cpu/test_native_build.py compiles this list against torch's own headers
// with TORCH_TARGET_VERSION of 2.9: a signature that differs, or is newer, does not compile.
#pragma once
#include <cstdint>

struct AtenTensorOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
class TorchLibraryOpaque;
using TorchLibraryHandle = TorchLibraryOpaque*;
struct DeviceGuardOpaque;
using DeviceGuardHandle = DeviceGuardOpaque*;
using AOTITorchError = int32_t;  // 0: success
using StableIValue = uint64_t;   // one argument or result of an operator: a number, a handle, or what an optional points to

#define MARLIN_GEN_TORCH_SHIMS(X)                                                                                     \
  X(aoti_torch_check, void, (bool, const char*, const char*, uint32_t, const char*)) /* throws from inside torch */   \
  X(aoti_torch_dtype_float16, int32_t, ())                                                                            \
  X(aoti_torch_dtype_bfloat16, int32_t, ())                                                                           \
  X(aoti_torch_dtype_int32, int32_t, ())                                                                              \
  X(aoti_torch_dtype_uint8, int32_t, ())                                                                              \
  X(aoti_torch_get_dtype, AOTITorchError, (AtenTensorHandle, int32_t*))                                               \
  X(aoti_torch_get_device_type, AOTITorchError, (AtenTensorHandle, int32_t*))                                         \
  X(aoti_torch_get_device_index, AOTITorchError, (AtenTensorHandle, int32_t*))                                        \
  X(aoti_torch_get_dim, AOTITorchError, (AtenTensorHandle, int64_t*))                                                 \
  X(aoti_torch_get_sizes, AOTITorchError, (AtenTensorHandle, int64_t**))                                              \
  X(aoti_torch_get_strides, AOTITorchError, (AtenTensorHandle, int64_t**))                                            \
  X(aoti_torch_get_data_ptr, AOTITorchError, (AtenTensorHandle, void**))                                              \
  X(aoti_torch_is_contiguous, AOTITorchError, (AtenTensorHandle, bool*))                                              \
  X(aoti_torch_empty_strided, AOTITorchError,                                                                         \
    (int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, AtenTensorHandle*))                          \
  X(aoti_torch_delete_tensor_object, AOTITorchError, (AtenTensorHandle))                                              \
  X(aoti_torch_call_dispatcher, AOTITorchError, (const char*, const char*, StableIValue*))                            \
  X(aoti_torch_library_init_impl, AOTITorchError,                                                                     \
    (const char*, const char*, const char*, uint32_t, TorchLibraryHandle*))                                           \
  X(aoti_torch_library_impl, AOTITorchError,                                                                          \
    (TorchLibraryHandle, const char*, void (*)(StableIValue*, uint64_t, uint64_t)))                                   \
  X(aoti_torch_get_current_device_index, AOTITorchError, (int32_t*))                                                  \
  X(aoti_torch_create_device_guard, AOTITorchError, (int32_t, DeviceGuardHandle*))                                    \
  X(aoti_torch_delete_device_guard, AOTITorchError, (DeviceGuardHandle))

namespace marlin_gen {

struct Torch {
#define MARLIN_GEN_FIELD(name, result, arguments) result(*name) arguments;
  MARLIN_GEN_TORCH_SHIMS(MARLIN_GEN_FIELD)
#undef MARLIN_GEN_FIELD

  // Of libtorch_cuda: null in a CPU build of torch, where only tests call the library.
  AOTITorchError (*aoti_torch_get_current_cuda_stream)(int32_t, void**);
};

extern Torch torch;  // filled by load_torch

// Null, or what is missing.
const char* load_torch();

}  // namespace marlin_gen
