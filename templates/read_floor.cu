// The read floor: a plain kernel that reads `count` 16-byte words once and does nothing with them. No kernel that needs
// the bytes is faster. Each thread keeps eight loads in flight.
#include "marlin_gen/types.cuh"

extern "C" __global__ void __launch_bounds__(512) read_floor(marlin_gen::u32x4 const* data, long long count, marlin_gen::u32* never) {
  using marlin_gen::u32;
  constexpr int kUnroll = 8;
  long long const stride = static_cast<long long>(gridDim.x) * blockDim.x;
  u32 seen = 0;
  for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride * kUnroll) {
    u32 x[kUnroll], y[kUnroll], z[kUnroll], w[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      x[j] = y[j] = z[j] = w[j] = 0;
      if (i + j * stride < count)
        asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x[j]), "=r"(y[j]), "=r"(z[j]), "=r"(w[j]) : "l"(data + i + j * stride));
    }
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) seen ^= x[j] ^ y[j] ^ z[j] ^ w[j];
  }
  if (seen == 0x9e3779b9) *never = seen;  // keeps the loads; a write or two of the same word do no harm
}
