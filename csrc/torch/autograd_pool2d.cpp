// Autograd of the poolings. Each is linear in its input, max pooling given where the maxima stood.
#include <ATen/TensorOperators.h>
#include <ATen/ops/adaptive_avg_pool2d.h>
#include <ATen/ops/avg_pool2d.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/max_pool2d_with_indices.h>
#include <torch/library.h>

#include <functional>
#include <vector>

#include "torch/launch.h"
#include "torch/node.h"
#include "torch/ops.h"
#include "torch/window_offsets.h"

namespace fastconv {
namespace {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;

// Inputs that ATen serves, its own autograd included.
bool goes_to_aten(const char* op, const Tensor& input) {
  if (is_own(input) && !aten_is_forced()) return false;
  require_fallback_allowed(op, input);
  return true;
}

struct Window {
  std::vector<SymInt> kernel_size, stride, padding, dilation;
  bool ceil_mode = false;
  std::vector<SymInt> input_size;
  bool channels_last = false;

  Window() = default;
  Window(const Tensor& input, SymIntArrayRef k, SymIntArrayRef s, SymIntArrayRef p,
         SymIntArrayRef d, bool ceil)
      : kernel_size(k.vec()),
        stride(s.vec()),
        padding(p.vec()),
        dilation(d.vec()),
        ceil_mode(ceil),
        input_size(input.sym_sizes().vec()),
        channels_last(suggests_channels_last(input)) {}

  Tensor backward(const Tensor& grad, const Tensor& index) const {
    return ops::max_pool2d_backward(grad, index, input_size, kernel_size, stride, padding, dilation,
                                    ceil_mode, channels_last);
  }
  // The values of `source` (of the input's size) where the maxima stood.
  Tensor gather(const Tensor& source, const Tensor& index) const {
    const Pool2dSizes sizes =
        check_max_pool2d(source, kernel_size, stride, padding, dilation, ceil_mode);
    const Tensor flat = indices_from_offsets(index, source.size(-1), sizes);
    if (flat.numel() == 0) return source.new_zeros(flat.sizes());
    return at::gather(source.flatten(-2), -1, flat.flatten(-2)).view(flat.sizes());
  }
};

// ---- max ----

struct MaxPool2dBackward : FastconvNode {
  Window window;
  SavedVariable index;
  std::string name() const override { return "FastconvMaxPool2dBackward"; }
  void release_variables() override { index.reset_data(); }
  variable_list backward(const Tensor& grad) override {
    return {window.backward(grad, index.unpack())};
  }
};

struct MaxPool2dDoubleBackward : FastconvNode {
  Window window;
  SavedVariable index;
  std::string name() const override { return "FastconvMaxPool2dDoubleBackward"; }
  void release_variables() override { index.reset_data(); }
  variable_list backward(const Tensor& v) override { return {window.gather(v, index.unpack())}; }
};

// Runs `forward` (which returns output and index) and records what backward needs.
template <class Forward>
std::tuple<Tensor, Tensor> record_max_pool2d(const Tensor& input, const Window& window,
                                             const Forward& forward) {
  const auto node = make_node<MaxPool2dBackward>(input);
  auto [out, index] = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return forward();
  }();
  if (node) {
    node->window = window;
    node->index = save(index);
  }
  set_history(out, node);
  if (has_tangent(input)) {
    out._set_fw_grad(window.gather(input._fw_grad(0), index), 0, false);
  }
  return {out, index};
}

Tensor max_pool2d(const Tensor& input, SymIntArrayRef kernel_size, SymIntArrayRef stride,
                  SymIntArrayRef padding, SymIntArrayRef dilation, bool ceil_mode) {
  if (goes_to_aten("max_pool2d", input)) {
    return at::max_pool2d(input, C10_AS_INTARRAYREF_SLOW(kernel_size),
                          C10_AS_INTARRAYREF_SLOW(stride), C10_AS_INTARRAYREF_SLOW(padding),
                          C10_AS_INTARRAYREF_SLOW(dilation), ceil_mode);
  }
  if (!torch::autograd::compute_requires_grad(input) && !has_tangent(input)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode);
  }
  return std::get<0>(
      ops::max_pool2d_with_offsets(input, kernel_size, stride, padding, dilation, ceil_mode));
}

std::tuple<Tensor, Tensor> max_pool2d_with_offsets(const Tensor& input, SymIntArrayRef kernel_size,
                                                   SymIntArrayRef stride, SymIntArrayRef padding,
                                                   SymIntArrayRef dilation, bool ceil_mode) {
  const Window window(input, kernel_size, stride, padding, dilation, ceil_mode);
  return record_max_pool2d(input, window, [&] {
    return ops::max_pool2d_with_offsets(input, kernel_size, stride, padding, dilation, ceil_mode);
  });
}

std::tuple<Tensor, Tensor> max_pool2d_with_indices(const Tensor& input, SymIntArrayRef kernel_size,
                                                   SymIntArrayRef stride, SymIntArrayRef padding,
                                                   SymIntArrayRef dilation, bool ceil_mode) {
  if (goes_to_aten("max_pool2d", input)) {
    return at::max_pool2d_with_indices(
        input, C10_AS_INTARRAYREF_SLOW(kernel_size), C10_AS_INTARRAYREF_SLOW(stride),
        C10_AS_INTARRAYREF_SLOW(padding), C10_AS_INTARRAYREF_SLOW(dilation), ceil_mode);
  }
  const Window window(input, kernel_size, stride, padding, dilation, ceil_mode);
  return record_max_pool2d(input, window, [&] {
    return ops::max_pool2d_with_indices(input, kernel_size, stride, padding, dilation, ceil_mode);
  });
}

Tensor max_pool2d_backward(const Tensor& grad, const Tensor& index, SymIntArrayRef input_size,
                           SymIntArrayRef kernel_size, SymIntArrayRef stride,
                           SymIntArrayRef padding, SymIntArrayRef dilation, bool ceil_mode,
                           bool channels_last) {
  Window window(grad, kernel_size, stride, padding, dilation, ceil_mode);
  window.input_size = input_size.vec();
  window.channels_last = channels_last;
  const auto node = make_node<MaxPool2dDoubleBackward>(grad);
  if (node) {
    node->window = window;
    node->index = save(index);
  }
  const Tensor out = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return window.backward(grad, index);
  }();
  set_history(out, node);
  if (has_tangent(grad)) out._set_fw_grad(window.backward(grad._fw_grad(0), index), 0, false);
  return out;
}

// ---- average ----

// The backward of a linear operation, or of its backward: one function of the gradient.
struct LinearNode : FastconvNode {
  std::function<Tensor(const Tensor&)> transpose;
  std::string name() const override { return "FastconvAvgPool2dBackward"; }
  variable_list backward(const Tensor& grad) override { return {transpose(grad)}; }
};

template <class Forward, class Transpose>
Tensor record_linear(const Tensor& input, const Forward& forward, const Transpose& transpose) {
  const auto node = make_node<LinearNode>(input);
  if (node) node->transpose = transpose;
  const Tensor out = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return forward(input);
  }();
  set_history(out, node);
  if (has_tangent(input)) out._set_fw_grad(forward(input._fw_grad(0)), 0, false);
  return out;
}

// avg_pool2d and its transpose with every argument but the tensor fixed.
struct AvgPool2d {
  std::vector<SymInt> input_size, kernel_size, stride, padding;
  bool ceil_mode, count_include_pad;
  std::optional<int64_t> divisor_override;
  bool channels_last;

  Tensor forward(const Tensor& input) const {
    return ops::avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad,
                           divisor_override);
  }
  Tensor backward(const Tensor& grad) const {
    return ops::avg_pool2d_backward(grad, input_size, kernel_size, stride, padding, ceil_mode,
                                    count_include_pad, divisor_override, channels_last);
  }
};

Tensor avg_pool2d(const Tensor& input, SymIntArrayRef kernel_size, SymIntArrayRef stride,
                  SymIntArrayRef padding, bool ceil_mode, bool count_include_pad,
                  std::optional<int64_t> divisor_override) {
  if (goes_to_aten("avg_pool2d", input)) {
    return at::avg_pool2d(input, C10_AS_INTARRAYREF_SLOW(kernel_size),
                          C10_AS_INTARRAYREF_SLOW(stride), C10_AS_INTARRAYREF_SLOW(padding),
                          ceil_mode, count_include_pad, divisor_override);
  }
  const AvgPool2d pool{input.sym_sizes().vec(),
                       kernel_size.vec(),
                       stride.vec(),
                       padding.vec(),
                       ceil_mode,
                       count_include_pad,
                       divisor_override,
                       suggests_channels_last(input)};
  return record_linear(
      input, [pool](const Tensor& x) { return pool.forward(x); },
      [pool](const Tensor& g) { return pool.backward(g); });
}

Tensor avg_pool2d_backward(const Tensor& grad, SymIntArrayRef input_size,
                           SymIntArrayRef kernel_size, SymIntArrayRef stride,
                           SymIntArrayRef padding, bool ceil_mode, bool count_include_pad,
                           std::optional<int64_t> divisor_override, bool channels_last) {
  const AvgPool2d pool{input_size.vec(), kernel_size.vec(), stride.vec(),     padding.vec(),
                       ceil_mode,        count_include_pad, divisor_override, channels_last};
  return record_linear(
      grad, [pool](const Tensor& g) { return pool.backward(g); },
      [pool](const Tensor& v) { return pool.forward(v); });
}

Tensor adaptive_avg_pool2d(const Tensor& input, SymIntArrayRef output_size) {
  if (goes_to_aten("adaptive_avg_pool2d", input)) {
    return at::adaptive_avg_pool2d_symint(input, output_size);
  }
  return record_linear(
      input,
      [size = output_size.vec()](const Tensor& x) { return ops::adaptive_avg_pool2d(x, size); },
      [size = input.sym_sizes().vec(), format = suggests_channels_last(input)](const Tensor& g) {
        return ops::adaptive_avg_pool2d_backward(g, size, format);
      });
}

Tensor adaptive_avg_pool2d_backward(const Tensor& grad, SymIntArrayRef input_size,
                                    bool channels_last) {
  const SymIntArrayRef size = grad.sym_sizes();
  return record_linear(
      grad,
      [input_size = input_size.vec(), channels_last](const Tensor& g) {
        return ops::adaptive_avg_pool2d_backward(g, input_size, channels_last);
      },
      [size = size.slice(size.size() - 2).vec()](const Tensor& v) {
        return ops::adaptive_avg_pool2d(v, size);
      });
}

}  // namespace

TORCH_LIBRARY_IMPL(fastconv, Autograd, m) {
  m.impl("max_pool2d", &max_pool2d);
  m.impl("max_pool2d_with_offsets", &max_pool2d_with_offsets);
  m.impl("max_pool2d_with_indices", &max_pool2d_with_indices);
  m.impl("max_pool2d_backward", &max_pool2d_backward);
  m.impl("avg_pool2d", &avg_pool2d);
  m.impl("avg_pool2d_backward", &avg_pool2d_backward);
  m.impl("adaptive_avg_pool2d", &adaptive_avg_pool2d);
  m.impl("adaptive_avg_pool2d_backward", &adaptive_avg_pool2d_backward);
}

}  // namespace fastconv
