// The operators of torch.ops.fastconv as C++ functions that go through torch's dispatcher: what the
// autograd files call. The schemas are in schema.cpp.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "torch/arguments.h"

namespace fastconv::ops {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;

Tensor conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
              SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
              SymInt groups);
Tensor conv2d_dgrad(const Tensor& grad, const Tensor& weight, SymIntArrayRef input_size,
                    SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                    SymInt groups, bool channels_last);
Tensor conv2d_wgrad(const Tensor& grad, const Tensor& input, SymIntArrayRef weight_size,
                    SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                    SymInt groups, bool channels_last);
Tensor conv2d_bgrad(const Tensor& grad);
Tensor conv_bn_act(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& mean, const OptionalTensor& var,
                   const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                   const OptionalTensor& residual, double eps, SymIntArrayRef stride,
                   SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups,
                   std::string_view activation, SymIntArrayRef pool_kernel,
                   SymIntArrayRef pool_stride, SymIntArrayRef pool_padding, bool keep_filter);
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bn_training(
    const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, const OptionalTensor& residual,
    double eps, SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
    SymInt groups, std::string_view activation, bool recompute);

Tensor max_pool2d(const Tensor& input, SymIntArrayRef kernel_size, SymIntArrayRef stride,
                  SymIntArrayRef padding, SymIntArrayRef dilation, bool ceil_mode);
std::tuple<Tensor, Tensor> max_pool2d_with_offsets(const Tensor& input, SymIntArrayRef kernel_size,
                                                   SymIntArrayRef stride, SymIntArrayRef padding,
                                                   SymIntArrayRef dilation, bool ceil_mode);
std::tuple<Tensor, Tensor> max_pool2d_with_indices(const Tensor& input, SymIntArrayRef kernel_size,
                                                   SymIntArrayRef stride, SymIntArrayRef padding,
                                                   SymIntArrayRef dilation, bool ceil_mode);
Tensor max_pool2d_backward(const Tensor& grad, const Tensor& index, SymIntArrayRef input_size,
                           SymIntArrayRef kernel_size, SymIntArrayRef stride,
                           SymIntArrayRef padding, SymIntArrayRef dilation, bool ceil_mode,
                           bool channels_last);
Tensor avg_pool2d(const Tensor& input, SymIntArrayRef kernel_size, SymIntArrayRef stride,
                  SymIntArrayRef padding, bool ceil_mode, bool count_include_pad,
                  std::optional<int64_t> divisor_override);
Tensor avg_pool2d_backward(const Tensor& grad, SymIntArrayRef input_size,
                           SymIntArrayRef kernel_size, SymIntArrayRef stride,
                           SymIntArrayRef padding, bool ceil_mode, bool count_include_pad,
                           std::optional<int64_t> divisor_override, bool channels_last);
Tensor adaptive_avg_pool2d(const Tensor& input, SymIntArrayRef output_size);
Tensor adaptive_avg_pool2d_backward(const Tensor& grad, SymIntArrayRef input_size,
                                    bool channels_last);

std::tuple<Tensor, Tensor, Tensor> batch_norm_training(const Tensor& input,
                                                       const OptionalTensor& weight,
                                                       const OptionalTensor& bias,
                                                       const OptionalTensor& residual, double eps,
                                                       std::string_view activation);
Tensor batch_norm_inference(const Tensor& input, const OptionalTensor& weight,
                            const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                            const OptionalTensor& residual, double eps,
                            std::string_view activation);
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(
    const Tensor& grad, const Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
    const OptionalTensor& residual, const OptionalTensor& output, bool training, double eps,
    std::string_view activation, std::array<bool, 4> output_mask);

}  // namespace fastconv::ops
