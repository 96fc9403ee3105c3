// The convolution operators on real tensors, CPU and CUDA alike: check, lay out, choose a row, run.
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "torch/arguments.h"
#include "torch/autotune.h"
#include "torch/conv2d.h"
#include "torch/explain.h"
#include "torch/launch.h"
#include "torch/packed_filters.h"
#include "torch/precision.h"

namespace fastconv {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;

Conv2dProblem make_problem(at::IntArrayRef input_size, at::IntArrayRef weight_size,
                           SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                           const SymInt& groups, const Tensor& like, bool channels_last,
                           bool filter_channels_last) {
  Conv2dProblem p;
  p.N = input_size[0];
  p.C = input_size[1];
  p.H = input_size[2];
  p.W = input_size[3];
  p.K = weight_size[0];
  p.R = weight_size[2];
  p.S = weight_size[3];
  p.stride_h = stride.front().expect_int();
  p.stride_w = stride.back().expect_int();
  p.pad_h = padding.front().expect_int();
  p.pad_w = padding.back().expect_int();
  p.dil_h = dilation.front().expect_int();
  p.dil_w = dilation.back().expect_int();
  p.G = groups.expect_int();
  p.dtype = dtype_of(like);
  p.layout = layout_of(channels_last);
  p.filter_layout = layout_of(filter_channels_last);
  p.tf32 = may_use_tf32(like);
  p.winograd = largest_winograd_tile(current_selection(), /*fused_inference=*/false);
  return p;
}

const Conv2dKernel* pick_conv2d(Direction direction, const Conv2dProblem& p, const Tensor& like) {
  if (const Conv2dKernel* row = measured_row(direction, p, like)) return row;
  return pick(kernel_table().conv2d, "conv2d", direction, p, like);
}

void launch_conv2d(const Conv2dKernel& row, const Conv2dProblem& p, const Conv2dArgs& args,
                   const Tensor& like) {
  launch(settled_row(row, p, args, like), p, args, like);
}

Tensor empty_output(const Conv2dProblem& p, const Tensor& like, bool channels_last) {
  return at::empty({p.N, p.K, p.P(), p.Q()}, like.options(), memory_format(channels_last));
}

// `t` as the row reads it: packed in the layout, and where the row asks for that, aligned.
Tensor packed_for(const Conv2dKernel& row, const Tensor& t, bool channels_last) {
  const auto format = memory_format(channels_last);
  Tensor packed = t.contiguous(format);
  const auto address = reinterpret_cast<uintptr_t>(packed.const_data_ptr());
  return row.aligned && address % 16 != 0 ? packed.clone(format) : packed;
}

void run_forward(const Conv2dKernel& row, const Conv2dProblem& p, const Tensor& input,
                 const Tensor& weight, const EpilogueTensors& epilogue, const Tensor& out) {
  if (out.numel() == 0) return;
  const bool channels_last = p.layout == Layout::kNHWC;
  const Tensor x = packed_for(row, input, channels_last);
  const Tensor w = packed_for(row, weight, p.filter_layout == Layout::kNHWC);
  const auto& [scale, shift, residual, mean, var] = epilogue;
  const Tensor z = residual.defined() ? packed_for(row, residual, channels_last) : residual;
  const auto read = [](const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; };
  const auto write = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; };
  Conv2dArgs args;
  args.input = x.const_data_ptr();
  args.filter = w.const_data_ptr();
  args.scale = read(scale);
  args.shift = read(shift);
  args.residual = read(z);
  args.out = out.mutable_data_ptr();
  args.mean_out = write(mean);
  args.var_out = write(var);
  Conv2dProblem problem = p;
  problem.filter_kept = false;
  const Conv2dKernel& settled = settled_row(row, problem, args, out);
  const Tensor kept = p.filter_kept ? kept_filter(settled, problem, weight, out) : Tensor();
  args.packed = read(kept);
  problem.filter_kept = kept.defined();
  launch(settled, problem, args, out);
}

namespace {

Tensor conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
              SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
              SymInt groups) {
  if (!is_own(input) || !is_own(weight) || aten_is_forced()) {
    require_fallback_allowed("conv2d", is_own(input) ? weight : input);
    return at::conv2d_symint(input, weight, bias, stride, padding, dilation, groups);
  }
  check_conv2d_ranks(input, weight);
  if (input.dim() == 3) {
    return conv2d(input.unsqueeze(0), weight, bias, stride, padding, dilation, groups).squeeze(0);
  }
  check_conv2d(input, weight, bias, stride, padding, dilation, groups);
  const bool filter_channels_last = suggests_channels_last(weight);
  const bool channels_last = filter_channels_last || suggests_channels_last(input);
  Conv2dProblem p = make_problem(input.sizes(), weight.sizes(), stride, padding, dilation, groups,
                                 input, channels_last, filter_channels_last);
  p.epilogue.shift = bias.has_value();
  const Conv2dKernel* row = pick_conv2d(Direction::kFprop, p, input);
  if (row == nullptr) {
    return at::conv2d_symint(input, weight, bias, stride, padding, dilation, groups);
  }
  Tensor out = empty_output(p, input, channels_last);
  run_forward(*row, p, input, weight, {.shift = bias ? as_accumulator(*bias) : Tensor()}, out);
  return out;
}

// ATen's backward, for where no row serves: one gradient, chosen by `mask`.
Tensor aten_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                     SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                     const SymInt& groups, std::array<bool, 3> mask) {
  const std::vector<SymInt> no_output_padding(2, 0);
  auto [dx, dw, db] =
      at::convolution_backward_symint(grad, input, weight, std::nullopt, stride, padding, dilation,
                                      /*transposed=*/false, no_output_padding, groups, mask);
  return mask[0] ? dx : dw;
}

// Gradients of the wrong size would be read out of bounds: compare with what forward gave.
void check_grad_size(const Tensor& grad, const Conv2dProblem& p, const char* op) {
  const std::array<int64_t, 4> expected = {p.N, p.K, p.P(), p.Q()};
  TORCH_CHECK(grad.sizes() == at::IntArrayRef(expected), op, ": expected a gradient of size ",
              at::IntArrayRef(expected), ", but got ", grad.sizes());
}

void check_gradient_arguments(const char* op, SymIntArrayRef sizes, const Tensor& grad,
                              const Tensor& other, SymIntArrayRef input_size,
                              SymIntArrayRef weight_size, SymIntArrayRef stride,
                              SymIntArrayRef padding, SymIntArrayRef dilation,
                              const SymInt& groups) {
  TORCH_CHECK(sizes.size() == 4 && grad.dim() == 4 && other.dim() == 4, op,
              ": expected 4-dimensional tensors and a size of 4 values, but got ", grad.sizes(),
              ", ", other.sizes(), " and ", sizes);
  TORCH_CHECK(grad.device() == other.device(), op, ": expected one device, but found ",
              grad.device(), " and ", other.device());
  TORCH_CHECK(grad.scalar_type() == other.scalar_type(), op, ": expected one dtype, but got ",
              grad.scalar_type(), " and ", other.scalar_type());
  // Shapes alone: the forward's own checks on meta tensors.
  const auto meta = grad.options().device(at::kMeta);
  check_conv2d(at::empty_symint(input_size, meta), at::empty_symint(weight_size, meta),
               std::nullopt, stride, padding, dilation, groups);
}

Tensor conv2d_dgrad(const Tensor& grad, const Tensor& weight, SymIntArrayRef input_size,
                    SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                    SymInt groups, bool channels_last) {
  check_gradient_arguments("conv2d_dgrad", input_size, grad, weight, input_size, weight.sym_sizes(),
                           stride, padding, dilation, groups);
  const auto input_ints = C10_AS_INTARRAYREF_SLOW(input_size);
  Tensor out = at::empty(input_ints, grad.options(), memory_format(channels_last));
  if (out.numel() == 0) return out;
  const bool filter_channels_last = suggests_channels_last(weight);
  const Conv2dProblem p = make_problem(input_ints, weight.sizes(), stride, padding, dilation,
                                       groups, grad, channels_last, filter_channels_last);
  check_grad_size(grad, p, "conv2d_dgrad");
  const Conv2dKernel* row = pick_conv2d(Direction::kDgrad, p, grad);
  if (row == nullptr) {
    return aten_backward(grad, out, weight, stride, padding, dilation, groups, {true, false, false})
        .contiguous(memory_format(channels_last));
  }
  const Tensor dy = packed_for(*row, grad, channels_last);
  const Tensor w = packed_for(*row, weight, filter_channels_last);
  Conv2dArgs args;
  args.grad = dy.const_data_ptr();
  args.filter = w.const_data_ptr();
  args.out = out.mutable_data_ptr();
  launch_conv2d(*row, p, args, out);
  return out;
}

Tensor conv2d_wgrad(const Tensor& grad, const Tensor& input, SymIntArrayRef weight_size,
                    SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                    SymInt groups, bool channels_last) {
  check_gradient_arguments("conv2d_wgrad", weight_size, grad, input, input.sym_sizes(), weight_size,
                           stride, padding, dilation, groups);
  const auto weight_ints = C10_AS_INTARRAYREF_SLOW(weight_size);
  Tensor out = at::empty(weight_ints, grad.options(), memory_format(channels_last));
  if (out.numel() == 0) return out;
  if (grad.numel() == 0) return out.zero_();
  const bool activations_channels_last =
      suggests_channels_last(input) || suggests_channels_last(grad);
  const Conv2dProblem p = make_problem(input.sizes(), weight_ints, stride, padding, dilation,
                                       groups, grad, activations_channels_last, channels_last);
  check_grad_size(grad, p, "conv2d_wgrad");
  const Conv2dKernel* row = pick_conv2d(Direction::kWgrad, p, grad);
  if (row == nullptr) {
    return aten_backward(grad, input, out, stride, padding, dilation, groups, {false, true, false})
        .contiguous(memory_format(channels_last));
  }
  const Tensor dy = packed_for(*row, grad, activations_channels_last);
  const Tensor x = packed_for(*row, input, activations_channels_last);
  Conv2dArgs args;
  args.grad = dy.const_data_ptr();
  args.input = x.const_data_ptr();
  args.out = out.mutable_data_ptr();
  launch_conv2d(*row, p, args, out);
  return out;
}

Tensor conv2d_bgrad(const Tensor& grad) {
  TORCH_CHECK(grad.dim() == 4, "conv2d_bgrad: expected a 4-dimensional gradient, but got ",
              grad.sizes());
  if (grad.numel() == 0) return at::zeros({grad.size(1)}, grad.options());
  const bool channels_last = suggests_channels_last(grad);
  Conv2dProblem p;  // as if of a 1x1 convolution: only the output's side is read
  p.N = grad.size(0);
  p.K = grad.size(1);
  p.H = grad.size(2);
  p.W = grad.size(3);
  p.dtype = dtype_of(grad);
  p.layout = layout_of(channels_last);
  const Conv2dKernel* row = pick_conv2d(Direction::kBgrad, p, grad);
  if (row == nullptr) return at::sum(grad, {0, 2, 3});
  Tensor out = at::empty({p.K}, grad.options());
  const Tensor dy = packed_for(*row, grad, channels_last);
  Conv2dArgs args;
  args.grad = dy.const_data_ptr();
  args.out = out.mutable_data_ptr();
  launch_conv2d(*row, p, args, out);
  return out;
}

}  // namespace

Explanation explain_conv2d(Direction direction, const Tensor& input, const Tensor& weight,
                           const OptionalTensor& bias, SymIntArrayRef stride,
                           SymIntArrayRef padding, SymIntArrayRef dilation, const SymInt& groups) {
  Explanation explanation;
  explanation.chosen = "aten";
  for (const Tensor* t : {&input, &weight}) {
    if (is_own(*t)) continue;
    explanation.reason = std::string("no kernel takes ") + c10::toString(t->scalar_type()) +
                         " on " + t->device().str();
    return explanation;
  }
  check_conv2d_ranks(input, weight);
  if (input.dim() == 3) {
    return explain_conv2d(direction, input.unsqueeze(0), weight, bias, stride, padding, dilation,
                          groups);
  }
  check_conv2d(input, weight, bias, stride, padding, dilation, groups);
  const bool filter_channels_last = suggests_channels_last(weight);
  Conv2dProblem p =
      make_problem(input.sizes(), weight.sizes(), stride, padding, dilation, groups, input,
                   filter_channels_last || suggests_channels_last(input), filter_channels_last);
  p.epilogue.shift = bias.has_value() && direction == Direction::kFprop;
  const Device device = machine_of(input);
  const Conv2dKernel* row = choose(kernel_table().conv2d, "conv2d", direction, p, device,
                                   current_selection(), &explanation.candidates);
  if (const Conv2dKernel* measured = measured_row(direction, p, input)) {
    explanation.chosen = measured->name;
    explanation.reason = "the fastest when it was measured";
  } else if (row != nullptr) {
    explanation.chosen = row->name;
  } else {
    explanation.reason =
        aten_is_forced() ? "backend aten is forced" : why_none(explanation.candidates, device);
  }
  return explanation;
}

// CompositeExplicitAutograd serves every device without a kernel of ours.
TORCH_LIBRARY_IMPL(fastconv, CompositeExplicitAutograd, m) { m.impl("conv2d", &conv2d); }
#define FASTCONV_CONV2D_IMPLS(m)         \
  m.impl("conv2d", &conv2d);             \
  m.impl("conv2d_dgrad", &conv2d_dgrad); \
  m.impl("conv2d_wgrad", &conv2d_wgrad); \
  m.impl("conv2d_bgrad", &conv2d_bgrad);
TORCH_LIBRARY_IMPL(fastconv, CPU, m){FASTCONV_CONV2D_IMPLS(m)} TORCH_LIBRARY_IMPL(fastconv, CUDA,
                                                                                  m) {
  FASTCONV_CONV2D_IMPLS(m)
}

}  // namespace fastconv
