// The few types and entry points of the CUDA driver that a launch needs, declared here so that no toolkit is needed to
// build. tests/cpu/test_native_build.py compares sizes, offsets and values with cuda.h.
#pragma once
#include <cstddef>
#include <cstdint>

namespace marlin_gen::cuda {

using Result = int;  // CUresult
constexpr Result kSuccess = 0, kInvalidContext = 201;
using Context = void*;
using Function = void*;
using Stream = void*;

// CUtensorMap: opaque, and read by the GPU from the kernel's arguments. Aligned to 64 bytes in CUDA 12, to 128 in 13.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

// CUlaunchAttribute with the two values that are used: the cluster's dimensions, and whether the launch is dependent.
struct LaunchAttribute {
  int id;
  int pad;
  union {
    unsigned cluster[3];
    int programmatic;
    char size[64];
  };
};
constexpr int kClusterDimension = 4, kProgrammaticStreamSerialization = 6;

// CUlaunchConfig.
struct LaunchConfig {
  unsigned grid[3], block[3];
  unsigned smem_bytes;
  Stream stream;
  LaunchAttribute* attributes;
  unsigned num_attributes;
};

// Of cuTensorMapEncodeTiled.
constexpr int kFloat16 = 6, kInterleaveNone = 0, kSwizzle128 = 3, kPromoteL2To256 = 3, kZeroFill = 0;

struct Driver {
  Result (*encode_tiled)(TensorMap*, int type, uint32_t rank, void* address, const uint64_t* sizes, const uint64_t* strides,
                         const uint32_t* box, const uint32_t* element_strides, int interleave, int swizzle, int promotion,
                         int fill);
  Result (*launch)(const LaunchConfig*, Function, void** arguments, void** extra);
  Result (*is_capturing)(Stream, int* status);  // status 0: no capture
  Result (*device_get)(int* device, int index);
  Result (*retain_context)(Context*, int device);
  Result (*set_context)(Context);
};

extern Driver driver;  // filled by load_driver

// Null, or what is missing. The driver is the one that the process has loaded, or else the system's.
const char* load_driver();

// Make the device's primary context, the one that torch uses, the calling thread's.
Result bind_context(int device_index);

}  // namespace marlin_gen::cuda
