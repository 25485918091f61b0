// Fibers: every CUDA thread is one. A fiber runs until it waits; whoever schedules resumes those that can go on.
#pragma once
#include <ucontext.h>

#include <functional>
#include <memory>
#include <random>
#include <string>

namespace emulator {

struct Fiber {
  static constexpr size_t kStackBytes = 64 << 10;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  std::function<void()> body;
  bool done = false;
  std::function<bool()> ready;             // what it waits for; empty: it waits for nothing
  std::function<std::string()> waits_for;  // the same in words, for the report of a deadlock
};

inline Fiber* running;  // null while the scheduler runs
inline ucontext_t scheduler;
inline std::mt19937 random_bits;
inline bool one_in(unsigned n) { return random_bits() % n == 0; }

inline void prepare(Fiber& fiber, std::function<void()> body) {
  fiber.body = std::move(body);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = Fiber::kStackBytes;
  fiber.context.uc_link = &scheduler;
  makecontext(&fiber.context, +[] {
    running->body();
    running->done = true;
  }, 0);
}
inline bool can_run(Fiber const& fiber) { return !fiber.done && (!fiber.ready || fiber.ready()); }
inline void resume(Fiber& fiber) {
  running = &fiber;
  swapcontext(&scheduler, &fiber.context);
  running = nullptr;
}

inline void pause() { swapcontext(&running->context, &scheduler); }
// Where hardware may let others overtake.
inline void may_pause() {
  if (one_in(4)) pause();
}
template <class Ready, class WaitsFor>
void wait_until(Ready ready, WaitsFor waits_for) {
  if (ready()) return may_pause();
  running->ready = std::move(ready);
  running->waits_for = std::move(waits_for);
  pause();
  running->ready = nullptr;
}

}  // namespace emulator
