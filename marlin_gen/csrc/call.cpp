#include "call.h"

#include <climits>

namespace marlin_gen {

namespace {

constexpr int64_t kSizeUnit = 64;  // features and k of a packed tile

}  // namespace

bool Call::read(AtenTensorHandle a_handle, AtenTensorHandle weight_handle, AtenTensorHandle scales_handle,
                AtenTensorHandle bias_handle, int64_t format) {
  if (format < 0 || format >= kMaxFormats || state.formats[format].group_size == 0) return false;
  if (!Tensor::read(a_handle, a) || !Tensor::read(weight_handle, weight) || !Tensor::read(scales_handle, scales)) return false;
  bool const half = a.dtype == torch.aoti_torch_dtype_float16();
  if (!half && a.dtype != torch.aoti_torch_dtype_bfloat16()) return false;
  if (!check_weight(state.formats[format]) || !read_rows()) return false;
  has_bias = bias_handle != nullptr;
  if (has_bias) {
    if (!Tensor::read(bias_handle, bias) || bias.dtype != a.dtype || !bias.on_device_of(a) || !bias.contiguous) return false;
    if (bias.dim != 1 || bias.sizes[0] != key.n || !bias.aligned()) return false;
  }
  key.format = int16_t(format);
  key.dtype = half ? 0 : 1;
  key.device = int8_t(a.device < 0 ? 0 : a.device);  // -1 on a CPU, in tests
  return true;
}

// The shapes that `check_operands` in op.py asks for.
bool Call::check_weight(Format const& format) const {
  if (weight.dtype != torch.aoti_torch_dtype_int32() || weight.dim != 3 || weight.sizes[2] != format.words_per_tile) return false;
  int64_t const k = weight.sizes[1] * kSizeUnit;
  if (scales.dtype != a.dtype || scales.dim != 3 || scales.sizes[0] != weight.sizes[0]) return false;
  if (scales.sizes[1] != k / format.group_size + format.lift_rows || scales.sizes[2] != kSizeUnit * format.scale_values) return false;
  return weight.contiguous && scales.contiguous && weight.aligned() && scales.aligned() && weight.on_device_of(a) &&
         scales.on_device_of(a);
}

// Any leading dimensions that are rows at one distance, which may be larger than k.
bool Call::read_rows() {
  int64_t const n = weight.sizes[0] * kSizeUnit, k = weight.sizes[1] * kSizeUnit;
  if (n > INT_MAX || k > INT_MAX || a.dim < 1 || a.dim > kMaxDim || a.sizes[a.dim - 1] != k || a.strides[a.dim - 1] != 1) return false;
  int64_t m = 1, next = 0;
  row_stride = k;
  for (int64_t i = a.dim - 2; i >= 0; --i) {
    if (a.sizes[i] == 0) return false;
    if (a.sizes[i] == 1) continue;
    if (m == 1) row_stride = next = a.strides[i];
    if (a.strides[i] != next || a.sizes[i] > INT_MAX / m) return false;
    m *= a.sizes[i];
    next = row_stride * m;
  }
  // Tensor maps: rows apart by 16-byte units, less than 2^40 bytes.
  if (!a.aligned() || row_stride < k || row_stride % 8 || row_stride >= int64_t(1) << 39) return false;
  key.n = int32_t(n), key.k = int32_t(k), key.m = int32_t(m);
  return true;
}

}  // namespace marlin_gen
