// The 16-bit numbers of activations, scales and outputs, in pairs: one 32-bit register, low half first.
#pragma once
#include "marlin_gen/ptx/bfloat.cuh"
#include "marlin_gen/ptx/half.cuh"
#include "marlin_gen/ptx/mma.cuh"

namespace marlin_gen {

// Exponents of two: kUnit of the last bit of a subnormal number, kLift what `Lifted` in dequant.cuh multiplies scales by. Whole numbers are
// decoded over kWholeUnit, as far as one multiplication lifts a subnormal.
struct F16 {
  static constexpr bool kIsBf16 = false;
  static constexpr int kUnit = -24, kLift = 12, kWholeUnit = 1;
  __host__ __device__ static constexpr u32 power(int exponent) { return u32(exponent + 15) * 0x04000400; }  // of two, twice
  __device__ static __forceinline__ u32 sub(u32 a, u32 b) { return ptx::sub_f16x2(a, b); }
  __device__ static __forceinline__ u32 mul(u32 a, u32 b) { return ptx::mul_f16x2(a, b); }
  __device__ static __forceinline__ u32 fma(u32 a, u32 b, u32 c) { return ptx::fma_f16x2(a, b, c); }
  __device__ static __forceinline__ u32 pack(float lo, float hi) { return ptx::pack_f16x2(lo, hi); }
  __device__ static __forceinline__ float low(u32 pair) { return ptx::low_f32(pair); }
  __device__ static __forceinline__ float high(u32 pair) { return ptx::high_f32(pair); }
  __device__ static __forceinline__ void mma(float (&d)[4], u32 const (&a)[4], u32 b0, u32 b1) { ptx::mma_m16n8k16_f16(d, a, b0, b1); }
};

// Sums, differences and products are fused multiply-adds, the only arithmetic on bf16 pairs before sm_90: each rounds once.
struct Bf16 {
  static constexpr bool kIsBf16 = true;
  static constexpr int kUnit = -133, kLift = 40, kWholeUnit = 64;
  __host__ __device__ static constexpr u32 power(int exponent) { return u32(exponent + 127) * 0x00800080; }
  static constexpr u32 kOne = 0x3f803f80, kMinusOne = 0xbf80bf80, kMinusZero = 0x80008000;
  __device__ static __forceinline__ u32 add(u32 a, u32 b) { return ptx::fma_bf16x2(a, kOne, b); }
  __device__ static __forceinline__ u32 sub(u32 a, u32 b) { return ptx::fma_bf16x2(b, kMinusOne, a); }
  __device__ static __forceinline__ u32 mul(u32 a, u32 b) { return ptx::fma_bf16x2(a, b, kMinusZero); }
  __device__ static __forceinline__ u32 fma(u32 a, u32 b, u32 c) { return ptx::fma_bf16x2(a, b, c); }
  __device__ static __forceinline__ u32 pack(float lo, float hi) { return ptx::pack_bf16x2(lo, hi); }
  __device__ static __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
  __device__ static __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000); }
  __device__ static __forceinline__ void mma(float (&d)[4], u32 const (&a)[4], u32 b0, u32 b1) { ptx::mma_m16n8k16_bf16(d, a, b0, b1); }
};

template <bool kIsBf16>
struct NumberOf {
  using Type = F16;
};
template <>
struct NumberOf<true> {
  using Type = Bf16;
};

}  // namespace marlin_gen
