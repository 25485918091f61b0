// 16-byte copies by cp.async, waited for in groups.
#pragma once
#include "emulator.h"

namespace marlin_gen::ptx {
using namespace emulator;

inline void perform(CpAsync const& copy) {
  std::memset(at(copy.smem, 16), 0, 16);
  if (copy.bytes == 0) return;
  if (reinterpret_cast<size_t>(copy.gmem) % 16) fail("misaligned cp.async");
  check_global(copy.gmem, copy.bytes, {request.a, request.weight, request.scales}, "cp.async reads");
  std::memcpy(at(copy.smem, 16), copy.gmem, copy.bytes);
}
inline void cp_async_16_zfill(u32 smem, void const* gmem, u32 bytes) {
  if (bytes > 0 && request.a.holds(gmem, bytes)) check_waited("a load of A");
  CpAsync const copy{smem, static_cast<u8 const*>(gmem), bytes};
  if (request.copies == kEarly || (request.copies == kAnytime && one_in(2))) return perform(copy);
  self().open_copies.push_back(copy);
}
inline void cp_async_16_zfill_hint(u32 smem, void const* gmem, u32 bytes, u64) { cp_async_16_zfill(smem, gmem, bytes); }
inline void cp_async_16_hint(u32 smem, void const* gmem, u64) { cp_async_16_zfill(smem, gmem, 16); }
inline void cp_async_commit_group() {
  self().copy_groups.push_back(std::move(self().open_copies));
  self().open_copies.clear();
}
template <int kPending>
void cp_async_wait_group() {
  for (; self().copy_groups.size() > kPending; self().copy_groups.pop_front())
    for (CpAsync const& copy : self().copy_groups.front()) perform(copy);
}

}  // namespace marlin_gen::ptx
