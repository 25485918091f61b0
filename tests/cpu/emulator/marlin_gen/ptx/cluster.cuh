// Clusters and distributed shared memory.
#pragma once
#include "emulator.h"

namespace marlin_gen::ptx {
using namespace emulator;

inline u32 cluster_ctarank() { return my_block().rank; }
inline void barrier_cluster_sync() {
  sync_warp("barrier.cluster");
  sync(my_block().cluster->barrier, request.cluster * request.threads, "the cluster");
}
inline u32 mapa(u32 address, u32 rank) { return rank << 24 | own(address); }
inline f32x4 ld_shared_cluster_f32x4(u32 address) {
  may_pause();
  return load<f32x4>(address);
}

}  // namespace marlin_gen::ptx
