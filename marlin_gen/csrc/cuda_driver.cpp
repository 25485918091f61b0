#include "cuda_driver.h"

#include <dlfcn.h>

namespace marlin_gen::cuda {

Driver driver{};

namespace {

template <class Pointer>
bool find(void* library, const char* name, Pointer& pointer) {
  pointer = reinterpret_cast<Pointer>(dlsym(library, name));
  return pointer != nullptr;
}

}  // namespace

const char* load_driver() {
  void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return "there is no CUDA driver (libcuda.so.1)";
  bool const found = find(library, "cuLaunchKernelEx", driver.launch) &&
                     find(library, "cuStreamIsCapturing", driver.is_capturing) &&
                     find(library, "cuDeviceGet", driver.device_get) &&
                     find(library, "cuDevicePrimaryCtxRetain", driver.retain_context) &&
                     find(library, "cuCtxSetCurrent", driver.set_context) &&
                     find(library, "cuTensorMapEncodeTiled", driver.encode_tiled);
  return found ? nullptr : "the CUDA driver is older than 12.0";
}

Result bind_context(int device_index) {
  // Retained for good, once per device: torch keeps the context as long as the process lives.
  static thread_local int retained_device = -1;
  static thread_local Context retained = nullptr;
  if (retained_device != device_index) {
    int device = 0;
    if (Result const error = driver.device_get(&device, device_index)) return error;
    if (Result const error = driver.retain_context(&retained, device)) return error;
    retained_device = device_index;
  }
  return driver.set_context(retained);
}

}  // namespace marlin_gen::cuda
