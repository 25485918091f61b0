// Decoding of packed weight words into the A fragment of a 16x16 block, one overload set per weight format.
//
// A lane (g = lane / 4, t = lane % 4) holds the 8 codes of a block that its fragment needs in one word:
//   nibble  0     1     2     3     4     5     6     7
//   row     g    g+8    g    g+8    g    g+8    g    g+8
//   k      2t    2t   2t+8  2t+8  2t+1  2t+1  2t+9  2t+9
// so that masks 000f000f and 00f000f0 on `word` and `word >> 8` yield the four half2 registers in order.
#pragma once
#include "marlin_gen/ptx/half.cuh"

namespace marlin_gen {

// u4 codes with zero point 8 and fp16 scales.
//
// fp16 has 10 mantissa bits, so 0x6400 | q is exactly 1024 + q, and with q four bits higher 1024 + 16 q.
// The zero point is subtracted before the scale is applied: (1024 + q) * s - 1032 * s would round 1032 * s,
// an error of up to half a quantisation step.
struct DecodeU4F16 {
  static constexpr u32 kLowMask = 0x000f000f, kHighMask = 0x00f000f0;
  static constexpr u32 kExponent = 0x64006400;  // 1024.0 twice

  // What `raw` adds to a code, for the deferred correction: rows g carry 1 * q + 1024, rows g + 8 carry 16 * q + 1024.
  static constexpr float kRawOffset = 1024.f;
  static constexpr float kRawHighScale = 1.f / 16.f;

  // fragment[i] = scale * (code - 8): 13 instructions for 8 weights. Scales are the same value twice.
  __device__ static __forceinline__ void exact(u32 word, u32 scale_g, u32 scale_g8, u32 (&fragment)[4]) {
    constexpr u32 k1032 = 0x64086408, kSixteenth = 0x2c002c00, kMinus72 = 0xd480d480;  // 1024 / 16 + 8 = 72
    u32 const high_word = word >> 8;
    u32 const q0 = ptx::lop3_and_or(word, kLowMask, kExponent), q1 = ptx::lop3_and_or(word, kHighMask, kExponent);
    u32 const q2 = ptx::lop3_and_or(high_word, kLowMask, kExponent), q3 = ptx::lop3_and_or(high_word, kHighMask, kExponent);
    fragment[0] = ptx::mul_f16x2(ptx::sub_f16x2(q0, k1032), scale_g);
    fragment[1] = ptx::mul_f16x2(ptx::fma_f16x2(q1, kSixteenth, kMinus72), scale_g8);
    fragment[2] = ptx::mul_f16x2(ptx::sub_f16x2(q2, k1032), scale_g);
    fragment[3] = ptx::mul_f16x2(ptx::fma_f16x2(q3, kSixteenth, kMinus72), scale_g8);
  }

  // fragment[i] = 1024 + code (rows g) or 1024 + 16 * code (rows g + 8): 5 instructions for 8 weights.
  __device__ static __forceinline__ void raw(u32 word, u32 (&fragment)[4]) {
    u32 const high_word = word >> 8;
    fragment[0] = ptx::lop3_and_or(word, kLowMask, kExponent);
    fragment[1] = ptx::lop3_and_or(word, kHighMask, kExponent);
    fragment[2] = ptx::lop3_and_or(high_word, kLowMask, kExponent);
    fragment[3] = ptx::lop3_and_or(high_word, kHighMask, kExponent);
  }
};

}  // namespace marlin_gen
