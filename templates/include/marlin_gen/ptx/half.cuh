// Arithmetic on packed pairs of fp16, each pair in one 32-bit register (low half first).
#pragma once
#include "marlin_gen/types.cuh"

namespace marlin_gen::ptx {

// (a & mask) | bits in one instruction.
__device__ __forceinline__ u32 lop3_and_or(u32 a, u32 mask, u32 bits) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
  return d;
}
__device__ __forceinline__ u32 sub_f16x2(u32 a, u32 b) {
  u32 d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ u32 mul_f16x2(u32 a, u32 b) {
  u32 d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ u32 fma_f16x2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
// Byte permutation: selector nibble i picks byte i of the result from the 8 bytes {b, a}.
__device__ __forceinline__ u32 prmt(u32 a, u32 b, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}
__device__ __forceinline__ u32 duplicate_low(u32 pair) { return prmt(pair, pair, 0x1010); }
__device__ __forceinline__ u32 duplicate_high(u32 pair) { return prmt(pair, pair, 0x3232); }

// Two floats to one pair, rounded to nearest even; `lo` goes to the low half.
__device__ __forceinline__ u32 pack_f16x2(float lo, float hi) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
  return d;
}
__device__ __forceinline__ float from_f16(u16 x) {
  float d;
  asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(x));
  return d;
}
__device__ __forceinline__ float low_f32(u32 pair) { return from_f16(static_cast<u16>(pair & 0xffff)); }
__device__ __forceinline__ float high_f32(u32 pair) { return from_f16(static_cast<u16>(pair >> 16)); }

}  // namespace marlin_gen::ptx
