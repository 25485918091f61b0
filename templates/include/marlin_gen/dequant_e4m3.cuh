// Decoding of codes that are fp8 numbers: a sign, four bits of exponent and three of mantissa. Words are those of 8-bit codes (dequant.cuh).
#pragma once
#include "marlin_gen/dequant.cuh"

namespace marlin_gen {

// Moved to where the wider type has its sign, its lowest bits of exponent and its highest of mantissa, a code is that number over 2^kBias, since
// exponents count from another bias there; subnormal ones too.
template <class Number>
struct Decoder<Number, 8, Offset::kFloats> {
  using Group = ScalePair<Offset::kFloats>;
  static constexpr int kWords = 2, kZeroPoint = 0;
  static constexpr int kShift = Number::kIsBf16 ? 4 : 7, kBias = Number::kIsBf16 ? 127 - 7 : 15 - 7;
  static constexpr u32 kMask = Number::kIsBf16 ? 0x87f087f0 : 0xbf80bf80;  // the sign and what was moved, less the signs between

  // 16 instructions for 8 weights. Scales are below 256 (layout.py), so that 2^kBias times one is finite.
  __device__ static __forceinline__ void exact(u32 const* word, Group group, u32 (&fragment)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = Number::mul(moved(word, i), Number::mul(i % 2 ? group.scale_g8 : group.scale_g, Number::power(kBias)));
  }

  // fragment[i] = code / kWholeUnit: as many.
  __device__ static __forceinline__ void centred(u32 const* word, Group, u32 (&fragment)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = Number::mul(moved(word, i), Number::power(kBias - (Number::kWholeUnit == 64 ? 6 : 0)));
  }

  // Codes over 2^kBias: bytes to halves, each sign repeated above them, and all to the left.
  __device__ static __forceinline__ u32 moved(u32 const* word, int i) {
    return ptx::prmt(word[i / 2], 0, i % 2 ? 0xb3a2 : 0x9180) << kShift & kMask;
  }
};

}  // namespace marlin_gen
