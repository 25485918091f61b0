// Programmatic dependent launch: the grid starts before what it depends on has written A.
#pragma once
#include "emulator.h"

namespace marlin_gen::ptx {
using namespace emulator;

inline void griddepcontrol_launch_dependents() {}
inline void griddepcontrol_wait() { self().has_waited = true; may_pause(); }
inline void cp_async_bulk_prefetch_l2(void const* gmem, u32 bytes) {
  if (reinterpret_cast<size_t>(gmem) % 16 || bytes % 16) fail("misaligned prefetch");
  check_global(gmem, bytes, {request.weight}, "prefetch reads");
}

}  // namespace marlin_gen::ptx
