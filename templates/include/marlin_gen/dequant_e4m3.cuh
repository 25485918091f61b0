// Decoding of codes that are fp8 numbers: a sign, four bits of exponent and three of mantissa.
//
// Moved to where the wider type has its sign, its lowest bits of exponent and its highest of mantissa, a code is that number over 2^kBias, since
// exponents count from another bias there; subnormal ones too. In bf16 these places are kPlaces; two of four registers of a fragment could lie in
// the words x and y as they are, and the bits between hold the other two. No single shift brings those to their places, but each arrives in one
// with one other bit of the same words there, so fp8_words.py packs the exclusive or of both:
//   x, y, p ^ (x << 4), p ^ rotate_right(y, 4), each & kPlaces, where p is bytes 1 of x, 0 of y, 3 of x, 2 of y.
#pragma once
#include "marlin_gen/dequant.cuh"

namespace marlin_gen {

template <class Number>
struct Decoder<Number, 8, Offset::kFloats> {
  using Group = ScalePair<Offset::kFloats>;
  static constexpr int kWords = 2, kZeroPoint = 0;
  static constexpr int kBias = Number::kIsBf16 ? 127 - 7 : 15 - 7;
  static constexpr u32 kPlaces = 0x87f087f0, kMagnitudes = 0x07f007f0;

  // 11 instructions for 8 weights, in f16 19. Scales are below 256 (layout.py), so that 2^kBias times one is finite.
  __device__ static __forceinline__ void exact(u32 const* word, Group group, u32 (&fragment)[4]) {
    moved(word, fragment);
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = Number::mul(fragment[i], Number::mul(i % 2 ? group.scale_g8 : group.scale_g, Number::power(kBias)));
  }

  // fragment[i] = code / kWholeUnit: as many.
  __device__ static __forceinline__ void centred(u32 const* word, Group, u32 (&fragment)[4]) {
    moved(word, fragment);
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = Number::mul(fragment[i], Number::power(kBias - (Number::kWholeUnit == 64 ? 6 : 0)));
  }

  // Codes over 2^kBias.
  __device__ static __forceinline__ void moved(u32 const* word, u32 (&fragment)[4]) {
    u32 const x = word[0], y = word[1], p = ptx::prmt(x, y, 0x6341);
    fragment[0] = x & kPlaces;
    fragment[1] = y & kPlaces;
    fragment[2] = (p ^ (x << 4)) & kPlaces;
    fragment[3] = (p ^ (y >> 4 | y << 28)) & kPlaces;
    if constexpr (!Number::kIsBf16) {
#pragma unroll
      for (int i = 0; i < 4; ++i) fragment[i] += 7 * (fragment[i] & kMagnitudes);  // three bits further than signs
    }
  }
};

}  // namespace marlin_gen
