// The bulk copy engine: tensor-map loads and stores, linear bulk copies, L2 policies (sm_90 and newer).
#pragma once
#include "marlin_gen/types.cuh"

namespace marlin_gen::ptx {

// A CUtensorMap, opaque to the kernel; passed by value as a __grid_constant__ parameter.
struct alignas(64) TensorMap {
  u64 opaque[16];
};

// True in one lane of a converged warp. The compiler then knows that what it guards runs in one lane, and issues a copy with a
// few moves to uniform registers; under `threadIdx.x == 0` it makes a loop over lanes of each, some 50 clocks.
__device__ __forceinline__ bool elect_sync() {
  u32 elected = 0;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "@p mov.u32 %0, 1;\n"
      "}"
      : "+r"(elected));
  return elected != 0;
}

// One box at element coordinates (x, y), x along the contiguous dimension; out-of-range elements read as zero.
__device__ __forceinline__ void cp_async_bulk_tensor_2d_load(u32 smem, TensorMap const* map, int x, int y, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(smem),
      "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}
// `bytes` (a multiple of 16) from global memory, with an L2 policy.
__device__ __forceinline__ void cp_async_bulk_load(u32 smem, void const* gmem, int bytes, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(smem),
      "l"(gmem), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}
// One box from shared memory; out-of-range elements are not written.
__device__ __forceinline__ void cp_async_bulk_tensor_2d_store(TensorMap const* map, u32 smem, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(smem), "r"(x), "r"(y)
               : "memory");
}
__device__ __forceinline__ void cp_async_bulk_commit_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until the stores' shared memory may be reused.
__device__ __forceinline__ void cp_async_bulk_wait_group_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// Until the stores are complete.
__device__ __forceinline__ void cp_async_bulk_wait_group() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

__device__ __forceinline__ u64 createpolicy_evict_first() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Two 8x8 matrices of 16-bit values, transposed on the way: lanes 0-7 and 8-15 give the row addresses.
__device__ __forceinline__ void stmatrix_x2_trans(u32 address, u32 m0, u32 m1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(m0), "r"(m1) : "memory");
}

}  // namespace marlin_gen::ptx
