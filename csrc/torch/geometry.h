// A convolution's three directions with its stride, padding, dilation and groups, for autograd.
#pragma once

#include <vector>

#include "torch/ops.h"

namespace fastconv {

// stride, padding, dilation and groups as one value that a node can keep.
struct Geometry {
  std::vector<c10::SymInt> stride, padding, dilation;
  c10::SymInt groups;
  Geometry() = default;
  Geometry(c10::SymIntArrayRef s, c10::SymIntArrayRef p, c10::SymIntArrayRef d,
           const c10::SymInt& g)
      : stride(s.vec()), padding(p.vec()), dilation(d.vec()), groups(g) {}

  at::Tensor fprop(const at::Tensor& input, const at::Tensor& weight,
                   const OptionalTensor& bias = {}) const {
    return ops::conv2d(input, weight, bias, stride, padding, dilation, groups);
  }
  at::Tensor dgrad(const at::Tensor& grad, const at::Tensor& weight, c10::SymIntArrayRef input_size,
                   bool channels_last) const {
    return ops::conv2d_dgrad(grad, weight, input_size, stride, padding, dilation, groups,
                             channels_last);
  }
  at::Tensor wgrad(const at::Tensor& grad, const at::Tensor& input, c10::SymIntArrayRef weight_size,
                   bool channels_last) const {
    return ops::conv2d_wgrad(grad, input, weight_size, stride, padding, dilation, groups,
                             channels_last);
  }
};

}  // namespace fastconv
