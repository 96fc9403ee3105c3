// Derivatives of results that another operator has computed on the way: what fused operators call.
#pragma once

#include <string_view>

#include "torch/arguments.h"

namespace fastconv {

// `out` is conv2d(input, weight, bias); autograd_conv2d.cpp.
void set_conv2d_history(const at::Tensor& out, const at::Tensor& input, const at::Tensor& weight,
                        const OptionalTensor& bias, c10::SymIntArrayRef stride,
                        c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                        const c10::SymInt& groups);
// `out` is activation(BatchNorm(input) + residual), in training by the batch's own mean and
// variance; autograd_batch_norm.cpp.
void set_batch_norm_history(const at::Tensor& out, const at::Tensor& input,
                            const OptionalTensor& weight, const OptionalTensor& bias,
                            const at::Tensor& mean, const at::Tensor& var,
                            const OptionalTensor& residual, bool training, double eps,
                            std::string_view activation);

}  // namespace fastconv
