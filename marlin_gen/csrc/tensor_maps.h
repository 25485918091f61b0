// Tensor maps of row-major matrices with 16-bit elements: 128-byte swizzle, boxes of (rows, columns).
#pragma once
#include "cuda_driver.h"

namespace marlin_gen {

// All that the bytes of a map depend on.
struct MapKey {
  void* address;
  int64_t rows, columns, row_stride;  // stride in elements
  uint32_t box_rows, box_columns;

  bool operator==(MapKey const& o) const {
    return address == o.address && rows == o.rows && columns == o.columns && row_stride == o.row_stride &&
           box_rows == o.box_rows && box_columns == o.box_columns;
  }
};

// Encode, or copy from what this thread encoded lately: the allocator hands the same addresses out again and again.
cuda::Result tensor_map(MapKey const& key, cuda::TensorMap& map);

}  // namespace marlin_gen
