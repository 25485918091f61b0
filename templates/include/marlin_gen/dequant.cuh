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
// A code becomes a number in one of two ways. Or-ed into the mantissa of a power of two whose last bit counts 1 (or 1/16 and the code four
// bits higher), 1024 of fp16 or 128 of bf16, that power is subtracted, together with the zero point where it is whole, before the scale is
// applied: (1024 + q) * s - 1032 * s would round 1032 * s, an error of up to half a quantisation step. Alone in the mantissa it is a
// subnormal number, the code times the type's least; one multiply-add lifts it and subtracts the zero point. bf16 has the range for that;
// fp16 does where each row has a lift (layout.py): `Lifted`. Codes that are fp8 numbers become wider ones by moving their bits.
#pragma once
#include "marlin_gen/number.cuh"
#include "marlin_gen/ptx/half.cuh"
#include "marlin_gen/ptx/shared.cuh"

namespace marlin_gen {

// Whether each group has more than a scale.
__host__ __device__ constexpr bool has_offsets(Offset offset) { return offset != Offset::kConstant && offset != Offset::kFloats; }

// What lies in shared memory for rows g and g + 8 of a group: both scales, and each value twice. The offset is as layout.py packs it: what
// decoding adds to or subtracts from the codes where zero points are whole, else the zero point or minimum itself.
template <Offset kOffset>
struct ScalePair {
  static constexpr int kBytes = has_offsets(kOffset) ? 8 : 4;
  u32 scales, scale_g, scale_g8, offset_g, offset_g8;

  __device__ static __forceinline__ ScalePair load(u32 address) {
    if constexpr (!has_offsets(kOffset)) {
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

// Weights of whole numbers over kWholeUnit, rows g and g + 8 by turns.
template <class Number, class Group>
__device__ __forceinline__ void scale_whole(u32 (&fragment)[4], Group group) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    u32 const scale = i % 2 ? group.scale_g8 : group.scale_g;
    fragment[i] = Number::mul(fragment[i], Number::kWholeUnit == 1 ? scale : Number::mul(scale, Number::power(6)));
  }
}

// Codes of a block alone in the mantissas of fragment `i`, which are subnormal numbers: times 2^kUnit, 4-bit codes of rows g + 8 another
// 16 times.
template <int kBits>
__device__ __forceinline__ u32 subnormal(u32 const* word, int i) {
  if constexpr (kBits == 4) return (i < 2 ? word[0] : word[0] >> 8) & (i % 2 ? 0x00f000f0 : 0x000f000f);
  return ptx::prmt(word[i / 2], 0, i % 2 ? 0x5352 : 0x5150);
}

// Whether what scales multiply is exact: a whole number, for what is subtracted from codes is one, or an fp8 number.
__host__ __device__ constexpr bool has_exact_numbers(Offset offset) { return offset != Offset::kFractions && offset != Offset::kMinima; }

template <class Number, int kBits, Offset kOffset>
struct Decoder;

// Formats about a constant zero point decoded with their scales by one multiply-add a pair: 9 instructions for 8 weights of 4 bits, 8 of 8
// bits. It rounds once, to the weight: zero point times scale, a power of two times the scale, is exact. Weights come out times
// 2^(kUnit + kLift) and their row's lift, which `factor` undoes in the sums. A lift brings a row's largest scale below 16, so that 2^kLift
// times it is finite; in fp16 groups with a scale down to a 64th of that have normal numbers, and for each halving below weights lose a bit.
template <class Number, int kBits>
struct Lifted {
  static constexpr int kHigh = kBits == 4 ? 4 : 0;  // how many bits higher the codes of rows g + 8 lie in a number

  // What the codes of rows g and g + 8 are multiplied by, and what is added. `lifts`: those of the two rows.
  template <class Group>
  __device__ static __forceinline__ Group lift(Group group, u32 lifts) {
    constexpr int kZeroExponent = Number::kUnit + Number::kLift + kBits - 1;  // zero points are half of the codes
    u32 const scales = Number::mul(group.scales, lifts);
    u32 const g = ptx::duplicate_low(scales), g8 = ptx::duplicate_high(scales), minus_zero = Number::power(kZeroExponent) | 0x80008000;
    return {scales, Number::mul(g, Number::power(Number::kLift)), Number::mul(g8, Number::power(Number::kLift - kHigh)),
            Number::mul(g, minus_zero), Number::mul(g8, minus_zero)};
  }

  template <class Group>
  __device__ static __forceinline__ void exact(u32 const* word, Group group, u32 (&fragment)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      u32 const codes = subnormal<kBits>(word, i);
      fragment[i] = i % 2 ? Number::fma(codes, group.scale_g8, group.offset_g8) : Number::fma(codes, group.scale_g, group.offset_g);
    }
  }

  // What the sums of a row with this lift, a power of two, are multiplied by.
  __device__ static __forceinline__ float factor(float lift) {
    constexpr u32 kOne = 127 << 23;  // of an exponent of zero
    return __uint_as_float(2 * kOne - __float_as_uint(lift)) * __uint_as_float(kOne - (Number::kUnit + Number::kLift) * (1 << 23));
  }
};

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
    if constexpr (has_exact_numbers(kOffset)) {
      centred(word, group, fragment);
      scale_whole<F16>(fragment, group);
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

template <Offset kOffset>
struct Decoder<Bf16, 4, kOffset> {
  using Group = ScalePair<kOffset>;
  static constexpr int kWords = 1, kZeroPoint = 8;
  static constexpr u32 kMask = 0x000f000f, kExponent = 0x43004300, kMinusExponent = 0xc300c300;  // 128, -128

  // 13 instructions for 8 weights; with fractions 19.
  __device__ static __forceinline__ void exact(u32 const* word, Group group, u32 (&fragment)[4]) {
    if constexpr (has_exact_numbers(kOffset)) {
      centred(word, group, fragment);
      scale_whole<Bf16>(fragment, group);
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

  // fragment[i] = (code - zero point) / kWholeUnit: 9 instructions for 8 weights.
  __device__ static __forceinline__ void centred(u32 const* word, Group group, u32 (&fragment)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // (128 - (128 + z)) / 64 of a zero point of its own.
      u32 const own = Bf16::fma(i % 2 ? group.offset_g8 : group.offset_g, Bf16::power(-6), Bf16::power(1));
      u32 const offset = kOffset == Offset::kZeros ? own : Bf16::power(3 - 6) | 0x80008000;
      fragment[i] = Bf16::fma(subnormal<4>(word, i), Bf16::power(127 - i % 2 * 4), offset);
    }
  }

  // fragment[i] = 128 + code: 7 instructions for 8 weights. Beside 7 mantissa bits there is no room for codes four bits higher.
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
    scale_whole<F16>(fragment, group);
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

template <>
struct Decoder<Bf16, 8, Offset::kConstant> {
  using Group = ScalePair<Offset::kConstant>;
  static constexpr int kWords = 2, kZeroPoint = 128;

  // 12 instructions for 8 weights.
  __device__ static __forceinline__ void exact(u32 const* word, Group group, u32 (&fragment)[4]) {
    centred(word, group, fragment);
    scale_whole<Bf16>(fragment, group);
  }

  // fragment[i] = (code - 128) / kWholeUnit: 8 instructions for 8 weights.
  __device__ static __forceinline__ void centred(u32 const* word, Group, u32 (&fragment)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = Bf16::fma(subnormal<8>(word, i), Bf16::power(127), Bf16::power(7 - 6) | 0x80008000);
  }
};

}  // namespace marlin_gen
