// Thread block clusters and distributed shared memory (sm_90 and newer).
#pragma once
#include "marlin_gen/types.cuh"

namespace marlin_gen::ptx {

__device__ __forceinline__ u32 cluster_ctarank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Every thread of every block of the cluster arrives and waits; shared memory written before is visible after.
__device__ __forceinline__ void barrier_cluster_arrive_release() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void barrier_cluster_wait_acquire() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void barrier_cluster_sync() {
  barrier_cluster_arrive_release();
  barrier_cluster_wait_acquire();
}
// The same without a fence, which waits until all that a thread has written is seen by the whole GPU (0.5 us): where no block reads
// what another wrote before.
__device__ __forceinline__ void barrier_cluster_sync_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  barrier_cluster_wait_acquire();
}
// The address, in the cluster's window, of `address` in block `rank`'s shared memory.
__device__ __forceinline__ u32 mapa(u32 address, u32 rank) {
  u32 remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}
__device__ __forceinline__ f32x4 ld_shared_cluster_f32x4(u32 address) {
  f32x4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
  return v;
}

}  // namespace marlin_gen::ptx
