// Shapes, dtypes and strides without data: what meta tensors, torch.compile and torch.export run.
// Everything is symbolic; the strides are exactly those of the real kernels.
#include <ATen/ops/adaptive_avg_pool2d.h>
#include <ATen/ops/avg_pool2d.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/max_pool2d_with_indices.h>
#include <torch/library.h>

#include "torch/activation.h"
#include "torch/arguments.h"
#include "torch/window_offsets.h"

namespace fastconv {
namespace {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;

Tensor conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
              SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
              SymInt groups) {
  if (!is_own(input) || !is_own(weight)) {
    return at::conv2d_symint(input, weight, bias, stride, padding, dilation, groups);
  }
  check_conv2d_ranks(input, weight);
  if (input.dim() == 3) {
    return conv2d(input.unsqueeze(0), weight, bias, stride, padding, dilation, groups).squeeze(0);
  }
  const Conv2dSizes sizes = check_conv2d(input, weight, bias, stride, padding, dilation, groups);
  const bool channels_last = suggests_channels_last(weight) || suggests_channels_last(input);
  return at::empty_symint(SymIntArrayRef(sizes.output.data(), 4), input.options(),
                          memory_format(channels_last));
}

Tensor max_pool2d(const Tensor& input, SymIntArrayRef kernel_size, SymIntArrayRef stride,
                  SymIntArrayRef padding, SymIntArrayRef dilation, bool ceil_mode);

Tensor conv_bn_act(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& mean, const OptionalTensor& var,
                   const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                   const OptionalTensor& residual, double, SymIntArrayRef stride,
                   SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups,
                   std::string_view activation, SymIntArrayRef pool_kernel,
                   SymIntArrayRef pool_stride, SymIntArrayRef pool_padding, bool keep_filter) {
  activation_of(activation);
  check_conv2d_ranks(input, weight);
  if (input.dim() == 3) {
    return conv_bn_act(input.unsqueeze(0), weight, bias, mean, var, bn_weight, bn_bias,
                       residual ? OptionalTensor(residual->unsqueeze(0)) : residual, 0, stride,
                       padding, dilation, groups, activation, pool_kernel, pool_stride,
                       pool_padding, keep_filter)
        .squeeze(0);
  }
  const Tensor out = conv2d(input, weight, bias, stride, padding, dilation, groups);
  if (is_own(out)) {
    check_folded(input, check_conv2d(input, weight, bias, stride, padding, dilation, groups), mean,
                 var, bn_weight, bn_bias, residual);
  }
  if (pool_kernel.empty()) return out;
  const SymInt one = 1;
  return max_pool2d(out, pool_kernel, pool_stride, pool_padding, one, /*ceil_mode=*/false);
}

Tensor empty_gradient(const Tensor& grad, SymIntArrayRef size, bool channels_last) {
  return at::empty_symint(size, grad.options(), memory_format(channels_last));
}

Tensor conv2d_dgrad(const Tensor& grad, const Tensor&, SymIntArrayRef input_size, SymIntArrayRef,
                    SymIntArrayRef, SymIntArrayRef, SymInt, bool channels_last) {
  return empty_gradient(grad, input_size, channels_last);
}

Tensor conv2d_wgrad(const Tensor& grad, const Tensor&, SymIntArrayRef weight_size, SymIntArrayRef,
                    SymIntArrayRef, SymIntArrayRef, SymInt, bool channels_last) {
  return empty_gradient(grad, weight_size, channels_last);
}

Tensor conv2d_bgrad(const Tensor& grad) {
  TORCH_CHECK(grad.dim() == 4, "conv2d_bgrad: expected a 4-dimensional gradient, but got ",
              grad.sym_sizes());
  return at::empty_symint({grad.sym_size(1)}, grad.options());
}

Tensor empty_pooled(const Tensor& input, SymIntArrayRef size, at::ScalarType type) {
  return at::empty_symint(size, input.options().dtype(type),
                          memory_format(suggests_channels_last(input)));
}

Tensor max_pool2d(const Tensor& input, SymIntArrayRef kernel_size, SymIntArrayRef stride,
                  SymIntArrayRef padding, SymIntArrayRef dilation, bool ceil_mode) {
  const Pool2dSizes sizes =
      check_max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode);
  return empty_pooled(input, sizes.output, input.scalar_type());
}

std::tuple<Tensor, Tensor> max_pool2d_with(at::ScalarType index_type, const Tensor& input,
                                           SymIntArrayRef kernel_size, SymIntArrayRef stride,
                                           SymIntArrayRef padding, SymIntArrayRef dilation,
                                           bool ceil_mode) {
  const Pool2dSizes sizes =
      check_max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode);
  return {empty_pooled(input, sizes.output, input.scalar_type()),
          empty_pooled(input, sizes.output, index_type)};
}

std::tuple<Tensor, Tensor> max_pool2d_with_indices(const Tensor& input, SymIntArrayRef kernel_size,
                                                   SymIntArrayRef stride, SymIntArrayRef padding,
                                                   SymIntArrayRef dilation, bool ceil_mode) {
  return max_pool2d_with(at::kLong, input, kernel_size, stride, padding, dilation, ceil_mode);
}

std::tuple<Tensor, Tensor> max_pool2d_with_offsets(const Tensor& input, SymIntArrayRef kernel_size,
                                                   SymIntArrayRef stride, SymIntArrayRef padding,
                                                   SymIntArrayRef dilation, bool ceil_mode) {
  return max_pool2d_with(offset_type(kernel_size), input, kernel_size, stride, padding, dilation,
                         ceil_mode);
}

Tensor max_pool2d_backward(const Tensor& grad, const Tensor&, SymIntArrayRef input_size,
                           SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, bool,
                           bool channels_last) {
  return empty_gradient(grad, input_size, channels_last);
}

Tensor avg_pool2d(const Tensor& input, SymIntArrayRef kernel_size, SymIntArrayRef stride,
                  SymIntArrayRef padding, bool ceil_mode, bool,
                  std::optional<int64_t> divisor_override) {
  const Pool2dSizes sizes =
      check_avg_pool2d(input, kernel_size, stride, padding, ceil_mode, divisor_override);
  return empty_pooled(input, sizes.output, input.scalar_type());
}

Tensor avg_pool2d_backward(const Tensor& grad, SymIntArrayRef input_size, SymIntArrayRef,
                           SymIntArrayRef, SymIntArrayRef, bool, bool, std::optional<int64_t>,
                           bool channels_last) {
  return empty_gradient(grad, input_size, channels_last);
}

Tensor adaptive_avg_pool2d(const Tensor& input, SymIntArrayRef output_size) {
  return empty_pooled(input, check_adaptive_avg_pool2d(input, output_size), input.scalar_type());
}

Tensor adaptive_avg_pool2d_backward(const Tensor& grad, SymIntArrayRef input_size,
                                    bool channels_last) {
  return empty_gradient(grad, input_size, channels_last);
}

Tensor empty_normalised(const Tensor& input) {
  return at::empty_symint(input.sym_sizes(), input.options(), input.suggest_memory_format());
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_training(const Tensor& input,
                                                       const OptionalTensor& weight,
                                                       const OptionalTensor& bias,
                                                       const OptionalTensor& residual, double,
                                                       std::string_view activation) {
  activation_of(activation);
  check_batch_norm(input, weight, bias, std::nullopt, std::nullopt, /*training=*/true);
  check_residual("batch_norm", residual, input.sym_sizes(), input);
  const auto statistics = input.options().dtype(accumulator_type(input));
  const auto channels = input.sym_size(1);
  return {empty_normalised(input), at::empty_symint({channels}, statistics),
          at::empty_symint({channels}, statistics)};
}

Tensor batch_norm_inference(const Tensor& input, const OptionalTensor& weight,
                            const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                            const OptionalTensor& residual, double, std::string_view activation) {
  activation_of(activation);
  check_batch_norm(input, weight, bias, mean, var, /*training=*/false);
  check_residual("batch_norm", residual, input.sym_sizes(), input);
  return empty_normalised(input);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(
    const Tensor&, const Tensor& input, const OptionalTensor& weight, const OptionalTensor&,
    const Tensor& mean, const Tensor&, const OptionalTensor&, const OptionalTensor&, bool, double,
    std::string_view, std::array<bool, 4> output_mask) {
  const auto type = weight ? weight->scalar_type() : mean.scalar_type();
  const auto options = input.options().dtype(type);
  const std::vector<SymInt> channels{input.sym_size(1)};
  const SymIntArrayRef weight_size = weight ? weight->sym_sizes() : SymIntArrayRef(channels);
  return {output_mask[0] ? empty_normalised(input) : Tensor(),
          output_mask[1] ? at::empty_symint(weight_size, options) : Tensor(),
          output_mask[2] ? at::empty_symint(channels, options) : Tensor(),
          output_mask[3] ? empty_normalised(input) : Tensor()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bn_training(
    const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, const OptionalTensor& residual,
    double eps, SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
    SymInt groups, std::string_view activation, bool) {
  check_batched("conv_bn_training", input);
  const Tensor y = conv2d(input, weight, bias, stride, padding, dilation, std::move(groups));
  check_residual("conv_bn_relu", residual, y.sym_sizes(), y);
  const auto [out, mean, var] =
      batch_norm_training(y, bn_weight, bn_bias, residual, eps, activation);
  return {out, y, mean, var};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastconv, Meta, m) {
  m.impl("conv2d", &conv2d);
  m.impl("conv2d_dgrad", &conv2d_dgrad);
  m.impl("conv2d_wgrad", &conv2d_wgrad);
  m.impl("conv2d_bgrad", &conv2d_bgrad);
  m.impl("conv_bn_act", &conv_bn_act);
  m.impl("conv_bn_training", &conv_bn_training);
  m.impl("max_pool2d", &max_pool2d);
  m.impl("max_pool2d_with_offsets", &max_pool2d_with_offsets);
  m.impl("max_pool2d_with_indices", &max_pool2d_with_indices);
  m.impl("max_pool2d_backward", &max_pool2d_backward);
  m.impl("avg_pool2d", &avg_pool2d);
  m.impl("avg_pool2d_backward", &avg_pool2d_backward);
  m.impl("adaptive_avg_pool2d", &adaptive_avg_pool2d);
  m.impl("adaptive_avg_pool2d_backward", &adaptive_avg_pool2d_backward);
  m.impl("batch_norm_training", &batch_norm_training);
  m.impl("batch_norm_inference", &batch_norm_inference);
  m.impl("batch_norm_backward", &batch_norm_backward);
}

}  // namespace fastconv
