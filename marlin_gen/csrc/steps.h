// What is launched for a problem: the table that Python fills and the op reads.
#pragma once
#include <cstddef>
#include <cstdint>
#include <shared_mutex>
#include <unordered_map>

#include "cuda_driver.h"

namespace marlin_gen {

// Everything a choice depends on. Sizes are the problem's own, not a bucket's: grids and scalars follow from them.
struct ProblemKey {
  int32_t n, k, m;
  int16_t format;  // an index of Python's FORMATS
  int8_t dtype;    // 0: fp16, 1: bf16
  int8_t device;

  bool operator==(ProblemKey const& o) const {
    return n == o.n && k == o.k && m == o.m && format == o.format && dtype == o.dtype && device == o.device;
  }
};

struct ProblemHash {
  size_t operator()(ProblemKey const& key) const {
    uint64_t const sizes = uint64_t(uint32_t(key.n)) << 32 | uint32_t(key.k);
    uint64_t const rest =
        uint64_t(uint32_t(key.m)) << 32 | uint32_t(uint16_t(key.format)) << 16 | uint8_t(key.dtype) << 8 | uint8_t(key.device);
    uint64_t const mixed = (sizes * 0x9e3779b97f4a7c15u) ^ (rest * 0xc2b2ae3d27d4eb4fu);
    return size_t(mixed ^ mixed >> 29);
  }
};

// Operands of a kernel, numbered as OPERANDS in families/base.py lists them.
enum class Operand : uint8_t { kAMap, kATailMap, kCMap, kA, kC, kWeight, kScales, kBias, kPartials, kLocks };

constexpr int kMaxOperands = 12, kMaxScalars = 12;

// LaunchShape and the loaded function, field for field as marlin_gen.native.StepRecord.
struct Step {
  cuda::Function function;
  int64_t partials_bytes;
  uint32_t grid, threads, smem_bytes, cluster;
  uint32_t dependent;  // 1: it may start while the kernel ahead of it on the stream ends, for which it waits
  uint32_t num_locks;
  uint32_t a_box[2], c_box[2];  // rows, columns
  uint32_t a_tail_rows;
  int32_t num_operands, num_scalars;
  int32_t scalars[kMaxScalars];
  Operand operands[kMaxOperands];

  bool has(Operand operand) const;
};

// Read by every call, written by first calls. A step is copied out under the lock, so that it may be replaced any time.
class StepTable {
 public:
  bool find(ProblemKey const& key, Step& step) const {
    std::shared_lock const lock(mutex_);
    auto const found = steps_.find(key);
    if (found == steps_.end()) return false;
    step = found->second;
    return true;
  }
  void put(ProblemKey const& key, Step const& step);
  void clear(int device);

 private:
  mutable std::shared_mutex mutex_;
  std::unordered_map<ProblemKey, Step, ProblemHash> steps_;
};

}  // namespace marlin_gen
