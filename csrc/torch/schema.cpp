// The one place where the operators' schemas stand. All are functional: nothing is mutated, so that
// torch.compile, torch.export and torch.func see plain values.
#include <torch/library.h>

TORCH_LIBRARY(fastconv, m) {
  m.def(
      "conv2d(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding, "
      "SymInt[2] dilation, SymInt groups) -> Tensor");
  // The three gradients. channels_last: the memory format of the result.
  m.def(
      "conv2d_dgrad(Tensor grad, Tensor weight, SymInt[] input_size, SymInt[2] stride, "
      "SymInt[2] padding, SymInt[2] dilation, SymInt groups, bool channels_last) -> Tensor");
  m.def(
      "conv2d_wgrad(Tensor grad, Tensor input, SymInt[] weight_size, SymInt[2] stride, "
      "SymInt[2] padding, SymInt[2] dilation, SymInt groups, bool channels_last) -> Tensor");
  m.def("conv2d_bgrad(Tensor grad) -> Tensor");
  // Inference: max_pool2d(activation(batch_norm(conv2d(input)) + residual)) in one kernel where one
  // has all of it. Without mean and var nothing is normalised; without pool_kernel nothing pooled.
  // keep_filter: the filter may be kept as the kernel packs it until it changes.
  m.def(
      "conv_bn_act(Tensor input, Tensor weight, Tensor? bias, Tensor? mean, Tensor? var, "
      "Tensor? bn_weight, Tensor? bn_bias, Tensor? residual, float eps, SymInt[2] stride, "
      "SymInt[2] padding, SymInt[2] dilation, SymInt groups, str activation, "
      "SymInt[2] pool_kernel=[], SymInt[2] pool_stride=[], SymInt[2] pool_padding=0, "
      "bool keep_filter=False) -> Tensor");

  // Training: activation(batch_norm(conv2d(input)) + residual) with the batch's own statistics.
  // Returns the output, the convolution's result, mean and biased variance (float32; float64 for
  // float64). With recompute, backward convolves again instead of keeping the convolution's result,
  // which then carries no gradient.
  m.def(
      "conv_bn_training(Tensor input, Tensor weight, Tensor? bias, Tensor? bn_weight, "
      "Tensor? bn_bias, Tensor? residual, float eps, SymInt[2] stride, SymInt[2] padding, "
      "SymInt[2] dilation, SymInt groups, str activation, bool recompute) -> "
      "(Tensor, Tensor, Tensor, Tensor)");

  // An empty stride means: as kernel_size.
  m.def(
      "max_pool2d(Tensor input, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, "
      "SymInt[2] dilation, bool ceil_mode) -> Tensor");
  // The second result is where in its window each maximum stood: uint8, or int32 for windows of
  // more than 256 elements.
  m.def(
      "max_pool2d_with_offsets(Tensor input, SymInt[2] kernel_size, SymInt[2] stride, "
      "SymInt[2] padding, SymInt[2] dilation, bool ceil_mode) -> (Tensor, Tensor)");
  // The second result is torch's: int64, h * W + w.
  m.def(
      "max_pool2d_with_indices(Tensor input, SymInt[2] kernel_size, SymInt[2] stride, "
      "SymInt[2] padding, SymInt[2] dilation, bool ceil_mode) -> (Tensor, Tensor)");
  m.def(
      "max_pool2d_backward(Tensor grad, Tensor index, SymInt[] input_size, SymInt[2] kernel_size, "
      "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, bool ceil_mode, "
      "bool channels_last) -> Tensor");
  m.def(
      "avg_pool2d(Tensor input, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, "
      "bool ceil_mode, bool count_include_pad, int? divisor_override) -> Tensor");
  m.def(
      "avg_pool2d_backward(Tensor grad, SymInt[] input_size, SymInt[2] kernel_size, "
      "SymInt[2] stride, SymInt[2] padding, bool ceil_mode, bool count_include_pad, "
      "int? divisor_override, bool channels_last) -> Tensor");
  m.def("adaptive_avg_pool2d(Tensor input, SymInt[2] output_size) -> Tensor");
  m.def(
      "adaptive_avg_pool2d_backward(Tensor grad, SymInt[] input_size, bool channels_last) -> "
      "Tensor");

  // activation(batch_norm(input) + residual). Returns output, mean and biased variance (float32;
  // float64 for float64).
  m.def(
      "batch_norm_training(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, "
      "float eps, str activation) -> (Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_inference(Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
      "Tensor? residual, float eps, str activation) -> Tensor");
  // Gradients of input, weight, bias and residual. Where there is an activation, its derivative is
  // read off `output` where that is given (relu, relu6 and leaky_relu allow it), else it comes from
  // the input, the weight, the bias and the residual.
  m.def(
      "batch_norm_backward(Tensor grad, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor var, Tensor? residual, Tensor? output, bool training, float eps, str activation, "
      "bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)");
}
