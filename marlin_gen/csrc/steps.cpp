#include "steps.h"

#include <algorithm>
#include <mutex>

namespace marlin_gen {

bool Step::has(Operand operand) const {
  return std::find(operands, operands + num_operands, operand) != operands + num_operands;
}

void StepTable::put(ProblemKey const& key, Step const& step) {
  std::unique_lock const lock(mutex_);
  steps_[key] = step;
}

void StepTable::clear(int device) {
  std::unique_lock const lock(mutex_);
  for (auto at = steps_.begin(); at != steps_.end();) at = at->first.device == device ? steps_.erase(at) : std::next(at);
}

}  // namespace marlin_gen
