// Autograd of a convolution with BatchNorm, a residual and an activation behind it.
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include "torch/activation.h"
#include "torch/autograd_batch_norm.h"
#include "torch/geometry.h"
#include "torch/history.h"
#include "torch/launch.h"
#include "torch/node.h"
#include "torch/ops.h"

namespace fastconv {
namespace {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;

// One kernel where no derivative is asked for; otherwise a convolution, whose result is kept for
// backward, one pass over it, and a pooling.
Tensor conv_bn_act(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& mean, const OptionalTensor& var,
                   const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                   const OptionalTensor& residual, double eps, SymIntArrayRef stride,
                   SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups,
                   std::string_view activation, SymIntArrayRef pool_kernel,
                   SymIntArrayRef pool_stride, SymIntArrayRef pool_padding, bool keep_filter) {
  const bool differentiate =
      torch::autograd::compute_requires_grad(input, weight, bias, bn_weight, bn_bias, residual) ||
      any_tangent(input, weight, bias, bn_weight, bn_bias, residual);
  if (!differentiate) {
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::conv_bn_act(input, weight, bias, mean, var, bn_weight, bn_bias, residual, eps,
                            stride, padding, dilation, groups, activation, pool_kernel, pool_stride,
                            pool_padding, keep_filter);
  }
  if (input.dim() == 3) {
    return ops::conv_bn_act(input.unsqueeze(0), weight, bias, mean, var, bn_weight, bn_bias,
                            residual ? OptionalTensor(residual->unsqueeze(0)) : residual, eps,
                            stride, padding, dilation, groups, activation, pool_kernel, pool_stride,
                            pool_padding, keep_filter)
        .squeeze(0);
  }
  const Tensor y = ops::conv2d(input, weight, bias, stride, padding, dilation, groups);
  check_residual("conv_bn_relu", residual, y.sym_sizes(), y);
  const Tensor z = mean ? ops::batch_norm_inference(y, bn_weight, bn_bias, *mean, *var, residual,
                                                    eps, activation)
                        : apply_activation(residual ? y + *residual : y, activation_of(activation));
  if (pool_kernel.empty()) return z;
  const SymInt one = 1;
  return ops::max_pool2d(z, pool_kernel, pool_stride, pool_padding, one, /*ceil_mode=*/false);
}

// Training that keeps the convolution's input and not its result, which backward computes again.
struct ConvBnRecomputeBackward : FastconvNode {
  // Edges: input, weight, bias, bn_weight, bn_bias, residual.
  Geometry geometry;
  SavedVariable input, weight;
  SavedTensor bias;
  SavedBatchNorm norm;

  void release_variables() override {
    input.reset_data();
    weight.reset_data();
    bias.reset();
    norm.reset();
  }
  std::string name() const override { return "FastconvConvBnRecomputeBackward"; }
  variable_list backward(const Tensor& grad) override {
    const Tensor x = input.unpack(), w = weight.unpack();
    const bool through = wants(0) || wants(1) || wants(2);
    variable_list of_norm = norm.backward(grad, geometry.fprop(x, w, bias.unpack()),
                                          {through, wants(3), wants(4), wants(5)});
    const Tensor dy = of_norm[0];
    variable_list out = {Tensor(), Tensor(), Tensor(), of_norm[1], of_norm[2], of_norm[3]};
    const bool filter_channels_last = suggests_channels_last(w);
    const bool channels_last = filter_channels_last || suggests_channels_last(x);
    if (wants(0)) out[0] = geometry.dgrad(dy, w, x.sym_sizes(), channels_last);
    if (wants(1)) out[1] = geometry.wgrad(dy, x, w.sym_sizes(), filter_channels_last);
    if (wants(2)) out[2] = ops::conv2d_bgrad(dy);
    return out;
  }
};

// The convolution and what follows it have a node each, so that backward frees the convolution's
// result before the convolution's own gradients are computed. Below them, one kernel less where a
// row computes the statistics with the convolution.
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bn_training(
    const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, const OptionalTensor& residual,
    double eps, SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
    SymInt groups, std::string_view activation, bool recompute) {
  check_batched("conv_bn_training", input);
  const bool own = is_own(input) && is_own(weight);
  if (!own || (aten_is_forced() && !recompute) ||
      any_tangent(input, weight, bias, bn_weight, bn_bias, residual)) {
    const Tensor y = ops::conv2d(input, weight, bias, stride, padding, dilation, groups);
    check_residual("conv_bn_relu", residual, y.sym_sizes(), y);
    const auto [out, mean, var] =
        ops::batch_norm_training(y, bn_weight, bn_bias, residual, eps, activation);
    return {out, y, mean, var};
  }
  const auto [out, y, mean, var] = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::conv_bn_training(input, weight, bias, bn_weight, bn_bias, residual, eps, stride,
                                 padding, dilation, groups, activation, recompute);
  }();
  if (!recompute) {
    set_conv2d_history(y, input, weight, bias, stride, padding, dilation, groups);
    set_batch_norm_history(out, y, bn_weight, bn_bias, mean, var, residual, /*training=*/true, eps,
                           activation);
  } else if (const auto node = make_node<ConvBnRecomputeBackward>(input, weight, bias, bn_weight,
                                                                  bn_bias, residual)) {
    node->geometry = Geometry(stride, padding, dilation, groups);
    node->input = save(input);
    node->weight = save(weight);
    node->bias.keep(bias);
    node->norm.keep(bn_weight, bn_bias, mean, var, residual, out, /*train=*/true, eps, activation);
    set_history(out, node);
  }
  return {out, y, mean, var};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastconv, Autograd, m) {
  m.impl("conv_bn_act", &conv_bn_act);
  m.impl("conv_bn_training", &conv_bn_training);
}

}  // namespace fastconv
