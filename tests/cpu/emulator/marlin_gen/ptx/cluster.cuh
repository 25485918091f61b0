// Clusters and distributed shared memory.
#pragma once
#include "emulator.h"

namespace marlin_gen::ptx {
using namespace emulator;

inline u32 cluster_ctarank() { return my_block().rank; }
inline void barrier_cluster_arrive_release() {
  sync_warp("barrier.cluster");
  Barrier& barrier = my_block().cluster->barrier;
  if (self().cluster_arrival >= 0) fail("barrier.cluster.arrive twice without a wait");
  self().cluster_arrival = barrier.generation;
  arrive(barrier, request.cluster * request.threads, "the cluster");
}
inline void barrier_cluster_wait_acquire() {
  long const arrival = self().cluster_arrival;
  if (arrival < 0) fail("barrier.cluster.wait without an arrival");
  Barrier& barrier = my_block().cluster->barrier;
  wait_until([&barrier, arrival] { return barrier.generation != arrival; }, [] { return std::string("the cluster"); });
  self().cluster_arrival = -1;
}
inline void barrier_cluster_sync() {
  barrier_cluster_arrive_release();
  barrier_cluster_wait_acquire();
}
inline void barrier_cluster_sync_relaxed() { barrier_cluster_sync(); }
inline u32 mapa(u32 address, u32 rank) { return rank << 24 | own(address); }
inline f32x4 ld_shared_cluster_f32x4(u32 address) {
  may_pause();
  return load<f32x4>(address);
}

}  // namespace marlin_gen::ptx
