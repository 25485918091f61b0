// Arithmetic on packed pairs of bf16, each pair in one 32-bit register (low half first).
#pragma once
#include "marlin_gen/types.cuh"

namespace marlin_gen::ptx {

__device__ __forceinline__ u32 fma_bf16x2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
// Two floats to one pair, rounded to nearest even; `lo` goes to the low half.
__device__ __forceinline__ u32 pack_bf16x2(float lo, float hi) {
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
  return d;
}

}  // namespace marlin_gen::ptx
