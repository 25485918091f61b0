// Decoding of packed weight words into the A fragment of a 16x16 block: Decoder<number type, bits, offset>.
//
// A lane (g = lane / 4, t = lane % 4) holds the 8 codes of a block that its fragment needs: in one word of 4-bit codes,
//   nibble  0     1     2     3     4     5     6     7
//   row     g    g+8    g    g+8    g    g+8    g    g+8
//   k      2t    2t   2t+8  2t+8  2t+1  2t+1  2t+9  2t+9
// so that masks 000f000f and 00f000f0 on `word` and `word >> 8` yield the four registers in order; in two words of 8-bit codes,
//   byte    0     1     2     3   |  0     1     2     3
//   row     g     g    g+8   g+8  |  g     g    g+8   g+8
//   k      2t   2t+1   2t   2t+1  | 2t+8  2t+9  2t+8  2t+9
//
// A code becomes a number by or-ing it into the mantissa of a power of two whose last bit counts 1 (or 1/16 and the code four bits
// higher): 1024 of fp16, 128 of bf16, 2^23 of fp32. That power is subtracted, together with the zero point where it is whole,
// before the scale is applied: (1024 + q) * s - 1032 * s would round 1032 * s, an error of up to half a quantisation step.
#pragma once
#include "marlin_gen/number.cuh"
#include "marlin_gen/ptx/half.cuh"
#include "marlin_gen/ptx/shared.cuh"

namespace marlin_gen {

// What lies in shared memory for rows g and g + 8 of a group: both scales, and each value twice. The offset is as layout.py packs it: what decoding
// adds to or subtracts from the codes where zero points are whole, else the zero point or minimum itself.
template <Offset kOffset>
struct ScalePair {
  static constexpr int kBytes = kOffset == Offset::kConstant ? 4 : 8;
  u32 scales, scale_g, scale_g8, offset_g, offset_g8;

  __device__ static __forceinline__ ScalePair load(u32 address) {
    if constexpr (kOffset == Offset::kConstant) {
      u32 const pair = ptx::ld_shared_u32(address);
      return {pair, ptx::duplicate_low(pair), ptx::duplicate_high(pair), 0, 0};
    } else {
      u32x2 const both = ptx::ld_shared_v2(address);
      return {both.x, ptx::duplicate_low(both.x), ptx::duplicate_high(both.x), ptx::duplicate_low(both.y), ptx::duplicate_high(both.y)};
    }
  }
};

// A lane's words of 16 rows by 64 k, four k16 steps: one plane of 512 bytes, 16 a lane, for each of kWords.
template <int kWords>
__device__ __forceinline__ void load_words(u32 (&words)[4 * kWords], u32 address) {
#pragma unroll
  for (int plane = 0; plane < kWords; ++plane) {
    u32x4 const quad = ptx::ld_shared_v4(address + plane * 512);
    words[plane * 4] = quad.x, words[plane * 4 + 1] = quad.y, words[plane * 4 + 2] = quad.z, words[plane * 4 + 3] = quad.w;
  }
}

// Two weights of the codes' own values q, for offsets that are not whole.
template <class Number, Offset kOffset>
__device__ __forceinline__ u32 apply(u32 q, u32 scale, u32 offset) {
  return kOffset == Offset::kMinima ? Number::fma(q, scale, offset) : Number::mul(Number::sub(q, offset), scale);
}

// Weights of fragment values, rows g and g + 8 by turns.
template <class Number, class Group>
__device__ __forceinline__ void scale(u32 (&fragment)[4], Group group) {
#pragma unroll
  for (int i = 0; i < 4; ++i) fragment[i] = Number::mul(fragment[i], i % 2 ? group.scale_g8 : group.scale_g);
}

// Whether what is subtracted from codes is a whole number, so that the difference is exact.
constexpr bool is_whole(Offset offset) { return offset == Offset::kConstant || offset == Offset::kZeros; }

template <class Number, int kBits, Offset kOffset>
struct Decoder;

template <Offset kOffset>
struct Decoder<F16, 4, kOffset> {
  using Group = ScalePair<kOffset>;
  static constexpr int kWords = 1, kZeroPoint = 8;
  static constexpr u32 kLowMask = 0x000f000f, kHighMask = 0x00f000f0;
  static constexpr u32 kExponent = 0x64006400, kMinusHigh = 0xd400d400;  // 1024, and -64 = -(1024 / 16)
  static constexpr u32 kCentre = 0x64086408, kMinusHighCentre = 0xd480d480;  // 1032, and -72 = -(64 + 8)
  static constexpr u32 kSixteenth = 0x2c002c00;

  // 13 instructions for 8 weights; with fractions 17.
  __device__ static __forceinline__ void exact(u32 const* word, Group group, u32 (&fragment)[4]) {
    if constexpr (is_whole(kOffset)) {
      centred(word, group, fragment);
      scale<F16>(fragment, group);
    } else {
      u32 q[4];
      raw(word, q);
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        fragment[i] = apply<F16, kOffset>(F16::sub(q[i], kExponent), group.scale_g, group.offset_g);
        fragment[i + 1] = apply<F16, kOffset>(F16::fma(q[i + 1], kSixteenth, kMinusHigh), group.scale_g8, group.offset_g8);
      }
    }
  }

  // fragment[i] = code - zero point: 9 instructions for 8 weights.
  __device__ static __forceinline__ void centred(u32 const* word, Group group, u32 (&fragment)[4]) {
    bool constexpr kOwn = kOffset == Offset::kZeros;
    raw(word, fragment);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      fragment[i] = F16::sub(fragment[i], kOwn ? group.offset_g : kCentre);
      fragment[i + 1] = F16::fma(fragment[i + 1], kSixteenth, kOwn ? group.offset_g8 : kMinusHighCentre);
    }
  }

  // fragment[i] = 1024 + code (rows g) or 1024 + 16 * code (rows g + 8): 5 instructions for 8 weights.
  __device__ static __forceinline__ void raw(u32 const* word, u32 (&fragment)[4]) {
    u32 const high_word = word[0] >> 8;
    fragment[0] = ptx::lop3_and_or(word[0], kLowMask, kExponent);
    fragment[1] = ptx::lop3_and_or(word[0], kHighMask, kExponent);
    fragment[2] = ptx::lop3_and_or(high_word, kLowMask, kExponent);
    fragment[3] = ptx::lop3_and_or(high_word, kHighMask, kExponent);
  }
};

// bf16 has 7 mantissa bits: there is no room for codes four bits higher, so each nibble pair is shifted down.
template <Offset kOffset>
struct Decoder<Bf16, 4, kOffset> {
  using Group = ScalePair<kOffset>;
  static constexpr int kWords = 1, kZeroPoint = 8;
  static constexpr u32 kMask = 0x000f000f, kExponent = 0x43004300;            // 128
  static constexpr u32 kMinusExponent = 0xc300c300, kMinusCentre = 0xc308c308;  // -128, and -136 = -(128 + 8)

  // 15 instructions for 8 weights; with fractions 19.
  __device__ static __forceinline__ void exact(u32 const* word, Group group, u32 (&fragment)[4]) {
    if constexpr (is_whole(kOffset)) {
      centred(word, group, fragment);
      scale<Bf16>(fragment, group);
    } else {
      u32 q[4];
      raw(word, q);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        u32 const scale = i % 2 ? group.scale_g8 : group.scale_g, offset = i % 2 ? group.offset_g8 : group.offset_g;
        fragment[i] = apply<Bf16, kOffset>(Bf16::add(q[i], kMinusExponent), scale, offset);
      }
    }
  }

  // fragment[i] = code - zero point: 11 instructions for 8 weights.
  __device__ static __forceinline__ void centred(u32 const* word, Group group, u32 (&fragment)[4]) {
    raw(word, fragment);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      u32 const offset = i % 2 ? group.offset_g8 : group.offset_g;
      fragment[i] = Bf16::add(fragment[i], kOffset == Offset::kZeros ? offset : kMinusCentre);
    }
  }

  // fragment[i] = 128 + code: 7 instructions for 8 weights.
  __device__ static __forceinline__ void raw(u32 const* word, u32 (&fragment)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = ptx::lop3_and_or(word[0] >> 4 * i, kMask, kExponent);
  }
};

template <>
struct Decoder<F16, 8, Offset::kConstant> {
  using Group = ScalePair<Offset::kConstant>;
  static constexpr int kWords = 2, kZeroPoint = 128;
  static constexpr u32 kExponent = 0x64006400, kCentre = 0x64806480;  // 1024, 1152 = 1024 + 128

  // 12 instructions for 8 weights.
  __device__ static __forceinline__ void exact(u32 const* word, Group group, u32 (&fragment)[4]) {
    centred(word, group, fragment);
    scale<F16>(fragment, group);
  }

  // fragment[i] = code - 128: 8 instructions for 8 weights.
  __device__ static __forceinline__ void centred(u32 const* word, Group, u32 (&fragment)[4]) {
    raw(word, fragment);
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = F16::sub(fragment[i], kCentre);
  }

  // fragment[i] = 1024 + code: 4 instructions for 8 weights.
  __device__ static __forceinline__ void raw(u32 const* word, u32 (&fragment)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = ptx::prmt(word[i / 2], kExponent, i % 2 ? 0x5352 : 0x5150);
  }
};

// bf16 holds -128 .. 127 but no code beside an offset: codes go through fp32, where their product with the scale is exact.
template <>
struct Decoder<Bf16, 8, Offset::kConstant> {
  using Group = ScalePair<Offset::kConstant>;
  static constexpr int kWords = 2, kZeroPoint = 128;
  static constexpr u32 kExponent = 0x4b000000;       // 2^23
  static constexpr float kCentre = 8388608.f + 128.f;

  // 28 instructions for 8 weights.
  __device__ static __forceinline__ void exact(u32 const* word, Group group, u32 (&fragment)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float const scale = Bf16::low(i % 2 ? group.scale_g8 : group.scale_g);
      fragment[i] = Bf16::pack(signed_code(word[i / 2], i % 2 * 2) * scale, signed_code(word[i / 2], i % 2 * 2 + 1) * scale);
    }
  }

  // fragment[i] = code - 128: 20 instructions for 8 weights.
  __device__ static __forceinline__ void raw(u32 const* word, u32 (&fragment)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = Bf16::pack(signed_code(word[i / 2], i % 2 * 2), signed_code(word[i / 2], i % 2 * 2 + 1));
  }
  __device__ static __forceinline__ void centred(u32 const* word, Group, u32 (&fragment)[4]) { raw(word, fragment); }

 private:
  __device__ static __forceinline__ float signed_code(u32 word, int byte) {
    return __uint_as_float(ptx::prmt(word, kExponent, 0x7650 | byte)) - kCentre;
  }
};

}  // namespace marlin_gen
