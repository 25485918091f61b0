// Global memory that blocks share: partial sums and locks.
#pragma once
#include "emulator.h"

namespace marlin_gen::ptx {
using namespace emulator;

inline f32x4 ld_global_cg_f32x4(f32x4 const* address) {
  check_global(address, 16, {request.partials}, "ld.global.cg");
  check_waited("ld.global.cg");
  may_pause();
  return *address;
}
inline void st_global_cg_f32x4(f32x4* address, f32x4 v) {
  check_global(address, 16, {request.partials}, "st.global.cg");
  check_waited("st.global.cg");
  may_pause();
  *address = v;
}
// A thread that reads a lock twice in a row spins: it sleeps until the lock changes.
inline int ld_acquire_gpu(int const* address) {
  check_global(address, 4, {request.locks}, "ld.acquire");
  check_waited("ld.acquire");
  int const known = self().lock_value;
  if (self().lock == address)
    wait_until([address, known] { return *address != known; }, [address, known] { return "a lock that stays " + std::to_string(known); });
  self().lock = address;
  return self().lock_value = *address;
}
inline void st_relaxed_gpu(int* address, int v) {
  check_global(address, 4, {request.locks}, "store of a lock");
  check_waited("store of a lock");
  self().lock = nullptr;
  may_pause();
  *address = v;
}
inline void st_release_gpu(int* address, int v) { st_relaxed_gpu(address, v); }

}  // namespace marlin_gen::ptx
