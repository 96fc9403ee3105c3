// Autograd of the convolutions. The three directions are each other's derivatives:
//   output = fprop(input, filter);  d input = dgrad(grad, filter);  d filter = wgrad(grad, input).
// All three are bilinear, so that double backward and forward mode need no further formula.
#include <ATen/TensorOperators.h>
#include <ATen/ops/conv2d.h>
#include <torch/library.h>

#include <vector>

#include "torch/activation.h"
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

// The tangent of a bilinear f(a, b): f(a', b) + f(a, b').
template <class F>
Tensor bilinear_tangent(const Tensor& a, const Tensor& b, const F& f) {
  Tensor tangent;
  if (has_tangent(a)) tangent = f(a._fw_grad(0), b._fw_primal(0));
  if (has_tangent(b)) {
    const Tensor other = f(a._fw_primal(0), b._fw_grad(0));
    tangent = tangent.defined() ? tangent + other : other;
  }
  return tangent;
}

void set_tangent(const Tensor& out, const Tensor& tangent) {
  if (tangent.defined()) out._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
}

Tensor per_filter(const Tensor& values) { return values.reshape({1, -1, 1, 1}); }

// What each of the three nodes keeps: two factors, their sizes and formats.
struct BilinearNode : FastconvNode {
  Geometry geometry;
  SavedVariable a, b;
  std::vector<SymInt> a_size, b_size;
  bool a_channels_last = false, b_channels_last = false;

  void keep(const Geometry& g, const Tensor& first, const Tensor& second) {
    geometry = g;
    // Each factor is needed for the other's gradient alone.
    if (task_needs(1)) a = save(first);
    if (task_needs(0)) b = save(second);
    a_size = first.sym_sizes().vec();
    b_size = second.sym_sizes().vec();
    a_channels_last = suggests_channels_last(first);
    b_channels_last = suggests_channels_last(second);
  }
  void release_variables() override {
    a.reset_data();
    b.reset_data();
  }

 private:
  bool task_needs(size_t edge) const { return next_edge(edge).is_valid(); }
};

struct Conv2dBackward : BilinearNode {  // a = input, b = weight; third edge: bias
  std::string name() const override { return "FastconvConv2dBackward"; }
  variable_list backward(const Tensor& grad) override {
    variable_list out(num_outputs());
    const bool channels_last = a_channels_last || b_channels_last;
    if (wants(0)) out[0] = geometry.dgrad(grad, b.unpack(), a_size, channels_last);
    if (wants(1)) out[1] = geometry.wgrad(grad, a.unpack(), b_size, b_channels_last);
    if (wants(2)) out[2] = ops::conv2d_bgrad(grad);
    return out;
  }
};

struct Conv2dDgradBackward : BilinearNode {  // a = grad, b = weight
  std::string name() const override { return "FastconvConv2dDgradBackward"; }
  variable_list backward(const Tensor& v) override {
    variable_list out(num_outputs());
    if (wants(0)) out[0] = geometry.fprop(v, b.unpack());
    if (wants(1)) out[1] = geometry.wgrad(a.unpack(), v, b_size, b_channels_last);
    return out;
  }
};

struct Conv2dWgradBackward : BilinearNode {  // a = grad, b = input
  std::string name() const override { return "FastconvConv2dWgradBackward"; }
  variable_list backward(const Tensor& v) override {
    variable_list out(num_outputs());
    if (wants(0)) out[0] = geometry.fprop(b.unpack(), v);
    if (wants(1)) out[1] = geometry.dgrad(a.unpack(), v, b_size, b_channels_last);
    return out;
  }
};

struct Conv2dBgradBackward : FastconvNode {
  std::vector<SymInt> size;
  std::string name() const override { return "FastconvConv2dBgradBackward"; }
  variable_list backward(const Tensor& v) override { return {per_filter(v).expand_symint(size)}; }
};

Tensor conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
              SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
              SymInt groups) {
  if (!is_own(input) || !is_own(weight) || aten_is_forced()) {
    require_fallback_allowed("conv2d", is_own(input) ? weight : input);
    return at::conv2d_symint(input, weight, bias, stride, padding, dilation, groups);
  }
  check_conv2d_ranks(input, weight);
  if (input.dim() == 3) {
    return ops::conv2d(input.unsqueeze(0), weight, bias, stride, padding, dilation, groups)
        .squeeze(0);
  }
  const bool tangents = any_tangent(input, weight, bias);
  const Tensor out = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::conv2d(input, weight, bias, stride, padding, dilation, groups);
  }();
  set_conv2d_history(out, input, weight, bias, stride, padding, dilation, groups);
  if (tangents) {
    const Geometry geometry(stride, padding, dilation, groups);
    Tensor tangent = bilinear_tangent(
        input, weight, [&](const Tensor& x, const Tensor& w) { return geometry.fprop(x, w); });
    if (has_tangent(bias)) {
      const Tensor shift = per_filter(bias->_fw_grad(0));
      tangent = tangent.defined() ? tangent + shift : shift.expand_symint(out.sym_sizes());
    }
    set_tangent(out, tangent);
  }
  return out;
}

Tensor conv2d_dgrad(const Tensor& grad, const Tensor& weight, SymIntArrayRef input_size,
                    SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                    SymInt groups, bool channels_last) {
  const Geometry geometry(stride, padding, dilation, groups);
  const auto node = make_node<Conv2dDgradBackward>(grad, weight);
  if (node) node->keep(geometry, grad, weight);
  const auto run = [&](const Tensor& g, const Tensor& w) {
    return geometry.dgrad(g, w, input_size, channels_last);
  };
  const Tensor out = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return run(grad, weight);
  }();
  set_history(out, node);
  set_tangent(out, bilinear_tangent(grad, weight, run));
  return out;
}

Tensor conv2d_wgrad(const Tensor& grad, const Tensor& input, SymIntArrayRef weight_size,
                    SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                    SymInt groups, bool channels_last) {
  const Geometry geometry(stride, padding, dilation, groups);
  const auto node = make_node<Conv2dWgradBackward>(grad, input);
  if (node) node->keep(geometry, grad, input);
  const auto run = [&](const Tensor& g, const Tensor& x) {
    return geometry.wgrad(g, x, weight_size, channels_last);
  };
  const Tensor out = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return run(grad, input);
  }();
  set_history(out, node);
  set_tangent(out, bilinear_tangent(grad, input, run));
  return out;
}

Tensor conv2d_bgrad(const Tensor& grad) {
  const auto node = make_node<Conv2dBgradBackward>(grad);
  if (node) node->size = grad.sym_sizes().vec();
  const Tensor out = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::conv2d_bgrad(grad);
  }();
  set_history(out, node);
  if (has_tangent(grad)) set_tangent(out, ops::conv2d_bgrad(grad._fw_grad(0)));
  return out;
}

}  // namespace

void set_conv2d_history(const Tensor& out, const Tensor& input, const Tensor& weight,
                        const OptionalTensor& bias, SymIntArrayRef stride, SymIntArrayRef padding,
                        SymIntArrayRef dilation, const SymInt& groups) {
  const auto node = make_node<Conv2dBackward>(input, weight, bias);
  if (node) node->keep(Geometry(stride, padding, dilation, groups), input, weight);
  set_history(out, node);
}

TORCH_LIBRARY_IMPL(fastconv, Autograd, m) {
  m.impl("conv2d", &conv2d);
  m.impl("conv2d_dgrad", &conv2d_dgrad);
  m.impl("conv2d_wgrad", &conv2d_wgrad);
  m.impl("conv2d_bgrad", &conv2d_bgrad);
}

}  // namespace fastconv
