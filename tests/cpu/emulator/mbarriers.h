// mbarriers: a phase is complete when all arrivals and all expected bytes have come. Kept beside shared memory, by offset.
#pragma once
#include "memory.h"

namespace emulator {

inline Mbarrier& mbarrier_at(Block& block, u32 offset) {
  auto const found = block.mbarriers.find(offset);
  static Mbarrier nobodys;
  if (found == block.mbarriers.end()) return fail("no mbarrier at " + std::to_string(offset)), nobodys;
  return found->second;
}
// As the asynchronous proxy and other blocks see it.
inline Mbarrier& fenced_mbarrier_at(Block& block, u32 offset) {
  Mbarrier& barrier = mbarrier_at(block, offset);
  if (barrier.initialised_by) fail("an mbarrier is used without a fence after its initialisation");
  return barrier;
}
inline void update(Mbarrier& barrier, int arrivals, int expected_bytes, int completed_bytes) {
  barrier.bytes += expected_bytes - completed_bytes;
  barrier.missing -= arrivals;
  if (barrier.missing < 0) fail("more arrivals at an mbarrier than its " + std::to_string(barrier.count));
  if (std::abs(barrier.bytes) >= 1 << 20) fail("an mbarrier counts more than 2^20 - 1 bytes");
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  barrier.missing = barrier.count;
  barrier.phase ^= 1;
}

}  // namespace emulator
