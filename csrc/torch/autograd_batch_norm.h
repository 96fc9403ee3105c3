// What a node keeps of a BatchNorm with its residual and activation beside the BatchNorm's input,
// and the gradients from it. For the nodes of BatchNorm alone and of convolution with BatchNorm.
#pragma once

#include <array>
#include <string>
#include <string_view>

#include "torch/node.h"

namespace fastconv {

struct SavedBatchNorm {
  SavedTensor weight, bias, mean, var;
  // For the activation's derivative: nothing where the input suffices, else the output where the
  // derivative can be read off it (it is the next layer's input, which is kept anyway).
  SavedTensor residual, output;
  bool training = false;
  double eps = 0;
  std::string activation;

  void keep(const OptionalTensor& w, const OptionalTensor& b, const at::Tensor& m,
            const at::Tensor& v, const OptionalTensor& r, const at::Tensor& out, bool train,
            double e, std::string_view name);
  void reset();
  // Gradients of input, weight, bias and residual, where wanted.
  variable_list backward(const at::Tensor& grad, const at::Tensor& input,
                         std::array<bool, 4> wanted);
};

}  // namespace fastconv
