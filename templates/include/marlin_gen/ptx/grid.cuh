// Programmatic dependent launch (sm_90 and newer): a kernel may start while the one before it on the stream still runs.
// Without the launch attribute, and on older GPUs, both calls do nothing.
#pragma once
#include "marlin_gen/types.cuh"

namespace marlin_gen::ptx {

// The next kernel may start where this one leaves room.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Until the kernel before this one is complete and what it wrote is visible. Weights and scales alone are read before.
__device__ __forceinline__ void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace marlin_gen::ptx
