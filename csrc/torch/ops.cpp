#include "torch/ops.h"

#include <ATen/core/dispatch/Dispatcher.h>

namespace fastconv::ops {
namespace {

template <class F>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

}  // namespace

// Looked up once; the handle is then a plain table access.
#define FASTCONV_CALL(name, ...)                                   \
  static const auto op = find<decltype(name)>("fastconv::" #name); \
  return op.call(__VA_ARGS__)

Tensor conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
              SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
              SymInt groups) {
  FASTCONV_CALL(conv2d, input, weight, bias, stride, padding, dilation, std::move(groups));
}

Tensor conv2d_dgrad(const Tensor& grad, const Tensor& weight, SymIntArrayRef input_size,
                    SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                    SymInt groups, bool channels_last) {
  FASTCONV_CALL(conv2d_dgrad, grad, weight, input_size, stride, padding, dilation,
                std::move(groups), channels_last);
}

Tensor conv2d_wgrad(const Tensor& grad, const Tensor& input, SymIntArrayRef weight_size,
                    SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                    SymInt groups, bool channels_last) {
  FASTCONV_CALL(conv2d_wgrad, grad, input, weight_size, stride, padding, dilation,
                std::move(groups), channels_last);
}

Tensor conv2d_bgrad(const Tensor& grad) { FASTCONV_CALL(conv2d_bgrad, grad); }

Tensor conv_bn_act(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& mean, const OptionalTensor& var,
                   const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                   const OptionalTensor& residual, double eps, SymIntArrayRef stride,
                   SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups,
                   std::string_view activation, SymIntArrayRef pool_kernel,
                   SymIntArrayRef pool_stride, SymIntArrayRef pool_padding, bool keep_filter) {
  FASTCONV_CALL(conv_bn_act, input, weight, bias, mean, var, bn_weight, bn_bias, residual, eps,
                stride, padding, dilation, std::move(groups), activation, pool_kernel, pool_stride,
                pool_padding, keep_filter);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bn_training(
    const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, const OptionalTensor& residual,
    double eps, SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
    SymInt groups, std::string_view activation, bool recompute) {
  FASTCONV_CALL(conv_bn_training, input, weight, bias, bn_weight, bn_bias, residual, eps, stride,
                padding, dilation, std::move(groups), activation, recompute);
}

Tensor max_pool2d(const Tensor& input, SymIntArrayRef kernel_size, SymIntArrayRef stride,
                  SymIntArrayRef padding, SymIntArrayRef dilation, bool ceil_mode) {
  FASTCONV_CALL(max_pool2d, input, kernel_size, stride, padding, dilation, ceil_mode);
}

std::tuple<Tensor, Tensor> max_pool2d_with_offsets(const Tensor& input, SymIntArrayRef kernel_size,
                                                   SymIntArrayRef stride, SymIntArrayRef padding,
                                                   SymIntArrayRef dilation, bool ceil_mode) {
  FASTCONV_CALL(max_pool2d_with_offsets, input, kernel_size, stride, padding, dilation, ceil_mode);
}

std::tuple<Tensor, Tensor> max_pool2d_with_indices(const Tensor& input, SymIntArrayRef kernel_size,
                                                   SymIntArrayRef stride, SymIntArrayRef padding,
                                                   SymIntArrayRef dilation, bool ceil_mode) {
  FASTCONV_CALL(max_pool2d_with_indices, input, kernel_size, stride, padding, dilation, ceil_mode);
}

Tensor max_pool2d_backward(const Tensor& grad, const Tensor& index, SymIntArrayRef input_size,
                           SymIntArrayRef kernel_size, SymIntArrayRef stride,
                           SymIntArrayRef padding, SymIntArrayRef dilation, bool ceil_mode,
                           bool channels_last) {
  FASTCONV_CALL(max_pool2d_backward, grad, index, input_size, kernel_size, stride, padding,
                dilation, ceil_mode, channels_last);
}

Tensor avg_pool2d(const Tensor& input, SymIntArrayRef kernel_size, SymIntArrayRef stride,
                  SymIntArrayRef padding, bool ceil_mode, bool count_include_pad,
                  std::optional<int64_t> divisor_override) {
  FASTCONV_CALL(avg_pool2d, input, kernel_size, stride, padding, ceil_mode, count_include_pad,
                divisor_override);
}

Tensor avg_pool2d_backward(const Tensor& grad, SymIntArrayRef input_size,
                           SymIntArrayRef kernel_size, SymIntArrayRef stride,
                           SymIntArrayRef padding, bool ceil_mode, bool count_include_pad,
                           std::optional<int64_t> divisor_override, bool channels_last) {
  FASTCONV_CALL(avg_pool2d_backward, grad, input_size, kernel_size, stride, padding, ceil_mode,
                count_include_pad, divisor_override, channels_last);
}

Tensor adaptive_avg_pool2d(const Tensor& input, SymIntArrayRef output_size) {
  FASTCONV_CALL(adaptive_avg_pool2d, input, output_size);
}

Tensor adaptive_avg_pool2d_backward(const Tensor& grad, SymIntArrayRef input_size,
                                    bool channels_last) {
  FASTCONV_CALL(adaptive_avg_pool2d_backward, grad, input_size, channels_last);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_training(const Tensor& input,
                                                       const OptionalTensor& weight,
                                                       const OptionalTensor& bias,
                                                       const OptionalTensor& residual, double eps,
                                                       std::string_view activation) {
  FASTCONV_CALL(batch_norm_training, input, weight, bias, residual, eps, activation);
}

Tensor batch_norm_inference(const Tensor& input, const OptionalTensor& weight,
                            const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                            const OptionalTensor& residual, double eps,
                            std::string_view activation) {
  FASTCONV_CALL(batch_norm_inference, input, weight, bias, mean, var, residual, eps, activation);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(
    const Tensor& grad, const Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
    const OptionalTensor& residual, const OptionalTensor& output, bool training, double eps,
    std::string_view activation, std::array<bool, 4> output_mask) {
  FASTCONV_CALL(batch_norm_backward, grad, input, weight, bias, mean, var, residual, output,
                training, eps, activation, output_mask);
}

}  // namespace fastconv::ops
