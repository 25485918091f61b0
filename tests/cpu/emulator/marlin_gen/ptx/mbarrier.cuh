// mbarrier instructions, and the stores that signal one in another block.
#pragma once
#include "emulator.h"
#include "mbarriers.h"

namespace marlin_gen::ptx {
using namespace emulator;

inline void mbarrier_init(u32 address, int arrivals) {
  check_bounds(my_block(), own(address), 8, 8);
  my_block().mbarriers[own(address)] = {arrivals, arrivals, 0, 0, &self()};
}
inline void fence_mbarrier_init() {
  for (auto& [offset, barrier] : my_block().mbarriers)
    if (barrier.initialised_by == &self()) barrier.initialised_by = nullptr;
}
inline void mbarrier_arrive(u32 address) {
  may_pause();
  update(mbarrier_at(my_block(), own(address)), 1, 0, 0);
}
inline void mbarrier_arrive_expect_tx(u32 address, int bytes) {
  may_pause();
  update(mbarrier_at(my_block(), own(address)), 1, bytes, 0);
}
inline void mbarrier_arrive_cluster(u32 address) {
  may_pause();
  update(fenced_mbarrier_at(block_of(address), address & 0xffffff), 1, 0, 0);
}
inline void mbarrier_wait(u32 address, u32 parity) {
  Mbarrier& barrier = mbarrier_at(my_block(), own(address));
  wait_until([&barrier, parity] { return barrier.phase != parity; },
             [&barrier, parity, address] {
               return "phase " + std::to_string(parity) + " of the mbarrier at " + std::to_string(address & 0xffffff) + " (" +
                      std::to_string(barrier.missing) + " of " + std::to_string(barrier.count) + " arrivals and " +
                      std::to_string(barrier.bytes) + " bytes missing)";
             });
}
inline void mbarrier_wait_cluster(u32 address, u32 parity) { mbarrier_wait(address, parity); }
inline void st_async_f32x4(u32 address, f32x4 v, u32 barrier) {
  Block& block = block_of(address);
  if (&block != &block_of(barrier)) fail("st.async signals another block than it writes to");
  start_copy(block, address & 0xffffff, 16, 16, [&block, v, barrier](u8* to) {
    std::memcpy(to, &v, 16);
    update(fenced_mbarrier_at(block, barrier & 0xffffff), 0, 0, 16);
  });
}

}  // namespace marlin_gen::ptx
