// Convolution and what follows it as one operator, on real tensors: in inference BatchNorm, a
// residual, an activation and max pooling; in training the batch's own statistics.
#include <ATen/TensorOperators.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/rsqrt.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "torch/activation.h"
#include "torch/conv2d.h"
#include "torch/launch.h"
#include "torch/ops.h"

namespace fastconv {
namespace {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;

Tensor shift_of(const OptionalTensor& bias) { return bias ? as_accumulator(*bias) : Tensor(); }

// One factor and one summand a filter.
struct Affine {
  Tensor scale, shift;
};

// One pass on the CPU: some ten calls of ATen would take longer than a small layer.
template <class Acc>
Affine fold_on_cpu(const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                   const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, double eps) {
  const Tensor tensors[] = {shift_of(bias), as_accumulator(mean), as_accumulator(var),
                            shift_of(bn_weight), shift_of(bn_bias)};
  const Acc* values[5];
  for (int i = 0; i < 5; ++i) {
    values[i] = tensors[i].defined() ? tensors[i].const_data_ptr<Acc>() : nullptr;
  }
  const auto [b, m, v, gamma, beta] = values;
  const Affine out = {at::empty_like(tensors[1]), at::empty_like(tensors[1])};
  Acc* scale = out.scale.mutable_data_ptr<Acc>();
  Acc* shift = out.shift.mutable_data_ptr<Acc>();
  for (int64_t k = 0, K = mean.numel(); k < K; ++k) {
    const Acc inverse = 1 / std::sqrt(v[k] + static_cast<Acc>(eps));
    scale[k] = gamma != nullptr ? inverse * gamma[k] : inverse;
    const Acc centre = b != nullptr ? m[k] - b[k] : m[k];
    shift[k] = (beta != nullptr ? beta[k] : Acc(0)) - centre * scale[k];
  }
  return out;
}

// BatchNorm of fixed statistics, the bias folded in.
Affine fold_batch_norm(const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                       const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, double eps) {
  if (mean.is_cpu()) {
    const auto fold =
        accumulator_type(mean) == at::kDouble ? &fold_on_cpu<double> : &fold_on_cpu<float>;
    return fold(bias, mean, var, bn_weight, bn_bias, eps);
  }
  Tensor scale = at::rsqrt(as_accumulator(var) + eps);
  if (bn_weight) scale = scale * as_accumulator(*bn_weight);
  Tensor centre = as_accumulator(mean);
  if (bias) centre = centre - as_accumulator(*bias);
  Tensor shift = -centre * scale;
  if (bn_bias) shift = shift + as_accumulator(*bn_bias);
  return {scale, shift};
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

// max_pool2d(activation(batch_norm(conv2d(input)) + residual)); see schema.cpp.
Tensor conv_bn_act(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& mean, const OptionalTensor& var,
                   const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                   const OptionalTensor& residual, double eps, SymIntArrayRef stride,
                   SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups,
                   std::string_view activation, SymIntArrayRef pool_kernel,
                   SymIntArrayRef pool_stride, SymIntArrayRef pool_padding, bool keep_filter) {
  const Activation act = activation_of(activation);
  const bool pooling = !pool_kernel.empty();
  const SymInt one = 1;
  const auto pooled = [&](const Tensor& y) {
    if (!pooling) return y;
    return ops::max_pool2d(y, pool_kernel, pool_stride, pool_padding, one, /*ceil_mode=*/false);
  };
  const auto aten = [&] {
    Tensor y = at::conv2d_symint(input, weight, bias, stride, padding, dilation, groups);
    if (mean) {
      y = at::batch_norm(y, bn_weight, bn_bias, mean, var, /*training=*/false, /*momentum=*/0.0,
                         eps, /*cudnn_enabled=*/true);
    }
    return pooled(apply_activation(residual ? y + *residual : y, act));
  };
  if (!is_own(input) || !is_own(weight) || aten_is_forced()) {
    require_fallback_allowed(pooling ? "conv2d_max_pool2d" : "conv_bn_act",
                             is_own(input) ? weight : input);
    return aten();
  }
  check_conv2d_ranks(input, weight);
  if (input.dim() == 3) {
    return conv_bn_act(input.unsqueeze(0), weight, bias, mean, var, bn_weight, bn_bias,
                       residual ? OptionalTensor(residual->unsqueeze(0)) : residual, eps, stride,
                       padding, dilation, groups, activation, pool_kernel, pool_stride,
                       pool_padding, keep_filter)
        .squeeze(0);
  }
  const Conv2dSizes sizes = check_conv2d(input, weight, bias, stride, padding, dilation, groups);
  check_folded(input, sizes, mean, var, bn_weight, bn_bias, residual);
  const bool filter_channels_last = suggests_channels_last(weight);
  const bool channels_last = filter_channels_last || suggests_channels_last(input);
  Conv2dProblem p = make_problem(input.sizes(), weight.sizes(), stride, padding, dilation, groups,
                                 input, channels_last, filter_channels_last);
  p.filter_kept = keep_filter;
  p.winograd = largest_winograd_tile(current_selection(), /*fused_inference=*/true);
  p.epilogue.scale = mean.has_value();
  p.epilogue.shift = mean || bias;
  p.epilogue.residual = residual.has_value();
  p.epilogue.activation = act;
  const auto run = [&](const Conv2dKernel& row, const Conv2dProblem& problem, const Tensor& out) {
    Affine affine = {Tensor(), shift_of(bias)};
    if (mean) affine = fold_batch_norm(bias, *mean, *var, bn_weight, bn_bias, eps);
    run_forward(row, problem, input, weight,
                {affine.scale, affine.shift, residual ? *residual : Tensor()}, out);
    return out;
  };
  if (pooling) {
    const Pool2dSizes window =
        check_max_pool2d(SymIntArrayRef(sizes.output.data(), 4), pool_kernel, pool_stride,
                         pool_padding, one, /*ceil_mode=*/false);
    const auto output_size = C10_AS_INTARRAYREF_SLOW(window.output);
    Pool2dProblem pool = pool2d_problem(PoolKind::kMax, {p.N, p.K, p.P(), p.Q()}, output_size,
                                        p.dtype, channels_last);
    set_window(pool, window);
    Conv2dProblem fused = p;
    fused.epilogue.pool = {pool.R, pool.S, pool.stride_h, pool.stride_w, pool.pad_h, pool.pad_w};
    if (const Conv2dKernel* row = pick_pooled(fused, p, pool, input)) {
      return run(*row, fused,
                 at::empty(output_size, input.options(), memory_format(channels_last)));
    }
  }
  const Conv2dKernel* row = pick_conv2d(Direction::kFprop, p, input);
  if (row == nullptr) return aten();
  return pooled(run(*row, p, empty_output(p, input, channels_last)));
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
  run_forward(*row, p, input, weight, {.shift = shift_of(bias), .mean = mean, .var = var}, y);
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

// CompositeExplicitAutograd serves every device without a kernel of ours.
#define FASTCONV_FUSED_IMPLS(m)        \
  m.impl("conv_bn_act", &conv_bn_act); \
  m.impl("conv_bn_training", &conv_bn_training);
TORCH_LIBRARY_IMPL(fastconv, CompositeExplicitAutograd,
                   m){FASTCONV_FUSED_IMPLS(m)} TORCH_LIBRARY_IMPL(fastconv, CPU, m){
    FASTCONV_FUSED_IMPLS(m)} TORCH_LIBRARY_IMPL(fastconv, CUDA, m) {
  FASTCONV_FUSED_IMPLS(m)
}

}  // namespace fastconv
