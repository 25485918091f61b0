// One call of the op: its operands, checked, and what they say of the problem.
#pragma once
#include "gemm.h"
#include "tensors.h"

namespace marlin_gen {

struct Call {
  Tensor a, weight, scales, bias;
  bool has_bias = false;
  int64_t row_stride = 0;  // elements between rows of A, which may be a view
  ProblemKey key{};

  // False when anything is not as the kernels need it, or is wrong: Python copies, or says what is wrong.
  bool read(AtenTensorHandle a, AtenTensorHandle weight, AtenTensorHandle scales, AtenTensorHandle bias, int64_t format);

 private:
  bool read_rows();
  bool check_weight(Format const& format) const;
};

}  // namespace marlin_gen
