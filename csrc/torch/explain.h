// What fastconv.explain() shows: the choice for one convolution, and why each row lost.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "core/choose.h"
#include "torch/arguments.h"

namespace fastconv {

struct Explanation {
  std::string chosen;  // a row's name, or "aten"
  std::string reason;  // when it is "aten": why
  std::vector<Candidate> candidates;
};

// Raises for invalid arguments exactly as conv2d does.
Explanation explain_conv2d(Direction direction, const at::Tensor& input, const at::Tensor& weight,
                           const OptionalTensor& bias, c10::SymIntArrayRef stride,
                           c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                           const c10::SymInt& groups);

}  // namespace fastconv
