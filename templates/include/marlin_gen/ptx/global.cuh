// Global memory shared between blocks: loads and stores that bypass L1, and lock words.
#pragma once
#include "marlin_gen/types.cuh"

namespace marlin_gen::ptx {

__device__ __forceinline__ f32x4 ld_global_cg_f32x4(f32x4 const* address) {
  f32x4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(address) : "memory");
  return v;
}
__device__ __forceinline__ void st_global_cg_f32x4(f32x4* address, f32x4 v) {
  asm volatile("st.global.cg.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
__device__ __forceinline__ int ld_acquire_gpu(int const* address) {
  int v;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
  return v;
}
__device__ __forceinline__ void st_relaxed_gpu(int* address, int v) {
  asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(address), "r"(v) : "memory");
}
// After all global writes of this thread, and of those that met it at a barrier before, as every thread of the GPU sees them.
__device__ __forceinline__ void st_release_gpu(int* address, int v) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(address), "r"(v) : "memory");
}

}  // namespace marlin_gen::ptx
