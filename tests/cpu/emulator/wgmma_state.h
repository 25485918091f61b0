// wgmma of one warp. The product is computed when it is issued, into a copy of the sums; until it is waited for, the sums
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

struct WarpWgmma {
  static constexpr u32 kPoison = 0x7fbadbad;  // a NaN
  std::vector<Wgmma> open;
  std::deque<std::vector<Wgmma>> groups;
  bool fenced = false;
  float* registers[32] = {};  // the sums in flight, and their true values
  std::vector<float> sums[32];

  bool is_busy() const { return !open.empty() || !groups.empty(); }

  void take_sums(int lane, float* d, int count) {
    if (is_busy()) {
      if (registers[lane] != d || static_cast<int>(sums[lane].size()) != count) fail("two sets of sums are in flight");
      return;
    }
    registers[lane] = d;
    sums[lane].assign(d, d + count);
    for (int i = 0; i < count; ++i) std::memcpy(d + i, &kPoison, 4);
  }
  void give_back_sums() {
    for (int lane = 0; lane < 32; ++lane) {
      for (size_t i = 0; i < sums[lane].size(); ++i) {
        if (std::memcmp(registers[lane] + i, &kPoison, 4)) fail("sums were written while a wgmma was in flight");
        registers[lane][i] = sums[lane][i];
      }
    }
  }
  // Ends all but the last `pending` groups.
  void wait(Block const& block, size_t pending) {
    if (!open.empty()) fail("wgmma.wait_group before wgmma.commit_group");
    if (groups.empty()) return;
    for (; groups.size() > pending; groups.pop_front()) {
      for (Wgmma const& product : groups.front()) check_unchanged(block, product);
    }
    if (groups.empty()) give_back_sums();
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
