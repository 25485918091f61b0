#include "gemm.h"

#include <cstring>
#include <string>

#include "call.h"
#include "tensor_maps.h"

namespace marlin_gen {

State state;

namespace {

constexpr const char* kSlowOp = "marlin_gen::gemm_slow";

// Makes the operands' device the current one while it lives. False in `ready`: torch refuses.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    int32_t current = 0;
    if (state.test_stream != nullptr) return;
    ready = torch.aoti_torch_get_current_device_index(&current) == 0 &&
            (current == device || torch.aoti_torch_create_device_guard(device, &guard_) == 0);
  }
  DeviceGuard(DeviceGuard const&) = delete;
  DeviceGuard& operator=(DeviceGuard const&) = delete;
  ~DeviceGuard() {
    if (guard_ != nullptr) torch.aoti_torch_delete_device_guard(guard_);
  }
  bool ready = true;

 private:
  DeviceGuardHandle guard_ = nullptr;
};

bool current_stream(int device, cuda::Stream& stream) {
  if (state.test_stream != nullptr) return stream = state.test_stream, true;
  return torch.aoti_torch_get_current_cuda_stream != nullptr && torch.aoti_torch_get_current_cuda_stream(device, &stream) == 0;
}

// A kernel's arguments in their order: tensor maps and pointers by value, then int32 scalars and `dependent`.
class Arguments {
 public:
  // False when a tensor map cannot be made, or an operand is missing.
  bool fill(Step const& step, Call const& call, void* c, void* partials, void* locks) {
    int64_t const m = call.key.m, n = call.key.n, k = call.key.k;
    for (int i = 0; i < step.num_operands; ++i) {
      bool made = true;
      switch (step.operands[i]) {
        case Operand::kAMap: made = map({call.a.data, m, k, call.row_stride, step.a_box[0], step.a_box[1]}); break;
        case Operand::kATailMap: made = map({call.a.data, m, k, call.row_stride, step.a_tail_rows, step.a_box[1]}); break;
        case Operand::kCMap: made = map({c, m, n, n, step.c_box[0], step.c_box[1]}); break;
        case Operand::kA: made = call.row_stride == k, pointer(call.a.data); break;
        case Operand::kC: pointer(c); break;
        case Operand::kWeight: pointer(call.weight.data); break;
        case Operand::kScales: pointer(call.scales.data); break;
        case Operand::kBias: pointer(call.bias.data); break;
        case Operand::kPartials: pointer(partials); break;
        case Operand::kLocks: pointer(locks); break;
      }
      if (!made) return false;
    }
    std::memcpy(scalars_, step.scalars, sizeof(step.scalars));
    scalars_[step.num_scalars] = int32_t(step.dependent);
    for (int i = 0; i <= step.num_scalars; ++i) addresses_[count_++] = &scalars_[i];
    return true;
  }
  void** addresses() { return addresses_; }

 private:
  bool map(MapKey const& key) {
    if (num_maps_ == 4) return false;
    addresses_[count_++] = &maps_[num_maps_];
    return tensor_map(key, maps_[num_maps_++]) == cuda::kSuccess;
  }
  void pointer(void* address) {
    pointers_[count_] = address;
    addresses_[count_] = &pointers_[count_];
    ++count_;
  }

  cuda::TensorMap maps_[4];
  void* pointers_[kMaxOperands];
  int32_t scalars_[kMaxScalars + 1];
  void* addresses_[kMaxOperands + kMaxScalars + 1];
  int num_maps_ = 0, count_ = 0;
};

bool launch(Step const& step, void** arguments, cuda::Stream stream, int device) {
  cuda::LaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (step.cluster > 1) {
    attributes[count].id = cuda::kClusterDimension;
    attributes[count].cluster[0] = step.cluster, attributes[count].cluster[1] = attributes[count].cluster[2] = 1;
    ++count;
  }
  if (step.dependent) {
    attributes[count].id = cuda::kProgrammaticStreamSerialization;
    attributes[count++].programmatic = 1;
  }
  cuda::LaunchConfig const config{{step.grid, 1, 1}, {step.threads, 1, 1}, step.smem_bytes, stream, attributes, count};
  cuda::Result error = cuda::driver.launch(&config, step.function, arguments, nullptr);
  // A thread in which nobody has called the CUDA runtime has no context yet.
  if (error == cuda::kInvalidContext && cuda::bind_context(device) == cuda::kSuccess)
    error = cuda::driver.launch(&config, step.function, arguments, nullptr);
  return error == cuda::kSuccess;
}

// The locks of a striped kernel; false where Python must find some: the stream is new, or is captured into a graph, which
// may later be replayed beside anything and gets locks of its own.
bool find_locks(Step const& step, int device, cuda::Stream stream, void*& locks) {
  if (step.num_locks == 0) return true;
  int capturing = 0;
  if (cuda::driver.is_capturing(stream, &capturing) != cuda::kSuccess || capturing != 0) return false;
  locks = state.locks.find(device, stream, step.num_locks);
  return locks != nullptr;
}

// The product in `out`; false when this call is not for here, and nothing has been launched.
bool gemm(Call const& call, OwnedTensor& out) {
  Step step;
  if (!state.steps.find(call.key, step) || (call.has_bias && !step.has(Operand::kBias))) return false;
  DeviceGuard const guard(call.key.device);
  cuda::Stream stream = nullptr;
  void* locks = nullptr;
  if (!guard.ready || !current_stream(call.key.device, stream) || !find_locks(step, call.key.device, stream, locks)) return false;

  int64_t sizes[kMaxDim];
  std::memcpy(sizes, call.a.sizes, size_t(call.a.dim) * sizeof(int64_t));
  sizes[call.a.dim - 1] = call.key.n;
  Tensor c, partials;
  if (!allocate(call.a, call.a.dtype, call.a.dim, sizes, out) || torch.aoti_torch_get_data_ptr(out.get(), &c.data)) return false;
  // Given back at the end of the scope: the allocator hands it to this stream's later work only.
  OwnedTensor scratch;
  if (step.partials_bytes && (!allocate(call.a, torch.aoti_torch_dtype_uint8(), 1, &step.partials_bytes, scratch) ||
                              torch.aoti_torch_get_data_ptr(scratch.get(), &partials.data)))
    return false;

  Arguments arguments;
  if (!arguments.fill(step, call, c.data, partials.data, locks)) return false;
  return launch(step, arguments.addresses(), stream, call.key.device);
}

// Python's implementation, which takes the operands over. It does not throw through here: an error comes back as its text.
void call_python(StableIValue* stack) {
  if (torch.aoti_torch_call_dispatcher(kSlowOp, "", stack)) {
    torch.aoti_torch_check(false, __func__, __FILE__, __LINE__, "marlin_gen.gemm: torch could not call gemm_slow");
  }
  auto const handle = reinterpret_cast<AtenTensorHandle>(stack[0]);
  Tensor result;
  if (Tensor::read(handle, result) && result.dtype == torch.aoti_torch_dtype_uint8()) {
    OwnedTensor const text(handle);
    std::string const message(static_cast<char const*>(result.data), size_t(result.sizes[0]));
    torch.aoti_torch_check(false, __func__, __FILE__, __LINE__, message.c_str());
  }
}

}  // namespace

void gemm_boxed(StableIValue* stack, uint64_t, uint64_t) {
  auto const handle = [&](int i) { return reinterpret_cast<AtenTensorHandle>(stack[i]); };
  auto* const boxed_bias = reinterpret_cast<StableIValue*>(stack[3]);  // an optional is null, or a value on the heap
  auto const bias = boxed_bias == nullptr ? nullptr : reinterpret_cast<AtenTensorHandle>(*boxed_bias);
  Call call;
  OwnedTensor out;
  if (state.forked.load(std::memory_order_relaxed) || !call.read(handle(0), handle(1), handle(2), bias, int64_t(stack[4])) ||
      !gemm(call, out)) {
    return call_python(stack);
  }
  state.launches.fetch_add(1, std::memory_order_relaxed);
  for (AtenTensorHandle const operand : {handle(0), handle(1), handle(2), bias}) OwnedTensor{operand};
  delete boxed_bias;
  stack[0] = reinterpret_cast<StableIValue>(out.release());
}

}  // namespace marlin_gen
