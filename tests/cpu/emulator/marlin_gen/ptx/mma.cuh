// The warp's tensor core instructions.
#pragma once
#include "emulator.h"

namespace marlin_gen::ptx {
using namespace emulator;

inline void ldmatrix_x4(u32 (&d)[4], u32 address) {
  struct { u32* d; u32 address; } mine{d, address};
  with_warp("ldmatrix", mine, [](auto lane) {
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) lane(l).d[i] = load<u32>(lane(i * 8 + l / 4).address + l % 4 * 4);
  });
}
inline void mma_m16n8k16_f16(float (&d)[4], u32 const (&a)[4], u32 b0, u32 b1) {
  struct { float* d; u32 const* a; u32 b[2]; } mine{d, a, {b0, b1}};
  with_warp("mma", mine, [](auto lane) {
    for (int l = 0; l < 32; ++l) {
      for (int q = 0; q < 4; ++q) {
        double sum = lane(l).d[q];
        for (int k = 0; k < 16; ++k) {
          u32 const wa = lane(l / 4 * 4 + k % 8 / 2).a[q / 2 + k / 8 * 2], wb = lane((l % 4 * 2 + q % 2) * 4 + k % 8 / 2).b[k / 8];
          sum += double(half(wa, k % 2)) * double(half(wb, k % 2));
        }
        lane(l).d[q] = static_cast<float>(sum);
      }
    }
  });
}

}  // namespace marlin_gen::ptx
