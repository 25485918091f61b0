// Arithmetic on packed pairs of fp16.
#pragma once
#include "emulator.h"

namespace emulator {
inline _Float16 half(u32 pair, int i) {
  u16 const bits = pair >> 16 * i;
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return value;
}
inline u32 pair(_Float16 lo, _Float16 hi) {
  u16 l, h;
  std::memcpy(&l, &lo, 2);
  std::memcpy(&h, &hi, 2);
  return l | u32(h) << 16;
}
}  // namespace emulator

namespace marlin_gen::ptx {
using namespace emulator;

inline u32 lop3_and_or(u32 a, u32 mask, u32 bits) { return (a & mask) | bits; }
inline u32 sub_f16x2(u32 a, u32 b) { return pair(half(a, 0) - half(b, 0), half(a, 1) - half(b, 1)); }
inline u32 mul_f16x2(u32 a, u32 b) { return pair(half(a, 0) * half(b, 0), half(a, 1) * half(b, 1)); }
inline _Float16 fma_f16(double a, double b, double c) { return static_cast<_Float16>(a * b + c); }
inline u32 fma_f16x2(u32 a, u32 b, u32 c) {
  return pair(fma_f16(half(a, 0), half(b, 0), half(c, 0)), fma_f16(half(a, 1), half(b, 1), half(c, 1)));
}
inline u32 duplicate_low(u32 p) { return pair(half(p, 0), half(p, 0)); }
inline u32 duplicate_high(u32 p) { return pair(half(p, 1), half(p, 1)); }
inline u32 pack_f16x2(float lo, float hi) { return pair(static_cast<_Float16>(lo), static_cast<_Float16>(hi)); }
inline float low_f32(u32 p) { return half(p, 0); }
inline float high_f32(u32 p) { return half(p, 1); }
inline u32 prmt(u32 a, u32 b, u32 selector) {
  u64 const bytes = u64(b) << 32 | a;
  u32 d = 0;
  for (int i = 0; i < 4; ++i) {
    u32 const byte = bytes >> (selector >> 4 * i & 7) * 8 & 0xff, sign = byte >> 7 ? 0xff : 0;
    d |= (selector >> 4 * i & 8 ? sign : byte) << 8 * i;
  }
  return d;
}

}  // namespace marlin_gen::ptx
