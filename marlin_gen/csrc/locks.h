// Lock words of striped kernels, by stream: Python's Workspace owns them, both launchers use the same ones.
#pragma once
#include <cstdint>
#include <map>
#include <shared_mutex>
#include <utility>

#include "cuda_driver.h"

namespace marlin_gen {

class LockTable {
 public:
  // Null when the stream has not enough.
  void* find(int device, cuda::Stream stream, uint32_t num_locks) const;
  void put(int device, cuda::Stream stream, void* words, uint32_t num_locks);

 private:
  struct Words {
    void* address;
    uint32_t count;
  };
  mutable std::shared_mutex mutex_;
  std::map<std::pair<int, cuda::Stream>, Words> words_;
};

}  // namespace marlin_gen
