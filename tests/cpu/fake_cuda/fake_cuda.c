// A CUDA driver without a GPU: it answers as an H100 would and records what it is told to launch.
//
// Its functions are handles to the sizes of their arguments, which a real driver reads from the cubin. A tensor map is
// filled with what it was encoded from: two are equal when their encodings are.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
enum { kMaxArguments = 32, kMaxBytes = 2048, kMaxLaunches = 1024 };

struct Function {
  int count;
  int sizes[kMaxArguments];
};

struct Launch {
  uint32_t grid[3], block[3], smem_bytes, num_attributes;
  uint64_t stream;
  int32_t attribute_ids[4];
  uint32_t clusters[4][3];
  int32_t num_bytes;
  unsigned char bytes[kMaxBytes];  // of the arguments, one after the other
};

struct Attribute {
  int id, pad;
  uint32_t value[16];
};

struct Config {
  uint32_t grid[3], block[3], smem_bytes;
  void* stream;
  struct Attribute* attributes;
  uint32_t num_attributes;
};

static struct Function functions[64];
static int num_functions;
static struct Launch launches[kMaxLaunches];
static int num_launches, num_encodings;
static int launch_error, num_failures;  // the next num_failures launches fail with launch_error
static int capturing;
static void* context = (void*)0xC0;

// For the tests.
EXPORT void* fake_function(int count, const int* sizes) {
  struct Function* const made = &functions[num_functions++];
  made->count = count;
  memcpy(made->sizes, sizes, count * sizeof(int));
  return made;
}
EXPORT int fake_num_launches(void) { return num_launches; }
EXPORT int fake_num_encodings(void) { return num_encodings; }
EXPORT const struct Launch* fake_launch(int i) { return &launches[i % kMaxLaunches]; }
EXPORT void fake_fail(int error, int times) { launch_error = error, num_failures = times; }
EXPORT void fake_capture(int on) { capturing = on; }
EXPORT void fake_set_context(void* value) { context = value; }
EXPORT void* fake_context(void) { return context; }

// The driver.
EXPORT int cuInit(unsigned flags) { return 0; }
EXPORT int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
EXPORT int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
EXPORT int cuDeviceGetCount(int* count) { return *count = 1, 0; }
EXPORT int cuDeviceGetName(char* name, int length, int device) { return strncpy(name, "NVIDIA H100 80GB HBM3", length), 0; }
EXPORT int cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 16: *value = 132; break;         // multiprocessors
    case 36: *value = 2619000; break;     // memory clock, kHz
    case 37: *value = 5120; break;        // bus width
    case 38: *value = 50 << 20; break;    // L2
    case 75: *value = 9; break;           // compute capability
    case 76: *value = 0; break;
    case 81: *value = 228 << 10; break;   // shared memory of an SM
    default: return 1;
  }
  return 0;
}
EXPORT int cuCtxGetCurrent(void** current) { return *current = context, 0; }
EXPORT int cuCtxSetCurrent(void* current) { return context = current, 0; }
EXPORT int cuDevicePrimaryCtxRetain(void** primary, int device) { return *primary = (void*)0xC0, 0; }
EXPORT int cuModuleLoadData(void** module, const void* image) { return *module = (void*)0x30D, 0; }

// Named after its family, whose argument sizes a test has announced.
static struct Function announced[3];  // mma, wgmma, gather
EXPORT void fake_announce(int family, int count, const int* sizes) {
  announced[family].count = count;
  memcpy(announced[family].sizes, sizes, count * sizeof(int));
}
EXPORT int cuModuleGetFunction(void** function, void* module, const char* name) {
  return *function = &announced[strstr(name, "wgmma") != NULL ? 1 : strstr(name, "gather") != NULL ? 2 : 0], 0;
}
EXPORT int cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* function, int threads, size_t smem) { return *blocks = 1, 0; }
EXPORT int cuOccupancyMaxActiveClusters(int* clusters, void* function, const struct Config* config) { return *clusters = 66, 0; }
EXPORT int cuStreamIsCapturing(void* stream, int* status) { return *status = capturing, 0; }

EXPORT int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* address, const uint64_t* sizes, const uint64_t* strides,
                                  const uint32_t* box, const uint32_t* element_strides, int interleave, int swizzle, int promotion,
                                  int fill) {
  uint64_t const words[16] = {type, rank, (uint64_t)address, sizes[0], sizes[1], strides[0], box[0], box[1], element_strides[0],
                              element_strides[1], interleave, swizzle, promotion, fill, 0, 0};
  memcpy(map, words, sizeof(words));
  __atomic_fetch_add(&num_encodings, 1, __ATOMIC_RELAXED);
  return 0;
}

EXPORT int cuLaunchKernelEx(const struct Config* config, struct Function* function, void** arguments, void** extra) {
  if (num_failures > 0) return --num_failures, launch_error;
  if (context == NULL) return 201;
  struct Launch* const launch = &launches[__atomic_fetch_add(&num_launches, 1, __ATOMIC_RELAXED) % kMaxLaunches];
  memset(launch, 0, sizeof(*launch));
  memcpy(launch->grid, config->grid, sizeof(config->grid));
  memcpy(launch->block, config->block, sizeof(config->block));
  launch->smem_bytes = config->smem_bytes;
  launch->stream = (uint64_t)config->stream;
  launch->num_attributes = config->num_attributes;
  for (uint32_t i = 0; i < config->num_attributes && i < 4; ++i) {
    launch->attribute_ids[i] = config->attributes[i].id;
    memcpy(launch->clusters[i], config->attributes[i].value, 12);
  }
  for (int i = 0; i < function->count; ++i) {
    memcpy(launch->bytes + launch->num_bytes, arguments[i], function->sizes[i]);
    launch->num_bytes += function->sizes[i];
  }
  return 0;
}

EXPORT int cuGetProcAddress_v2(const char* name, void** found, int version, uint64_t flags, int* status) {
  *found = dlsym(dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD), name);
  Dl_info here, there;
  // Only what is defined here: another library's function of that name is not ours.
  if (*found != NULL && !(dladdr((void*)cuInit, &here) && dladdr(*found, &there) && here.dli_fbase == there.dli_fbase)) *found = NULL;
  if (status != NULL) *status = *found == NULL;
  return 0;
}
