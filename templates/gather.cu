// The activations of a weight in act-order: out[m, j] = a[m, order[j]], elements of 2 bytes.
//
// A thread has eight neighbouring columns of `out`, stored as one 16-byte word, and up to `rows_per_block` rows of them, so
// that it reads their eight places once. What it reads of a row lies anywhere in it: a row is short, and comes from L1.
#include "marlin_gen/types.cuh"

namespace {

using namespace marlin_gen;

constexpr int kThreads = 128, kColumns = 8;
constexpr u32 kNowhere = 0x7fff;  // makes a NaN of any fp16 or bf16: what an order that names no feature gives

}  // namespace

// A (m, k) with any strides, in elements; order (k) and out (m, k) contiguous and 16-byte aligned; k a multiple of 8. The grid
// is ceil(k / 8 / kThreads) * ceil(m / rows_per_block) blocks.
extern "C" __global__ void __launch_bounds__(kThreads)
    gather(u16 const* __restrict__ a, u16* __restrict__ out, u64 const* __restrict__ order, u64 row_stride, u64 column_stride, int m,
           int k, int rows_per_block) {
  int const column_blocks = ceil_div(k / kColumns, kThreads);
  int const column = (static_cast<int>(blockIdx.x) % column_blocks * kThreads + static_cast<int>(threadIdx.x)) * kColumns;
  int const begin = static_cast<int>(blockIdx.x) / column_blocks * rows_per_block;
  if (column >= k) return;

  u64 offsets[kColumns];
  u32 nowhere[kColumns / 2] = {};  // no branch: the loads of all columns are under way at once
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    u64 const feature = order[column + j];
    bool const is_there = feature < u64(k);
    offsets[j] = is_there ? feature * column_stride : 0;
    nowhere[j / 2] |= (is_there ? 0 : kNowhere) << j % 2 * 16;
  }
#pragma unroll 2
  for (int row = begin; row < min(begin + rows_per_block, m); ++row) {
    u16 const* const from = a + u64(row) * row_stride;
    u32 pairs[kColumns / 2];
#pragma unroll
    for (int j = 0; j < kColumns / 2; ++j)
      pairs[j] = u32(from[offsets[2 * j]]) | u32(from[offsets[2 * j + 1]]) << 16 | nowhere[j];
    *reinterpret_cast<u32x4*>(out + u64(row) * u32(k) + column) = u32x4{pairs[0], pairs[1], pairs[2], pairs[3]};
  }
}
