// marlin_gen::gemm_no_grad: what the op does for a problem whose step is known and whose operands need no copy. All the
// rest, errors included, is marlin_gen::gemm_slow's, which Python implements.
#pragma once
#include <atomic>
#include <cstdint>

#include "locks.h"
#include "steps.h"
#include "torch_shims.h"

namespace marlin_gen {

// How many int32 words and scales a packed weight has: a row of Python's FORMATS.
struct Format {
  int32_t group_size, scale_values, lift_rows, words_per_tile;
};

constexpr int kMaxFormats = 256;

struct State {
  StepTable steps;
  LockTable locks;
  Format formats[kMaxFormats];  // group_size 0: not known. Written before the op is implemented, constant afterwards
  std::atomic<uint64_t> launches{0};
  std::atomic<bool> used{false};    // a step was put, so this process has launched, if only from Python
  std::atomic<bool> forked{false};  // in a child of such a process: no CUDA call may be made
  cuda::Stream test_stream = nullptr;  // tests on CPU tensors pretend to be on it, and torch is not asked
};

extern State state;

// (a, weight, scales, bias or null, format) -> c, in the calling convention of aoti_torch_library_impl.
void gemm_boxed(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs);

}  // namespace marlin_gen
