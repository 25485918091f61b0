// cp.async: 16-byte copies from global to shared memory that need no registers (sm_80 and newer).
// All of them are the .cg form, which bypasses L1.
#pragma once
#include "marlin_gen/types.cuh"

namespace marlin_gen::ptx {

// What to tell L2 about data that is read once: evict it before anything else.
__device__ __forceinline__ u64 createpolicy_evict_first() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void cp_async_16_hint(u32 smem, void const* gmem, u64 policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(smem), "l"(gmem), "l"(policy));
}
// Reads `bytes` (0 or 16) and fills the rest with zeros; with 0 nothing is read, but pass a legal address anyway.
__device__ __forceinline__ void cp_async_16_zfill(u32 smem, void const* gmem, u32 bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(gmem), "r"(bytes));
}
__device__ __forceinline__ void cp_async_16_zfill_hint(u32 smem, void const* gmem, u32 bytes, u64 policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(smem), "l"(gmem), "r"(bytes), "l"(policy));
}
// Closes this thread's group of copies issued since the last one; an empty group is legal and counts.
__device__ __forceinline__ void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's newest groups are still under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace marlin_gen::ptx
