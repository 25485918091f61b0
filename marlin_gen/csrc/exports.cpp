// What Python calls through ctypes. Texts that are returned are constants; null means success.
#include <pthread.h>

#include <chrono>

#include "gemm.h"

#define MARLIN_GEN_EXPORT extern "C" __attribute__((visibility("default")))

using namespace marlin_gen;

// The sources that the library was built from, as native_build.py names them.
MARLIN_GEN_EXPORT const char* marlin_gen_digest() { return MARLIN_GEN_DIGEST; }

MARLIN_GEN_EXPORT const char* marlin_gen_init() {
  if (const char* const missing = load_torch()) return missing;
  if (const char* const missing = cuda::load_driver()) return missing;
  pthread_atfork(nullptr, nullptr, [] {
    if (state.used.load(std::memory_order_relaxed)) state.forked.store(true, std::memory_order_relaxed);
  });
  return nullptr;
}

MARLIN_GEN_EXPORT void marlin_gen_set_format(int format, Format const* row) { state.formats[format] = *row; }

// Implement the op for a dispatch key: CUDA, and CPU in tests. The registration is never taken back.
MARLIN_GEN_EXPORT const char* marlin_gen_implement(const char* op, const char* dispatch_key) {
  TorchLibraryHandle library = nullptr;
  if (torch.aoti_torch_library_init_impl("marlin_gen", dispatch_key, __FILE__, __LINE__, &library) ||
      torch.aoti_torch_library_impl(library, op, &gemm_boxed)) {
    return "torch does not take the implementation";
  }
  return nullptr;
}

MARLIN_GEN_EXPORT void marlin_gen_put_step(ProblemKey const* key, Step const* step) {
  state.used.store(true, std::memory_order_relaxed);
  state.steps.put(*key, *step);
}

MARLIN_GEN_EXPORT void marlin_gen_clear_steps(int device) { state.steps.clear(device); }

MARLIN_GEN_EXPORT void marlin_gen_put_locks(int device, void* stream, void* words, uint32_t num_locks) {
  state.locks.put(device, stream, words, num_locks);
}

MARLIN_GEN_EXPORT uint64_t marlin_gen_launches() { return state.launches.load(std::memory_order_relaxed); }

// Nanoseconds of one look-up, the mean of many; negative when the table has no such problem.
MARLIN_GEN_EXPORT double marlin_gen_lookup_ns(ProblemKey const* key, int repeats) {
  Step step{};
  uint64_t found = 0;
  auto const start = std::chrono::steady_clock::now();
  for (int i = 0; i < repeats; ++i) {
    found += state.steps.find(*key, step) && step.grid != 0;
    asm volatile("" ::"r"(&step) : "memory");  // the copy is made every time
  }
  std::chrono::duration<double, std::nano> const spent = std::chrono::steady_clock::now() - start;
  return found == uint64_t(repeats) ? spent.count() / repeats : -1;
}

MARLIN_GEN_EXPORT void marlin_gen_set_test_stream(void* stream) { state.test_stream = stream; }
