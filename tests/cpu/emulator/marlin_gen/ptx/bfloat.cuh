// Arithmetic on packed pairs of bf16.
#pragma once
#include "emulator.h"

namespace emulator {
inline float brain(u32 pair, int i) { return __uint_as_float(i ? pair & 0xffff0000 : pair << 16); }
// Rounded to nearest even, from a double, so that sums of products are rounded once.
inline u32 to_brain(double value) {
  u32 bits;
  float const single = static_cast<float>(value);
  std::memcpy(&bits, &single, 4);
  if (single != single) return 0x7fff;
  // The float is rounded to odd before its low half is cut: what it lost must not make a tie.
  if (double(single) != value) {
    if ((double(single) > value) == (single > 0)) bits -= 1;
    bits |= 1;
  }
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
}  // namespace emulator

namespace marlin_gen::ptx {
using namespace emulator;

inline u32 fma_bf16x2(u32 a, u32 b, u32 c) {
  auto const one = [&](int i) { return to_brain(double(brain(a, i)) * brain(b, i) + brain(c, i)); };
  return one(0) | one(1) << 16;
}
inline u32 pack_bf16x2(float lo, float hi) { return to_brain(lo) | to_brain(hi) << 16; }

}  // namespace marlin_gen::ptx
