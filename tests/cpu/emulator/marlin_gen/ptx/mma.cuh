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
template <class Value>
void mma_m16n8k16(Value value, float (&d)[4], u32 const (&a)[4], u32 b0, u32 b1) {
  struct { float* d; u32 const* a; u32 b[2]; } mine{d, a, {b0, b1}};
  with_warp("mma", mine, [value](auto lane) {
    for (int l = 0; l < 32; ++l) {
      for (int q = 0; q < 4; ++q) {
        double sum = lane(l).d[q];
        for (int k = 0; k < 16; ++k) {
          u32 const wa = lane(l / 4 * 4 + k % 8 / 2).a[q / 2 + k / 8 * 2], wb = lane((l % 4 * 2 + q % 2) * 4 + k % 8 / 2).b[k / 8];
          sum += double(value(wa, k % 2)) * double(value(wb, k % 2));
        }
        lane(l).d[q] = static_cast<float>(sum);
      }
    }
  });
}
inline void mma_m16n8k16_f16(float (&d)[4], u32 const (&a)[4], u32 b0, u32 b1) { mma_m16n8k16(half, d, a, b0, b1); }
inline void mma_m16n8k16_bf16(float (&d)[4], u32 const (&a)[4], u32 b0, u32 b1) { mma_m16n8k16(brain, d, a, b0, b1); }

}  // namespace marlin_gen::ptx
