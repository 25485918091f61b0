// wgmma of one warp. The product is computed when it is issued, into a copy of its sums; until all are waited for, sums
// are poisoned and neither the A registers nor B's shared memory may change: hardware may read them at any moment of that time.
#pragma once
#include <cmath>

#include "memory.h"

namespace emulator {

struct Wgmma {
  u32 const* a[32];       // each lane's four registers
  u32 a_values[32][4];
  std::vector<u32> b_offsets;  // of each 16-byte piece, in shared memory
  std::vector<u8> b_bytes;
};

// What products in flight add to: registers of each lane, and their true values.
struct Sums {
  static constexpr u32 kPoison = 0x7fbadbad;  // a NaN
  float* registers[32] = {};
  std::vector<float> values[32];

  void take(int lane, float* d, int count) {
    registers[lane] = d;
    values[lane].assign(d, d + count);
    for (int i = 0; i < count; ++i) std::memcpy(d + i, &kPoison, 4);
  }
  void give_back() const {
    for (int lane = 0; lane < 32; ++lane) {
      for (size_t i = 0; i < values[lane].size(); ++i) {
        if (std::memcmp(registers[lane] + i, &kPoison, 4)) fail("sums were written while a wgmma was in flight");
        registers[lane][i] = values[lane][i];
      }
    }
  }
};

struct WarpWgmma {
  std::vector<Wgmma> open;
  std::deque<std::vector<Wgmma>> groups;
  bool fenced = false;
  std::deque<Sums> in_flight;  // more than one set only where a kernel adds to several

  bool is_busy() const { return !open.empty() || !groups.empty(); }

  // Those of `count` registers from `d` in lane 0; a new set has none yet.
  Sums& sums_at(float const* d, size_t count) {
    for (Sums& sums : in_flight) {
      float const* const begin = sums.registers[0];
      size_t const size = sums.values[0].size();
      if (begin == d && size == count) return sums;
      if (d < begin + size && begin < d + count) fail("two sets of sums that overlap are in flight");
    }
    return in_flight.emplace_back();
  }
  // Ends all but the last `pending` groups.
  void wait(Block const& block, size_t pending) {
    if (!open.empty()) fail("wgmma.wait_group before wgmma.commit_group");
    if (groups.empty()) return;
    for (; groups.size() > pending; groups.pop_front()) {
      for (Wgmma const& product : groups.front()) check_unchanged(block, product);
    }
    if (!groups.empty()) return;
    for (Sums const& sums : in_flight) sums.give_back();
    in_flight.clear();
  }

 private:
  static void check_unchanged(Block const& block, Wgmma const& product) {
    for (int lane = 0; lane < 32; ++lane)
      if (std::memcmp(product.a[lane], product.a_values[lane], 16)) fail("A registers of a wgmma were written before it was waited for");
    for (size_t i = 0; i < product.b_offsets.size(); ++i)
      if (std::memcmp(&block.smem[product.b_offsets[i]], &product.b_bytes[i * 16], 16))
        fail("B of a wgmma was overwritten before it was waited for");
  }
};

}  // namespace emulator
