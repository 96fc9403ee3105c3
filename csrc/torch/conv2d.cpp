// The convolution operators on real tensors, CPU and CUDA alike: check, lay out, choose a row, run.
#include <ATen/TensorOperators.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>

#include "torch/activation.h"
#include "torch/arguments.h"
#include "torch/autotune.h"
#include "torch/explain.h"
#include "torch/launch.h"
#include "torch/ops.h"
#include "torch/precision.h"

namespace fastconv {
namespace {

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

// Runs a forward row whose epilogue is at most a bias, an activation, a pooling and statistics.
void run_forward(const Conv2dKernel& row, const Conv2dProblem& p, const Tensor& input,
                 const Tensor& weight, const OptionalTensor& bias, const Tensor& out,
                 const Tensor& mean = {}, const Tensor& var = {}) {
  if (out.numel() == 0) return;
  const Tensor x = packed_for(row, input, p.layout == Layout::kNHWC);
  const Tensor w = packed_for(row, weight, p.filter_layout == Layout::kNHWC);
  const Tensor shift = bias ? as_accumulator(*bias) : Tensor();
  Conv2dArgs args;
  args.input = x.const_data_ptr();
  args.filter = w.const_data_ptr();
  args.shift = bias ? shift.const_data_ptr() : nullptr;
  args.out = out.mutable_data_ptr();
  args.mean_out = mean.defined() ? mean.mutable_data_ptr() : nullptr;
  args.var_out = var.defined() ? var.mutable_data_ptr() : nullptr;
  launch_conv2d(row, p, args, out);
}

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
  run_forward(*row, p, input, weight, bias, out);
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

// BatchNorm of fixed statistics as one factor and one summand a filter, the bias folded in.
std::pair<Tensor, Tensor> fold_batch_norm(const OptionalTensor& bias, const Tensor& mean,
                                          const Tensor& var, const OptionalTensor& bn_weight,
                                          const OptionalTensor& bn_bias, double eps) {
  Tensor scale = at::rsqrt(as_accumulator(var) + eps);
  if (bn_weight) scale = scale * as_accumulator(*bn_weight);
  Tensor centre = as_accumulator(mean);
  if (bias) centre = centre - as_accumulator(*bias);
  Tensor shift = -centre * scale;
  if (bn_bias) shift = shift + as_accumulator(*bn_bias);
  return {scale, shift};
}

Tensor conv_bn_act(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                   const Tensor& mean, const Tensor& var, const OptionalTensor& bn_weight,
                   const OptionalTensor& bn_bias, const OptionalTensor& residual, double eps,
                   SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                   SymInt groups, std::string_view activation) {
  const Activation act = activation_of(activation);
  const auto aten = [&] {
    Tensor y = at::conv2d_symint(input, weight, bias, stride, padding, dilation, groups);
    y = at::batch_norm(y, bn_weight, bn_bias, mean, var, /*training=*/false, /*momentum=*/0.0, eps,
                       /*cudnn_enabled=*/true);
    return apply_activation(residual ? y + *residual : y, act);
  };
  if (!is_own(input) || !is_own(weight) || aten_is_forced()) {
    require_fallback_allowed("conv_bn_act", is_own(input) ? weight : input);
    return aten();
  }
  check_conv2d_ranks(input, weight);
  if (input.dim() == 3) {
    return conv_bn_act(input.unsqueeze(0), weight, bias, mean, var, bn_weight, bn_bias,
                       residual ? OptionalTensor(residual->unsqueeze(0)) : residual, eps, stride,
                       padding, dilation, groups, activation)
        .squeeze(0);
  }
  const Conv2dSizes sizes = check_conv2d(input, weight, bias, stride, padding, dilation, groups);
  check_folded(input, sizes, mean, var, bn_weight, bn_bias, residual);
  const bool filter_channels_last = suggests_channels_last(weight);
  const bool channels_last = filter_channels_last || suggests_channels_last(input);
  Conv2dProblem p = make_problem(input.sizes(), weight.sizes(), stride, padding, dilation, groups,
                                 input, channels_last, filter_channels_last);
  p.winograd = largest_winograd_tile(current_selection(), /*fused_inference=*/true);
  p.epilogue.scale = p.epilogue.shift = true;
  p.epilogue.residual = residual.has_value();
  p.epilogue.activation = act;
  const Conv2dKernel* row = pick_conv2d(Direction::kFprop, p, input);
  if (row == nullptr) return aten();
  Tensor out = empty_output(p, input, channels_last);
  if (out.numel() == 0) return out;
  const Tensor x = packed_for(*row, input, channels_last);
  const Tensor w = packed_for(*row, weight, filter_channels_last);
  const Tensor z = residual ? packed_for(*row, *residual, channels_last) : Tensor();
  const auto [scale, shift] = fold_batch_norm(bias, mean, var, bn_weight, bn_bias, eps);
  Conv2dArgs args;
  args.input = x.const_data_ptr();
  args.filter = w.const_data_ptr();
  args.scale = scale.const_data_ptr();
  args.shift = shift.const_data_ptr();
  args.residual = residual ? z.const_data_ptr() : nullptr;
  args.out = out.mutable_data_ptr();
  launch_conv2d(*row, p, args, out);
  return out;
}

// The cheapest row of an operation that has convolution as its first part, or null. With `forced`
// it is the one to run, whatever the parts would take: the user has named it.
struct FusedChoice {
  const Conv2dKernel* row;
  bool forced;
};
FusedChoice choose_fused(const char* op, const Conv2dProblem& fused, const Device& device) {
  const Selection& selection = current_selection();
  std::vector<Candidate> candidates;
  const Conv2dKernel* row = choose(kernel_table().conv2d, op, Direction::kFprop, fused, device,
                                   selection, selection.kernel.empty() ? nullptr : &candidates);
  for (const Candidate& c : candidates) {
    if (c.name != selection.kernel) continue;
    if (row == nullptr) {
      require_fallback_allowed(std::string(op) + " fprop", describe(candidates),
                               /*kernel_forced=*/true);
    }
    return {row, true};
  }
  return {row, false};
}

// The row that convolves, activates and pools in one kernel, or null: none can, or a convolution
// and a pooling are expected to take less time (a large convolution, on tensor cores).
const Conv2dKernel* pick_pooled(const Conv2dProblem& fused, const Conv2dProblem& conv,
                                const Pool2dProblem& pool, const Tensor& like) {
  const KernelTable& table = kernel_table();
  const Selection& selection = current_selection();
  const Device device = machine_of(like);
  const auto [row, forced] = choose_fused("conv2d_max_pool2d", fused, device);
  if (forced) return row;
  if (row == nullptr) return nullptr;
  const Conv2dKernel* first =
      choose(table.conv2d, "conv2d", Direction::kFprop, conv, device, selection);
  const Pool2dKernel* second =
      choose(table.pool2d, "max_pool2d", Direction::kFprop, pool, device, selection);
  if (first == nullptr || second == nullptr) return row;
  constexpr double kSecondOperator = 5;  // us that a further operator takes the host
  const double apart = first->cost(conv, device) + second->cost(pool, device) + kSecondOperator;
  return row->cost(fused, device) <= apart ? row : nullptr;
}

Tensor conv2d_act_max_pool2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                             SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                             SymInt groups, std::string_view activation, SymIntArrayRef pool_kernel,
                             SymIntArrayRef pool_stride, SymIntArrayRef pool_padding) {
  const Activation act = activation_of(activation);
  const SymInt one = 1;
  const auto pooled = [&](const Tensor& y) {
    return ops::max_pool2d(y, pool_kernel, pool_stride, pool_padding, one, /*ceil_mode=*/false);
  };
  const auto aten_conv2d = [&] {
    return apply_activation(
        at::conv2d_symint(input, weight, bias, stride, padding, dilation, groups), act);
  };
  if (!is_own(input) || !is_own(weight) || aten_is_forced()) {
    require_fallback_allowed("conv2d_max_pool2d", is_own(input) ? weight : input);
    return pooled(aten_conv2d());
  }
  check_conv2d_ranks(input, weight);
  if (input.dim() == 3) {
    return conv2d_act_max_pool2d(input.unsqueeze(0), weight, bias, stride, padding, dilation,
                                 groups, activation, pool_kernel, pool_stride, pool_padding)
        .squeeze(0);
  }
  const Conv2dSizes sizes = check_conv2d(input, weight, bias, stride, padding, dilation, groups);
  const Pool2dSizes window = check_max_pool2d(SymIntArrayRef(sizes.output.data(), 4), pool_kernel,
                                              pool_stride, pool_padding, one, /*ceil_mode=*/false);
  const bool filter_channels_last = suggests_channels_last(weight);
  const bool channels_last = filter_channels_last || suggests_channels_last(input);
  Conv2dProblem p = make_problem(input.sizes(), weight.sizes(), stride, padding, dilation, groups,
                                 input, channels_last, filter_channels_last);
  p.epilogue.shift = bias.has_value();
  p.epilogue.activation = act;
  const auto output_size = C10_AS_INTARRAYREF_SLOW(window.output);
  Pool2dProblem pool =
      pool2d_problem(PoolKind::kMax, {p.N, p.K, p.P(), p.Q()}, output_size, p.dtype, channels_last);
  set_window(pool, window);
  Conv2dProblem fused = p;
  fused.epilogue.pool = {pool.R, pool.S, pool.stride_h, pool.stride_w, pool.pad_h, pool.pad_w};
  if (const Conv2dKernel* row = pick_pooled(fused, p, pool, input)) {
    Tensor out = at::empty(output_size, input.options(), memory_format(channels_last));
    run_forward(*row, fused, input, weight, bias, out);
    return out;
  }
  const Conv2dKernel* row = pick_conv2d(Direction::kFprop, p, input);
  if (row == nullptr) return pooled(aten_conv2d());
  Tensor y = empty_output(p, input, channels_last);
  run_forward(*row, p, input, weight, bias, y);
  return pooled(y);
}

// The row that leaves each filter's mean and variance with the convolution's result, or null: none
// can, or BatchNorm's own pass over the result is expected to take less time.
const Conv2dKernel* pick_statistics(const Conv2dProblem& p, const Tensor& like) {
  const KernelTable& table = kernel_table();
  const Selection& selection = current_selection();
  const Device device = machine_of(like);
  Conv2dProblem fused = p;
  fused.epilogue.statistics = true;
  const auto [row, forced] = choose_fused("conv2d_statistics", fused, device);
  if (forced || row == nullptr) return row;
  if (!selection.kernel.empty()) return nullptr;  // it may be the convolution that is forced
  const auto expected = [&](const auto& rows, const char* op, const auto& problem) {
    const auto* best = choose(rows, op, Direction::kFprop, problem, device, selection);
    return best != nullptr ? best->cost(problem, device) : std::numeric_limits<double>::infinity();
  };
  BatchNormProblem norm;
  norm.N = p.N;
  norm.C = p.K;
  norm.H = p.P();
  norm.W = p.Q();
  norm.dtype = p.dtype;
  norm.layout = p.layout;
  const double apart =
      expected(table.conv2d, "conv2d", p) + expected(table.batch_norm, "batch_norm", norm);
  norm.training = false;
  const double together = row->cost(fused, device) + expected(table.batch_norm, "batch_norm", norm);
  return together <= apart ? row : nullptr;
}

// activation(batch_norm(conv2d(input)) + residual) with the batch's own statistics: output, the
// convolution's result (which backward needs), mean, biased variance.
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bn_training(
    const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, const OptionalTensor& residual,
    double eps, SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
    SymInt groups, std::string_view activation, bool) {
  check_batched("conv_bn_training", input);
  const auto apart = [&]() -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    const Tensor y = ops::conv2d(input, weight, bias, stride, padding, dilation, groups);
    check_residual("conv_bn_relu", residual, y.sym_sizes(), y);
    const auto [out, mean, var] =
        ops::batch_norm_training(y, bn_weight, bn_bias, residual, eps, activation);
    return {out, y, mean, var};
  };
  if (!is_own(input) || !is_own(weight) || aten_is_forced()) return apart();
  check_conv2d_ranks(input, weight);
  const Conv2dSizes sizes = check_conv2d(input, weight, bias, stride, padding, dilation, groups);
  check_residual("conv_bn_relu", residual, SymIntArrayRef(sizes.output.data(), 4), input);
  const bool filter_channels_last = suggests_channels_last(weight);
  const bool channels_last = filter_channels_last || suggests_channels_last(input);
  Conv2dProblem p = make_problem(input.sizes(), weight.sizes(), stride, padding, dilation, groups,
                                 input, channels_last, filter_channels_last);
  p.epilogue.shift = bias.has_value();
  const Conv2dKernel* row = p.output_elements() > 0 ? pick_statistics(p, input) : nullptr;
  if (row == nullptr) return apart();
  p.epilogue.statistics = true;
  const auto statistics = input.options().dtype(accumulator_type(input));
  const Tensor y = empty_output(p, input, channels_last);
  const Tensor mean = at::empty({p.K}, statistics), var = at::empty({p.K}, statistics);
  run_forward(*row, p, input, weight, bias, y, mean, var);
  // Inference wants its per-channel tensors of one type, and the statistics are accumulators.
  const auto as_statistics = [](const OptionalTensor& t) {
    return t ? OptionalTensor(as_accumulator(*t)) : OptionalTensor();
  };
  check_batch_norm(y, bn_weight, bn_bias, std::nullopt, std::nullopt, /*training=*/true);
  const Tensor out = ops::batch_norm_inference(y, as_statistics(bn_weight), as_statistics(bn_bias),
                                               mean, var, residual, eps, activation);
  return {out, y, mean, var};
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
TORCH_LIBRARY_IMPL(fastconv, CompositeExplicitAutograd, m) {
  m.impl("conv2d", &conv2d);
  m.impl("conv_bn_act", &conv_bn_act);
  m.impl("conv2d_act_max_pool2d", &conv2d_act_max_pool2d);
  m.impl("conv_bn_training", &conv_bn_training);
}
#define FASTCONV_CONV2D_IMPLS(m)                           \
  m.impl("conv2d", &conv2d);                               \
  m.impl("conv2d_dgrad", &conv2d_dgrad);                   \
  m.impl("conv2d_wgrad", &conv2d_wgrad);                   \
  m.impl("conv2d_bgrad", &conv2d_bgrad);                   \
  m.impl("conv_bn_act", &conv_bn_act);                     \
  m.impl("conv2d_act_max_pool2d", &conv2d_act_max_pool2d); \
  m.impl("conv_bn_training", &conv_bn_training);
TORCH_LIBRARY_IMPL(fastconv, CPU, m){FASTCONV_CONV2D_IMPLS(m)} TORCH_LIBRARY_IMPL(fastconv, CUDA,
                                                                                  m) {
  FASTCONV_CONV2D_IMPLS(m)
}

}  // namespace fastconv
