// Plain types of the device code. No standard header is included anywhere: a kernel compiles in a
// fraction of the time, and with NVRTC as well as with nvcc.
#pragma once

namespace marlin_gen {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// How output tiles are shared out among blocks (KernelConfig.partition).
enum class Partition {
  kTiles,     // a block computes whole tiles
  kClusterk,  // the blocks of a cluster split k and meet in distributed shared memory
  kStriped    // up to two waves of tiles: every block takes an equal range of their k blocks; split ones are summed in a fixed order
};

// When the zero point and the scale are applied (KernelConfig.dequant).
enum class Dequant {
  kExact,    // to each weight, in registers, before the multiplication
  kDeferred  // to the fp32 sums of each scale group, after it
};

// What each group has beside its scale (WeightFormat.offset, where the formulas are).
enum class Offset {
  kConstant,   // nothing: one zero point for all
  kZeros,      // a whole zero point
  kFractions,  // a zero point that need not be whole
  kMinima,     // the weight of code 0
  kFloats      // nothing: codes are floating-point numbers
};

struct alignas(8) u32x2 {
  u32 x, y;
};
// A 16-byte register quad, as wide as one shared-memory access.
struct alignas(16) u32x4 {
  u32 x, y, z, w;
};
struct alignas(16) f32x4 {
  float x, y, z, w;
};

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

}  // namespace marlin_gen
