#include "torch_shims.h"

#include <dlfcn.h>

namespace marlin_gen {

Torch torch{};

const char* load_torch() {
  // Both are loaded already when Python has imported torch; RTLD_NOLOAD finds them by their names.
  void* const cpu = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD);
  if (cpu == nullptr) return "torch is not loaded: import torch first";
#define MARLIN_GEN_FIND(name, result, arguments)                            \
  torch.name = reinterpret_cast<result(*) arguments>(dlsym(cpu, #name));    \
  if (torch.name == nullptr) return "this torch has no " #name ": it is older than 2.9";
  MARLIN_GEN_TORCH_SHIMS(MARLIN_GEN_FIND)
#undef MARLIN_GEN_FIND
  if (void* const cuda = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD)) {
    torch.aoti_torch_get_current_cuda_stream = reinterpret_cast<decltype(torch.aoti_torch_get_current_cuda_stream)>(
        dlsym(cuda, "aoti_torch_get_current_cuda_stream"));
    if (torch.aoti_torch_get_current_cuda_stream == nullptr) return "libtorch_cuda has no current stream to ask for";
  }
  return nullptr;
}

}  // namespace marlin_gen
