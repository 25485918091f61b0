#include "locks.h"

#include <mutex>

namespace marlin_gen {

void* LockTable::find(int device, cuda::Stream stream, uint32_t num_locks) const {
  std::shared_lock const lock(mutex_);
  auto const found = words_.find({device, stream});
  return found != words_.end() && found->second.count >= num_locks ? found->second.address : nullptr;
}

void LockTable::put(int device, cuda::Stream stream, void* words, uint32_t num_locks) {
  std::unique_lock const lock(mutex_);
  words_[{device, stream}] = {words, num_locks};
}

}  // namespace marlin_gen
