// Runs a grid: clusters start in the order of their index, a limited number at once, and their threads in shuffled order.
// One warp after another is held back for a while, so that a missing barrier shows.
#pragma once
#include <list>

#include "memory.h"
#include "wgmma_state.h"

namespace emulator {

inline void start_cluster(Cluster& cluster, int first_block, std::function<void()> const& kernel) {
  cluster.blocks = std::vector<Block>(request.cluster);
  for (Block& block : cluster.blocks) {
    block.cluster = &cluster;
    block.rank = &block - cluster.blocks.data();
    block.index = first_block + block.rank;
    block.smem.assign(request.smem_bytes, 0xff);  // NaN, whatever it is read as
    block.unfenced.assign(request.smem_bytes / 16 + 1, 0);
    block.warps = std::vector<Warp>(request.threads / 32);
    block.threads = std::vector<Thread>(request.threads);
    for (Warp& warp : block.warps) {
      warp.block = &block, warp.index = &warp - block.warps.data(), warp.registers = request.registers;
      warp.wgmma = std::make_shared<WarpWgmma>();
    }
    for (Thread& thread : block.threads) {
      thread.index = &thread - block.threads.data(), thread.block = &block, thread.warp = &block.warps[thread.index / 32];
      thread.warp->lanes[thread.index % 32] = &thread;
      prepare(thread, [&kernel, &thread] {
        kernel();
        if (!thread.copy_groups.empty() || !thread.open_copies.empty() || !thread.stores.empty() || !thread.open_stores.empty() ||
            thread.warp->wgmma->is_busy())
          fail("a thread ended with copies or products under way");
      });
    }
  }
}

// Who waits for what, for the report of a deadlock.
inline std::string waiting(std::list<Cluster>& clusters) {
  std::map<std::pair<unsigned, std::string>, int> counts;
  for (Cluster& cluster : clusters)
    for (Block& block : cluster.blocks)
      for (Thread& thread : block.threads)
        if (!thread.done) ++counts[{block.index, thread.waits_for()}];
  std::string report = "deadlock";
  for (auto const& [key, count] : counts)
    report += "; block " + std::to_string(key.first) + ": " + std::to_string(count) + " threads wait for " + key.second;
  return report;
}

inline void run_grid(std::function<void()> const& kernel) {
  std::list<Cluster> clusters;
  in_flight.clear();
  fault.clear();
  random_bits.seed(request.seed);
  Warp* held_back = nullptr;
  int next = 0;
  long next_choice = 0;
  for (long round = 0; fault.empty(); ++round) {
    clusters.remove_if([](Cluster& cluster) {
      return std::all_of(cluster.blocks.begin(), cluster.blocks.end(), [](Block& block) { return block.has_left(); });
    });
    while (next < request.grid && static_cast<int>(clusters.size()) < request.resident) {
      clusters.emplace_back();
      start_cluster(clusters.back(), next, kernel);
      next += request.cluster;
    }
    if (clusters.empty()) break;
    std::vector<Thread*> ready, others;
    for (Cluster& cluster : clusters)
      for (Block& block : cluster.blocks)
        for (Thread& thread : block.threads)
          if (can_run(thread)) (thread.warp == held_back ? others : ready).push_back(&thread);
    if (ready.empty()) {
      if (!others.empty()) {
        held_back = nullptr;
        next_choice = round;
      } else if (!in_flight.empty()) {
        land_copy(random_bits() % in_flight.size());
      } else {
        fault = waiting(clusters);
      }
      continue;
    }
    if (round >= next_choice) {
      held_back = one_in(4) ? nullptr : ready[random_bits() % ready.size()]->warp;
      next_choice = round + (1 << random_bits() % 10);
    }
    if (request.copies == kAnytime)
      for (size_t i = in_flight.size(); i-- > 0;)
        if (one_in(16)) land_copy(i);
    std::shuffle(ready.begin(), ready.end(), random_bits);
    for (Thread* thread : ready) {
      if (!fault.empty()) break;
      if (!can_run(*thread)) continue;
      threadIdx.x = thread->index, blockIdx.x = thread->block->index;
      resume(*thread);
    }
  }
  if (fault.empty() && !in_flight.empty()) fault = "the grid ended with copies under way";
}

}  // namespace emulator
