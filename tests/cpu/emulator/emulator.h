// A GPU on one CPU thread, for a rendered kernel as it is: CUDA's keywords and built-ins here, marlin_gen/ptx/*.cuh beside this
// file in place of the headers of the same name, instruction by instruction.
//
//   fibers.h     every thread is a fiber            memory.h     shared memory, asynchronous copies
//   machine.h    clusters, blocks, warps, threads   mbarriers.h  warp.h  wgmma_state.h
//   launch.h     the scheduler
#pragma once
#include <cstdlib>
using std::size_t;

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
struct Dim { unsigned x; };
inline Dim threadIdx, blockIdx, gridDim;
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }

#include "memory.h"
#include "warp.h"

inline void __syncthreads() { emulator::sync(emulator::my_block().barriers[0], emulator::request.threads, "__syncthreads"); }
inline void __syncwarp() { emulator::sync_warp(); }
inline int __shfl_sync(unsigned, int value, int source) {
  struct { int value, source, result; } mine{value, source, 0};
  emulator::with_warp("shfl.sync", mine, [](auto lane) {
    for (int i = 0; i < 32; ++i) lane(i).result = lane(lane(i).source % 32).value;
  });
  return mine.result;
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

#include <marlin_gen/ptx/bfloat.cuh>
#include <marlin_gen/ptx/cluster.cuh>
#include <marlin_gen/ptx/cp_async.cuh>
#include <marlin_gen/ptx/global.cuh>
#include <marlin_gen/ptx/grid.cuh>
#include <marlin_gen/ptx/half.cuh>
#include <marlin_gen/ptx/mbarrier.cuh>
#include <marlin_gen/ptx/mma.cuh>
#include <marlin_gen/ptx/shared.cuh>
#include <marlin_gen/ptx/tma.cuh>
#include <marlin_gen/ptx/wgmma.cuh>

#include "launch.h"

namespace emulator {
namespace ptx = marlin_gen::ptx;

// The kernel's pointer arguments, by the names of LaunchShape.operands.
struct Operands {
  ptx::TensorMap a_map, a_tail_map, c_map;
  u16 const* a;
  u16* c;
  u8 const *weight, *scales;
  u16 const* bias;
  f32x4* partials;
  int* locks;
};

// Runs the requested grid; null, or what went wrong first.
template <class Kernel>
char const* run(Request const& asked, Kernel kernel) {
  request = asked;
  gridDim.x = request.grid;
  int const m = request.scalars[0], n = request.scalars[1], k = request.scalars[2];
  Operands const operands{{request.a.data, m, k, request.a_box[0], request.a_box[1]},
                          {request.a.data, m, k, request.a_tail_rows, request.a_box[1]},
                          {request.c.data, m, n, request.c_box[0], request.c_box[1]},
                          reinterpret_cast<u16*>(request.a.data),
                          reinterpret_cast<u16*>(request.c.data),
                          request.weight.data,
                          request.scales.data,
                          reinterpret_cast<u16 const*>(request.bias.data),
                          reinterpret_cast<f32x4*>(request.partials.data),
                          reinterpret_cast<int*>(request.locks.data)};
  run_grid([&] { kernel(operands); });
  return fault.empty() ? nullptr : fault.c_str();
}

}  // namespace emulator
