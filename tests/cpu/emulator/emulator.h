// A GPU of one cluster on one CPU thread: every CUDA thread is a fiber, and this file stands for the headers in
// templates/include/marlin_gen/ptx, so that a rendered mma kernel runs as it is, instruction by instruction.
// Copies by cp.async happen as late as the program allows, or as early. Fibers are resumed in a shuffled order, and one warp
// after another is held back for a while, so that a missing barrier shows.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
struct Dim { unsigned x; };
extern Dim threadIdx, blockIdx;
using std::size_t;
inline int min(int a, int b) { return a < b ? a : b; }

#include "marlin_gen/types.cuh"

namespace emulator {
using namespace marlin_gen;

struct Copy { u32 smem; u8 const* gmem; u32 bytes; };
struct Barrier { int arrived = 0, generation = 0; };
struct Fiber {
  ucontext_t context;
  std::unique_ptr<u8[]> stack;
  Dim thread, block;
  int rank, warp;  // block in the cluster, warp in the cluster
  bool done = false;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
};
struct Block { std::vector<u8> smem; Barrier barrier; };
struct Lane { u32 words[6]; };

inline std::vector<Fiber> fibers;
inline std::vector<Block> blocks;
inline std::vector<Barrier> warp_barriers;
inline std::vector<Lane> lanes;  // what the lanes of a warp show each other
inline Barrier cluster_barrier;
inline Fiber* self;
inline ucontext_t scheduler;
inline bool copy_early;
inline std::vector<std::pair<u8 const*, u8 const*>> readable;  // global memory the kernel may read

inline char error[128];  // the first fault; the program goes on, so that the caller can report it
inline void fail(char const* what) {
  if (!error[0]) std::snprintf(error, sizeof error, "%s (block %u, thread %u)", what, blockIdx.x, threadIdx.x);
}
inline void pause() { swapcontext(&self->context, &scheduler); }
inline void wait(Barrier& barrier, int count) {
  int const generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) pause();
}
inline u8* at(u32 address, u32 bytes) {
  u32 const rank = address >> 24, offset = address & 0xffffff;
  static u8 nowhere[16];
  if (rank >= blocks.size() || offset + bytes > blocks[rank].smem.size()) return fail("shared memory out of bounds"), nowhere;
  if (offset % (bytes < 16 ? bytes : 16)) fail("misaligned shared memory");
  return blocks[rank].smem.data() + offset;
}
template <class T> T load(u32 address) { T v; std::memcpy(&v, at(address, sizeof(T)), sizeof(T)); return v; }
template <class T> void store(u32 address, T v) { std::memcpy(at(address, sizeof(T)), &v, sizeof(T)); }
inline void perform(Copy const& copy) {
  std::memset(at(copy.smem, 16), 0, 16);
  if (copy.bytes == 0) return;
  if (reinterpret_cast<size_t>(copy.gmem) % 16) fail("misaligned cp.async");
  for (auto [begin, end] : readable)
    if (copy.gmem >= begin && copy.gmem + copy.bytes <= end) { std::memcpy(at(copy.smem, 16), copy.gmem, copy.bytes); return; }
  fail("cp.async reads outside its operands");
}
inline void enqueue(Copy copy) { copy_early ? perform(copy) : self->open.push_back(copy); }
inline void wait_groups(size_t pending) {
  for (; self->groups.size() > pending; self->groups.pop_front())
    for (Copy const& copy : self->groups.front()) perform(copy);
}
inline Lane& lane(int i) { return lanes[self->warp * 32 + i]; }
inline Lane& my_lane() { return lane(threadIdx.x % 32); }
inline void sync_warp() { wait(warp_barriers[self->warp], 32); }
inline _Float16 half(u32 pair, int i) { u16 bits = pair >> 16 * i; _Float16 h; std::memcpy(&h, &bits, 2); return h; }
inline u32 pair(_Float16 lo, _Float16 hi) { u16 l, h; std::memcpy(&l, &lo, 2); std::memcpy(&h, &hi, 2); return l | u32(h) << 16; }
}  // namespace emulator

inline void __syncwarp() { emulator::sync_warp(); }
inline void __syncthreads();

namespace marlin_gen::ptx {
using namespace emulator;

// half.cuh
inline u32 lop3_and_or(u32 a, u32 mask, u32 bits) { return (a & mask) | bits; }
inline u32 sub_f16x2(u32 a, u32 b) { return pair(half(a, 0) - half(b, 0), half(a, 1) - half(b, 1)); }
inline u32 mul_f16x2(u32 a, u32 b) { return pair(half(a, 0) * half(b, 0), half(a, 1) * half(b, 1)); }
inline _Float16 fma_f16(double a, double b, double c) { return static_cast<_Float16>(a * b + c); }
inline u32 fma_f16x2(u32 a, u32 b, u32 c) {
  return pair(fma_f16(half(a, 0), half(b, 0), half(c, 0)), fma_f16(half(a, 1), half(b, 1), half(c, 1)));
}
inline u32 duplicate_low(u32 p) { return pair(half(p, 0), half(p, 0)); }
inline u32 duplicate_high(u32 p) { return pair(half(p, 1), half(p, 1)); }
inline u32 pack_f16x2(float lo, float hi) { return pair(static_cast<_Float16>(lo), static_cast<_Float16>(hi)); }
inline float low_f32(u32 p) { return half(p, 0); }
inline float high_f32(u32 p) { return half(p, 1); }

// shared.cuh, cluster.cuh: an address is the block's rank in the cluster << 24, and an offset
inline u32 smem_address(void const* p) { return self->rank << 24 | u32(static_cast<u8 const*>(p) - blocks[self->rank].smem.data()); }
inline u32x4 ld_shared_v4(u32 a) { return load<u32x4>(a); }
inline u32 ld_shared_u32(u32 a) { return load<u32>(a); }
inline f32x4 ld_shared_f32x4(u32 a) {
  pause();  // others may overtake a reader of the sums
  return load<f32x4>(a);
}
inline void st_shared_f32x4(u32 a, f32x4 v) { store(a, v); }
inline u32 mapa(u32 a, u32 rank) { return rank << 24 | (a & 0xffffff); }
inline f32x4 ld_shared_cluster_f32x4(u32 a) { return load<f32x4>(a); }
inline void barrier_cluster_sync() { wait(cluster_barrier, fibers.size()); }

// cp_async.cuh
inline u64 createpolicy_evict_first() { return 0; }
inline void cp_async_16_hint(u32 s, void const* g, u64) { enqueue({s, static_cast<u8 const*>(g), 16}); }
inline void cp_async_16_zfill(u32 s, void const* g, u32 bytes) { enqueue({s, static_cast<u8 const*>(g), bytes}); }
inline void cp_async_16_zfill_hint(u32 s, void const* g, u32 bytes, u64) { cp_async_16_zfill(s, g, bytes); }
inline void cp_async_commit_group() { self->groups.push_back(std::move(self->open)); self->open.clear(); }
template <int kPending> void cp_async_wait_group() { wait_groups(kPending); }

// mma.cuh
inline void ldmatrix_x4(u32 (&d)[4], u32 address) {
  my_lane().words[0] = address;
  sync_warp();
  int const l = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) d[i] = load<u32>(lane(i * 8 + l / 4).words[0] + l % 4 * 4);
  sync_warp();
}
inline void mma_m16n8k16_f16(float (&d)[4], u32 const (&a)[4], u32 b0, u32 b1) {
  my_lane() = {{a[0], a[1], a[2], a[3], b0, b1}};
  sync_warp();
  int const g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int q = 0; q < 4; ++q) {
    double sum = d[q];
    for (int k = 0; k < 16; ++k) {
      u32 const wa = lane(g * 4 + k % 8 / 2).words[q / 2 + k / 8 * 2], wb = lane((t * 2 + q % 2) * 4 + k % 8 / 2).words[4 + k / 8];
      sum += double(half(wa, k % 2)) * double(half(wb, k % 2));
    }
    d[q] = static_cast<float>(sum);
  }
  sync_warp();
}
}  // namespace marlin_gen::ptx

inline void __syncthreads() { emulator::wait(emulator::blocks[emulator::self->rank].barrier, emulator::fibers.size() / emulator::blocks.size()); }

namespace emulator {
// Runs `body` in every thread of every cluster of the grid, cluster after cluster.
template <class Body> void launch(int grid, int threads, int cluster, int smem_bytes, unsigned seed, bool early, Body body) {
  static Body* entry;
  entry = &body;
  copy_early = early;
  error[0] = 0;
  std::mt19937 random(seed);
  for (int first = 0; first < grid; first += cluster) {
    fibers = std::vector<Fiber>(cluster * threads);
    blocks = std::vector<Block>(cluster);
    for (Block& block : blocks) block.smem.assign(smem_bytes, 0xff);  // NaN, whatever it is read as
    warp_barriers.assign(cluster * threads / 32, {});
    lanes.assign(cluster * threads, {});
    cluster_barrier = {};
    std::vector<Fiber*> order;
    for (int i = 0; i < cluster * threads; ++i) {
      Fiber& f = fibers[i];
      f.thread.x = i % threads, f.rank = i / threads, f.block.x = first + f.rank, f.warp = i / 32;
      f.stack.reset(new u8[64 << 10]);
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.get();
      f.context.uc_stack.ss_size = 64 << 10;
      f.context.uc_link = &scheduler;
      makecontext(&f.context, +[] {
        (*entry)();
        if (!self->groups.empty()) fail("a thread ended with copies under way");
        self->done = true;
      }, 0);
      order.push_back(&f);
    }
    int held_back = -1;
    for (size_t left = order.size(), round = 0; left > 0; ++round) {
      if (round % 256 == 0) held_back = random() % (warp_barriers.size() + 1);
      std::shuffle(order.begin(), order.end(), random);
      for (Fiber* f : order) {
        if (f->done || f->warp == held_back) continue;
        self = f, threadIdx = f->thread, blockIdx = f->block;
        swapcontext(&scheduler, &f->context);
        if (f->done) --left;
      }
    }
  }
}
}  // namespace emulator
