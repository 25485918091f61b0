// What a GPU holds while a grid runs: clusters of blocks of warps of threads, and what the caller asked for.
#pragma once
#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <vector>

#include "fibers.h"
#include "marlin_gen/types.cuh"

namespace emulator {
using namespace marlin_gen;

enum Copies { kLate, kEarly, kAnytime };  // when asynchronous copies happen, of the times that the program allows

struct Span {  // memory of the caller
  u8* data;
  long long bytes;
  bool holds(void const* at, long long count) const { return at >= data && static_cast<u8 const*>(at) + count <= data + bytes; }
};

// One launch; emulation.py fills in the same struct.
struct Request {
  int grid, threads, cluster, resident;  // resident: clusters on the GPU at once
  int smem_bytes, registers;             // of a block; of a thread, at launch
  unsigned seed;
  int copies;
  int dependent;  // launched before the grid that it depends on is done
  int fault;  // 0, or which of the faults that a test has put into the kernel
  int a_box[2], c_box[2], a_tail_rows;   // (rows, columns)
  int scalars[12];
  Span a, c, weight, scales, bias, partials, locks;
};
inline Request request;

struct Block;
struct Warp;

struct CpAsync { u32 smem; u8 const* gmem; u32 bytes; };
struct TensorStore;

struct Thread : Fiber {
  unsigned index;  // threadIdx.x
  Block* block;
  Warp* warp;
  std::vector<CpAsync> open_copies;
  std::deque<std::vector<CpAsync>> copy_groups;
  std::vector<TensorStore> open_stores, stores;  // not committed, and committed
  std::vector<u32> unfenced;                     // 16-byte pieces written since the last fence.proxy.async
  int const* lock = nullptr;                     // read last, and what it was
  int lock_value = 0;
  long cluster_arrival = -1;                     // the generation of the cluster's barrier that it has arrived at
  bool has_waited = false;                       // for the kernel before this one
};

struct Barrier { int arrived = 0, expected = 0; long generation = 0; };

struct Mbarrier {
  int count, missing, bytes = 0;  // arrivals of a phase, those missing of this one, bytes that it still waits for
  u32 phase = 0;
  Thread* initialised_by;         // and not fenced yet
};

struct WarpWgmma;

struct Warp {
  Block* block;
  int index, registers;  // registers: of each thread
  Thread* lanes[32];
  char const* instruction = nullptr;  // that lanes have arrived at
  Barrier barrier;
  void* arguments[32];
  std::shared_ptr<WarpWgmma> wgmma;
};

struct Cluster;
struct Block {
  Cluster* cluster;
  unsigned index, rank;  // in the grid, in the cluster
  std::vector<u8> smem;
  std::vector<u8> unfenced;  // for each 16 bytes: written, but not fenced against the asynchronous proxy
  std::map<u32, Mbarrier> mbarriers;  // by offset
  Barrier barriers[16];
  int free_registers = 0;
  std::vector<Warp> warps;
  std::vector<Thread> threads;
  bool has_left() const { return std::all_of(threads.begin(), threads.end(), [](Thread const& t) { return t.done; }); }
};
struct Cluster {
  Barrier barrier;
  std::vector<Block> blocks;
};

inline Thread& self() { return static_cast<Thread&>(*running); }
inline Block& my_block() { return *self().block; }

inline std::string fault;  // the first; the scheduler stops at it
inline void fail(std::string const& what) {
  if (fault.empty()) {
    fault = what;
    if (running) fault += " (block " + std::to_string(my_block().index) + ", thread " + std::to_string(self().index) + ")";
  }
  if (running) pause();  // for ever
}

// A, C and the scratch belong to the kernel before this one until the thread has waited for it; weights and scales do not.
inline void check_waited(char const* what) {
  if (request.dependent && !self().has_waited) fail(std::string(what) + " before griddepcontrol.wait");
}

// Arrives at a barrier; the last of `expected` threads lets all go on.
inline bool arrive(Barrier& barrier, int expected, char const* name) {
  if (barrier.arrived == 0) barrier.expected = expected;
  if (barrier.expected != expected) fail(std::string(name) + ": threads disagree on how many there are");
  if (++barrier.arrived < expected) return false;
  barrier.arrived = 0;
  ++barrier.generation;
  return true;
}
inline void sync(Barrier& barrier, int expected, std::string name) {
  long const generation = barrier.generation;
  arrive(barrier, expected, name.c_str());
  wait_until([&barrier, generation] { return barrier.generation != generation; },
             [&barrier, name] {
               return name + " (" + std::to_string(barrier.arrived) + " of " + std::to_string(barrier.expected) + " threads)";
             });
}

}  // namespace emulator
