// wgmma with A in registers and B in shared memory, and setmaxnreg. The descriptor is the real header's.
#pragma once
#include "emulator.h"
#include "wgmma_state.h"

namespace real_header {
using namespace marlin_gen;
#include_next "marlin_gen/ptx/wgmma.cuh"
}  // namespace real_header

namespace marlin_gen::ptx {
using namespace emulator;
using real_header::marlin_gen::ptx::wgmma_descriptor;

// B as the descriptor says: where the 16-byte pieces of its `columns` rows of 16 k lie, two a row.
inline std::vector<u32> pieces_of_b(u64 descriptor, int columns) {
  u32 const start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) fail("a descriptor other than of 1024-byte aligned 128-byte swizzle");
  std::vector<u32> offsets;
  for (int column = 0; column < columns; ++column)
    for (int piece = 0; piece < 2; ++piece) offsets.push_back(swizzled(start + column / 8 * stride + column % 8 * 128 + piece * 16));
  return offsets;
}

template <bool kIsBf16, int kN>
struct WgmmaM64K16 {
  static_assert(sizeof(real_header::marlin_gen::ptx::WgmmaM64K16<kIsBf16, kN>) > 0);
  struct Lane { float* d; u32 const* a; u64 b; };

  template <bool kAdds = true>
  static void mma(float (&d)[kN / 2], u32 const (&a)[4], u64 b) {
    Lane mine{d, a, b};
    with_warp("wgmma", mine, [](auto lane) {
      WarpWgmma& warp = *self().warp->wgmma;
      if (!warp.fenced) fail("wgmma without wgmma.fence since registers were written");
      Wgmma product;
      product.b_offsets = pieces_of_b(lane(0).b, kN);
      for (u32 offset : product.b_offsets) {
        u8 const* const bytes = at(my_block().rank << 24 | offset, 16);
        product.b_bytes.insert(product.b_bytes.end(), bytes, bytes + 16);
      }
      Sums& sums = warp.sums_at(lane(0).d, kN / 2);
      bool const is_new = !sums.registers[0];
      for (int i = 0; i < 32; ++i) {
        if (lane(i).b != lane(0).b) fail("lanes disagree on a wgmma's descriptor");
        product.a[i] = lane(i).a;
        std::memcpy(product.a_values[i], lane(i).a, 16);
        if (is_new) sums.take(i, lane(i).d, kN / 2);
        if (sums.registers[i] != lane(i).d) fail("lanes disagree on a wgmma's sums");
      }
      multiply(product, sums, kAdds);
      warp.open.push_back(std::move(product));
    });
  }

 private:
  static float value(u32 pair, int i) { return kIsBf16 ? brain(pair, i) : float(half(pair, i)); }
  static void multiply(Wgmma const& product, Sums& sums, bool adds) {
    static float a[16][16], b[kN][16];  // by row and k, by column and k
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 16; ++k) a[row][k] = value(product.a_values[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2);
    for (int column = 0; column < kN; ++column)
      for (int k = 0; k < 16; ++k) {
        u32 word;
        std::memcpy(&word, &product.b_bytes[column * 32 + k / 2 * 4], 4);
        b[column][k] = value(word, k % 2);
      }
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < kN; ++column) {
        float& sum = sums.values[row % 8 * 4 + column % 8 / 2][column / 8 * 4 + row / 8 * 2 + column % 2];
        double exact = adds ? sum : 0;
        for (int k = 0; k < 16; ++k) exact += double(a[row][k]) * b[column][k];
        sum = static_cast<float>(exact);
      }
  }
};

inline void wgmma_fence() {
  int nothing = 0;
  with_warp("wgmma.fence", nothing, [](auto) { self().warp->wgmma->fenced = true; });
}
inline void wgmma_commit_group() {
  int nothing = 0;
  with_warp("wgmma.commit_group", nothing, [](auto) {
    WarpWgmma& warp = *self().warp->wgmma;
    warp.groups.push_back(std::move(warp.open));
    warp.open.clear();
    warp.fenced = false;
  });
}
template <int kPending>
void wgmma_wait_group() {
  int nothing = 0;
  may_pause();
  with_warp("wgmma.wait_group", nothing, [](auto) { self().warp->wgmma->wait(my_block(), kPending); });
}

// A warp's registers come from the block's pool: an increase waits until others have given back enough. One to fewer
// than the warp has changes nothing: so it is on the hardware where a block of 256 threads starts with 255 registers a thread.
inline void set_registers(int registers, bool is_increase) {
  int nothing = 0;
  with_warp("setmaxnreg", nothing, [=](auto) {
    int const change = registers - self().warp->registers;
    if (registers % 8 || registers < 24 || registers > 256) fail("setmaxnreg to " + std::to_string(registers));
    if (is_increase ? change <= 0 : change >= 0) return;
    self().warp->registers = registers;
    my_block().free_registers -= change * 32;
  });
  Block const& block = my_block();
  if (is_increase) {
    wait_until([&block] { return block.free_registers >= 0; },
               [&block] { return "registers: " + std::to_string(-block.free_registers) + " more than the block was launched with"; });
  }
}
template <int kRegisters>
void setmaxnreg_inc() { set_registers(kRegisters, true); }
template <int kRegisters>
void setmaxnreg_dec() { set_registers(kRegisters, false); }

}  // namespace marlin_gen::ptx
