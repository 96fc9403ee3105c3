// Autocast, as torch casts its own: convolutions run in the lower precision; pooling and BatchNorm
// take what they are given.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "torch/ops.h"

namespace fastconv {
namespace {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;

template <at::DeviceType device>
struct Autocast {
  static Tensor cast(const Tensor& t) {
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), t, device);
  }
  static OptionalTensor cast(const OptionalTensor& t) {
    return t ? OptionalTensor(cast(*t)) : OptionalTensor();
  }

  static Tensor conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                       SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                       SymInt groups) {
    c10::impl::ExcludeDispatchKeyGuard off(
        at::autocast::get_autocast_dispatch_key_from_device_type(device));
    return ops::conv2d(cast(input), cast(weight), cast(bias), stride, padding, dilation, groups);
  }

  static Tensor conv_bn_act(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& mean, const OptionalTensor& var,
                            const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                            const OptionalTensor& residual, double eps, SymIntArrayRef stride,
                            SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups,
                            std::string_view activation, SymIntArrayRef pool_kernel,
                            SymIntArrayRef pool_stride, SymIntArrayRef pool_padding,
                            bool keep_filter) {
    c10::impl::ExcludeDispatchKeyGuard off(
        at::autocast::get_autocast_dispatch_key_from_device_type(device));
    const Tensor filter = cast(weight);
    keep_filter = keep_filter && filter.is_same(weight);  // a copy does not live long
    return ops::conv_bn_act(cast(input), filter, cast(bias), mean, var, bn_weight, bn_bias,
                            cast(residual), eps, stride, padding, dilation, groups, activation,
                            pool_kernel, pool_stride, pool_padding, keep_filter);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bn_training(
      const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
      const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
      const OptionalTensor& residual, double eps, SymIntArrayRef stride, SymIntArrayRef padding,
      SymIntArrayRef dilation, SymInt groups, std::string_view activation, bool recompute) {
    c10::impl::ExcludeDispatchKeyGuard off(
        at::autocast::get_autocast_dispatch_key_from_device_type(device));
    return ops::conv_bn_training(cast(input), cast(weight), cast(bias), bn_weight, bn_bias,
                                 cast(residual), eps, stride, padding, dilation, groups, activation,
                                 recompute);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastconv, AutocastCPU, m) {
  m.impl("conv2d", &Autocast<at::kCPU>::conv2d);
  m.impl("conv_bn_act", &Autocast<at::kCPU>::conv_bn_act);
  m.impl("conv_bn_training", &Autocast<at::kCPU>::conv_bn_training);
}
TORCH_LIBRARY_IMPL(fastconv, AutocastCUDA, m) {
  m.impl("conv2d", &Autocast<at::kCUDA>::conv2d);
  m.impl("conv_bn_act", &Autocast<at::kCUDA>::conv_bn_act);
  m.impl("conv_bn_training", &Autocast<at::kCUDA>::conv_bn_training);
}

}  // namespace fastconv
