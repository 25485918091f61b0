// Decoding of packed weight words into the A fragment of a 16x16 block, one overload set per weight format.
//
// A lane (g = lane / 4, t = lane % 4) holds the 8 codes of a block that its fragment needs in one word:
//   nibble  0     1     2     3     4     5     6     7
//   row     g    g+8    g    g+8    g    g+8    g    g+8
//   k      2t    2t   2t+8  2t+8  2t+1  2t+1  2t+9  2t+9
// so that masks 000f000f and 00f000f0 on `word` and `word >> 8` yield the four half2 registers in order.
#pragma once
#include "marlin_gen/ptx/half.cuh"
#include "marlin_gen/ptx/shared.cuh"

namespace marlin_gen {

// u4 codes with zero point 8 and fp16 scales.
//
// fp16 has 10 mantissa bits, so 0x6400 | q is exactly 1024 + q, and with q four bits higher 1024 + 16 q.
// The zero point is subtracted before the scale is applied: (1024 + q) * s - 1032 * s would round 1032 * s,
// an error of up to half a quantisation step.
struct DecodeU4F16 {
  static constexpr u32 kLowMask = 0x000f000f, kHighMask = 0x00f000f0;
  static constexpr u32 kExponent = 0x64006400;  // 1024.0 twice
  static constexpr u32 kSixteenth = 0x2c002c00;

  // What `raw` adds to a code, for the deferred correction: rows g carry 1 * q + 1024, rows g + 8 carry 16 * q + 1024.
  static constexpr float kRawOffset = 1024.f;
  static constexpr float kRawHighScale = 1.f / 16.f;

  // The scales of rows g and g + 8, each the same value twice.
  struct Group {
    u32 scale_g, scale_g8;
  };
  static constexpr int kPairBytes = 4;  // of both rows in shared memory
  __device__ static __forceinline__ Group load(u32 address) {
    u32 const pair = ptx::ld_shared_u32(address);
    return {ptx::duplicate_low(pair), ptx::duplicate_high(pair)};
  }

  // fragment[i] = scale * (code - 8): 13 instructions for 8 weights.
  __device__ static __forceinline__ void exact(u32 word, Group group, u32 (&fragment)[4]) {
    scaled(word, 0x64086408, 0xd480d480, group.scale_g, group.scale_g8, fragment);  // 1032, and -72 = -(1024 / 16 + 8)
  }

  // fragment[i] = scale * (code - z), with low = 1024 + z of rows g and minus_high = -(64 + z) of rows g + 8.
  __device__ static __forceinline__ void scaled(u32 word, u32 low, u32 minus_high, u32 scale_g, u32 scale_g8, u32 (&fragment)[4]) {
    u32 const high_word = word >> 8;
    u32 const q0 = ptx::lop3_and_or(word, kLowMask, kExponent), q1 = ptx::lop3_and_or(word, kHighMask, kExponent);
    u32 const q2 = ptx::lop3_and_or(high_word, kLowMask, kExponent), q3 = ptx::lop3_and_or(high_word, kHighMask, kExponent);
    fragment[0] = ptx::mul_f16x2(ptx::sub_f16x2(q0, low), scale_g);
    fragment[1] = ptx::mul_f16x2(ptx::fma_f16x2(q1, kSixteenth, minus_high), scale_g8);
    fragment[2] = ptx::mul_f16x2(ptx::sub_f16x2(q2, low), scale_g);
    fragment[3] = ptx::mul_f16x2(ptx::fma_f16x2(q3, kSixteenth, minus_high), scale_g8);
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

// The same codes about a whole zero point z of each row and group. Beside the scales lie 1024 + z of row g and -(64 + z) of
// row g + 8, which fp16 holds exactly.
struct DecodeU4ZeroF16 : DecodeU4F16 {
  struct Group {
    u32 scale_g, scale_g8, low, minus_high;
  };
  static constexpr int kPairBytes = 8;
  __device__ static __forceinline__ Group load(u32 address) {
    u32x2 const both = ptx::ld_shared_v2(address);
    return {ptx::duplicate_low(both.x), ptx::duplicate_high(both.x), ptx::duplicate_low(both.y), ptx::duplicate_high(both.y)};
  }
  __device__ static __forceinline__ void exact(u32 word, Group group, u32 (&fragment)[4]) {
    scaled(word, group.low, group.minus_high, group.scale_g, group.scale_g8, fragment);
  }
};

template <bool kHasZeros>
struct DecoderOf {
  using Type = DecodeU4F16;
};
template <>
struct DecoderOf<true> {
  using Type = DecodeU4ZeroF16;
};

}  // namespace marlin_gen
