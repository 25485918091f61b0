// Shared-memory accesses and named barriers.
#pragma once
#include "emulator.h"

namespace marlin_gen::ptx {
using namespace emulator;

inline u32 smem_address(void const* p) { return my_block().rank << 24 | u32(static_cast<u8 const*>(p) - my_block().smem.data()); }
template <class T>
T ld_shared(u32 address) {
  own(address);
  may_pause();  // others may overtake a reader
  return load<T>(address);
}
inline u32x4 ld_shared_v4(u32 address) { return ld_shared<u32x4>(address); }
inline u32x2 ld_shared_v2(u32 address) { return ld_shared<u32x2>(address); }
inline u32 ld_shared_u32(u32 address) { return ld_shared<u32>(address); }
inline f32x4 ld_shared_f32x4(u32 address) { return ld_shared<f32x4>(address); }
inline void st_shared_f32x4(u32 address, f32x4 v) {
  own(address);
  may_pause();
  store(address, v);
}
inline Barrier& named_barrier(int id, int threads) {
  if (id < 0 || id > 15) fail("there is no named barrier " + std::to_string(id));
  if (threads % 32 || threads > request.threads) fail("a named barrier for " + std::to_string(threads) + " threads");
  return my_block().barriers[id];
}
inline void bar_sync(int id, int threads) { sync(named_barrier(id, threads), threads, "named barrier " + std::to_string(id)); }
inline void bar_arrive(int id, int threads) { arrive(named_barrier(id, threads), threads, "bar.arrive"); }
inline void fence_proxy_async_shared() {
  for (u32 piece : self().unfenced) my_block().unfenced[piece] = 0;
  self().unfenced.clear();
}

}  // namespace marlin_gen::ptx
