// The pooling operators on real tensors, CPU and CUDA alike: check, lay out, choose a row, run.
#include <ATen/ops/_adaptive_avg_pool2d_backward.h>
#include <ATen/ops/adaptive_avg_pool2d.h>
#include <ATen/ops/avg_pool2d.h>
#include <ATen/ops/avg_pool2d_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/max_pool2d_with_indices.h>
#include <ATen/ops/max_pool2d_with_indices_backward.h>
#include <torch/library.h>

#include "torch/arguments.h"
#include "torch/launch.h"
#include "torch/window_offsets.h"

namespace fastconv {
namespace {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;

const char* op_of(PoolKind kind) {
  return kind == PoolKind::kMax       ? "max_pool2d"
         : kind == PoolKind::kAverage ? "avg_pool2d"
                                      : "adaptive_avg_pool2d";
}

std::vector<int64_t> as_ints(SymIntArrayRef values) {
  std::vector<int64_t> ints;
  for (const SymInt& v : values) ints.push_back(v.expect_int());
  return ints;
}

const Pool2dKernel* pick_pool(Direction direction, const Pool2dProblem& p, const Tensor& like) {
  return pick(kernel_table().pool2d, op_of(p.kind), direction, p, like);
}

bool goes_to_aten(const char* op, const Tensor& input) {
  if (is_own(input) && !aten_is_forced()) return false;
  require_fallback_allowed(op, input);
  return true;
}

Tensor run_forward(const Pool2dKernel& row, const Pool2dProblem& p, const Tensor& input,
                   at::IntArrayRef output_size, Tensor* index, at::ScalarType index_type) {
  const auto format = memory_format(p.layout == Layout::kNHWC);
  Tensor out = at::empty(output_size, input.options(), format);
  if (index) *index = at::empty(output_size, input.options().dtype(index_type), format);
  if (out.numel() == 0) return out;
  const Tensor x = input.contiguous(format);
  Pool2dArgs args;
  args.input = x.const_data_ptr();
  args.index_out = index ? index->mutable_data_ptr() : nullptr;
  args.out = out.mutable_data_ptr();
  launch(row, p, args, out);
  return out;
}

Tensor run_backward(const Pool2dKernel& row, const Pool2dProblem& p, const Tensor& grad,
                    const void* index, Tensor out) {
  const Tensor dy = grad.contiguous(memory_format(p.layout == Layout::kNHWC));
  Pool2dArgs args;
  args.grad = dy.const_data_ptr();
  args.index_in = index;
  args.out = out.mutable_data_ptr();
  launch(row, p, args, out);
  return out;
}

Tensor empty_input_gradient(const Tensor& grad, SymIntArrayRef input_size, bool channels_last) {
  TORCH_CHECK(
      (grad.dim() == 3 || grad.dim() == 4) && static_cast<size_t>(grad.dim()) == input_size.size(),
      "pooling backward: expected a 3-D or 4-D gradient of the input's rank, but got ",
      grad.sizes(), " and input size ", input_size);
  return at::empty(as_ints(input_size), grad.options(), memory_format(channels_last));
}

// A gradient or an index of another size would be read out of bounds.
void check_output_size(const char* op, const Tensor& t, SymIntArrayRef expected) {
  TORCH_CHECK(t.sym_sizes() == expected, op, ": expected a tensor of size ", expected, ", but got ",
              t.sizes());
}

// ---- max ----

Tensor aten_max_pool2d(const Tensor& input, SymIntArrayRef kernel_size, SymIntArrayRef stride,
                       SymIntArrayRef padding, SymIntArrayRef dilation, bool ceil_mode) {
  return at::max_pool2d(input, as_ints(kernel_size), as_ints(stride), as_ints(padding),
                        as_ints(dilation), ceil_mode);
}

std::tuple<Tensor, Tensor> aten_max_pool2d_with_indices(const Tensor& input,
                                                        SymIntArrayRef kernel_size,
                                                        SymIntArrayRef stride,
                                                        SymIntArrayRef padding,
                                                        SymIntArrayRef dilation, bool ceil_mode) {
  return at::max_pool2d_with_indices(input, as_ints(kernel_size), as_ints(stride), as_ints(padding),
                                     as_ints(dilation), ceil_mode);
}

struct MaxPool2dCall {
  Pool2dSizes sizes;
  std::vector<int64_t> output_size;
  Pool2dProblem problem;
  const Pool2dKernel* row;
};

MaxPool2dCall prepare_max_pool2d(const Tensor& input, SymIntArrayRef kernel_size,
                                 SymIntArrayRef stride, SymIntArrayRef padding,
                                 SymIntArrayRef dilation, bool ceil_mode, PoolIndex index) {
  MaxPool2dCall call;
  call.sizes = check_max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode);
  call.output_size = as_ints(call.sizes.output);
  call.problem = pool2d_problem(PoolKind::kMax, input.sizes(), call.output_size, dtype_of(input),
                                suggests_channels_last(input));
  set_window(call.problem, call.sizes);
  call.problem.index = index;
  call.row = pick_pool(Direction::kFprop, call.problem, input);
  return call;
}

Tensor max_pool2d(const Tensor& input, SymIntArrayRef kernel_size, SymIntArrayRef stride,
                  SymIntArrayRef padding, SymIntArrayRef dilation, bool ceil_mode) {
  if (goes_to_aten("max_pool2d", input)) {
    return aten_max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode);
  }
  const MaxPool2dCall call = prepare_max_pool2d(input, kernel_size, stride, padding, dilation,
                                                ceil_mode, PoolIndex::kNone);
  if (call.row == nullptr) {
    return aten_max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode);
  }
  return run_forward(*call.row, call.problem, input, call.output_size, nullptr, at::kLong);
}

std::tuple<Tensor, Tensor> max_pool2d_with_index(const Tensor& input, SymIntArrayRef kernel_size,
                                                 SymIntArrayRef stride, SymIntArrayRef padding,
                                                 SymIntArrayRef dilation, bool ceil_mode,
                                                 PoolIndex kind, at::ScalarType type) {
  const MaxPool2dCall call =
      prepare_max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, kind);
  if (call.row == nullptr) {
    auto [out, index] =
        aten_max_pool2d_with_indices(input, kernel_size, stride, padding, dilation, ceil_mode);
    if (type != at::kLong) index = offsets_from_indices(index, input.size(-1), call.sizes, type);
    return {out, index};
  }
  Tensor index;
  Tensor out = run_forward(*call.row, call.problem, input, call.output_size, &index, type);
  return {out, index};
}

std::tuple<Tensor, Tensor> max_pool2d_with_indices(const Tensor& input, SymIntArrayRef kernel_size,
                                                   SymIntArrayRef stride, SymIntArrayRef padding,
                                                   SymIntArrayRef dilation, bool ceil_mode) {
  if (goes_to_aten("max_pool2d", input)) {
    return aten_max_pool2d_with_indices(input, kernel_size, stride, padding, dilation, ceil_mode);
  }
  return max_pool2d_with_index(input, kernel_size, stride, padding, dilation, ceil_mode,
                               PoolIndex::kFlatIndex64, at::kLong);
}

std::tuple<Tensor, Tensor> max_pool2d_with_offsets(const Tensor& input, SymIntArrayRef kernel_size,
                                                   SymIntArrayRef stride, SymIntArrayRef padding,
                                                   SymIntArrayRef dilation, bool ceil_mode) {
  TORCH_CHECK(is_own(input), "max_pool2d_with_offsets: no kernel takes ", input.scalar_type());
  const auto type = offset_type(kernel_size);
  return max_pool2d_with_index(input, kernel_size, stride, padding, dilation, ceil_mode,
                               type == at::kByte ? PoolIndex::kOffset8 : PoolIndex::kOffset32,
                               type);
}

PoolIndex index_kind(const Tensor& index) {
  switch (index.scalar_type()) {
    case at::kByte:
      return PoolIndex::kOffset8;
    case at::kInt:
      return PoolIndex::kOffset32;
    case at::kLong:
      return PoolIndex::kFlatIndex64;
    default:
      TORCH_CHECK(false, "max_pool2d_backward: index must be uint8, int32 or int64, but got ",
                  index.scalar_type());
  }
}

Tensor max_pool2d_backward(const Tensor& grad, const Tensor& index, SymIntArrayRef input_size,
                           SymIntArrayRef kernel_size, SymIntArrayRef stride,
                           SymIntArrayRef padding, SymIntArrayRef dilation, bool ceil_mode,
                           bool channels_last) {
  Tensor out = empty_input_gradient(grad, input_size, channels_last);
  const Pool2dSizes sizes =
      check_max_pool2d(out, kernel_size, stride, padding, dilation, ceil_mode);
  check_output_size("max_pool2d_backward", grad, sizes.output);
  check_output_size("max_pool2d_backward", index, sizes.output);
  if (out.numel() == 0) return out;
  Pool2dProblem p =
      pool2d_problem(PoolKind::kMax, out.sizes(), grad.sizes(), dtype_of(grad), channels_last);
  set_window(p, sizes);
  p.index = index_kind(index);
  const Pool2dKernel* row = pick_pool(Direction::kDgrad, p, grad);
  if (row == nullptr) {
    const Tensor flat = indices_from_offsets(index, out.size(-1), sizes);
    return at::max_pool2d_with_indices_backward(grad, out, as_ints(kernel_size), as_ints(stride),
                                                as_ints(padding), as_ints(dilation), ceil_mode,
                                                flat);
  }
  const Tensor where = index.contiguous(memory_format(channels_last));
  return run_backward(*row, p, grad, where.const_data_ptr(), out);
}

// ---- average ----

Tensor avg_pool2d(const Tensor& input, SymIntArrayRef kernel_size, SymIntArrayRef stride,
                  SymIntArrayRef padding, bool ceil_mode, bool count_include_pad,
                  std::optional<int64_t> divisor_override) {
  const auto aten = [&] {
    return at::avg_pool2d(input, as_ints(kernel_size), as_ints(stride), as_ints(padding), ceil_mode,
                          count_include_pad, divisor_override);
  };
  if (goes_to_aten("avg_pool2d", input)) return aten();
  const Pool2dSizes sizes =
      check_avg_pool2d(input, kernel_size, stride, padding, ceil_mode, divisor_override);
  const auto output_size = as_ints(sizes.output);
  Pool2dProblem p = pool2d_problem(PoolKind::kAverage, input.sizes(), output_size, dtype_of(input),
                                   suggests_channels_last(input));
  set_window(p, sizes);
  p.count_include_pad = count_include_pad;
  p.divisor_override = divisor_override.value_or(0);
  const Pool2dKernel* row = pick_pool(Direction::kFprop, p, input);
  if (row == nullptr) return aten();
  return run_forward(*row, p, input, output_size, nullptr, at::kLong);
}

Tensor avg_pool2d_backward(const Tensor& grad, SymIntArrayRef input_size,
                           SymIntArrayRef kernel_size, SymIntArrayRef stride,
                           SymIntArrayRef padding, bool ceil_mode, bool count_include_pad,
                           std::optional<int64_t> divisor_override, bool channels_last) {
  Tensor out = empty_input_gradient(grad, input_size, channels_last);
  const Pool2dSizes sizes =
      check_avg_pool2d(out, kernel_size, stride, padding, ceil_mode, divisor_override);
  check_output_size("avg_pool2d_backward", grad, sizes.output);
  if (out.numel() == 0) return out;
  Pool2dProblem p =
      pool2d_problem(PoolKind::kAverage, out.sizes(), grad.sizes(), dtype_of(grad), channels_last);
  set_window(p, sizes);
  p.count_include_pad = count_include_pad;
  p.divisor_override = divisor_override.value_or(0);
  const Pool2dKernel* row = pick_pool(Direction::kDgrad, p, grad);
  if (row == nullptr) {
    return at::avg_pool2d_backward(grad, out, as_ints(kernel_size), as_ints(stride),
                                   as_ints(padding), ceil_mode, count_include_pad,
                                   divisor_override);
  }
  return run_backward(*row, p, grad, nullptr, out);
}

Tensor adaptive_avg_pool2d(const Tensor& input, SymIntArrayRef output_size) {
  if (goes_to_aten("adaptive_avg_pool2d", input)) {
    return at::adaptive_avg_pool2d_symint(input, output_size);
  }
  const auto size = as_ints(check_adaptive_avg_pool2d(input, output_size));
  const Pool2dProblem p = pool2d_problem(PoolKind::kAdaptiveAverage, input.sizes(), size,
                                         dtype_of(input), suggests_channels_last(input));
  const Pool2dKernel* row = pick_pool(Direction::kFprop, p, input);
  if (row == nullptr) return at::adaptive_avg_pool2d_symint(input, output_size);
  return run_forward(*row, p, input, size, nullptr, at::kLong);
}

Tensor adaptive_avg_pool2d_backward(const Tensor& grad, SymIntArrayRef input_size,
                                    bool channels_last) {
  Tensor out = empty_input_gradient(grad, input_size, channels_last);
  const SymIntArrayRef grad_size = grad.sym_sizes();
  check_output_size("adaptive_avg_pool2d_backward", grad,
                    check_adaptive_avg_pool2d(out, grad_size.slice(grad_size.size() - 2)));
  if (out.numel() == 0) return out;
  if (grad.numel() == 0) return out.zero_();
  const Pool2dProblem p = pool2d_problem(PoolKind::kAdaptiveAverage, out.sizes(), grad.sizes(),
                                         dtype_of(grad), channels_last);
  const Pool2dKernel* row = pick_pool(Direction::kDgrad, p, grad);
  if (row == nullptr) return at::_adaptive_avg_pool2d_backward(grad, out);
  return run_backward(*row, p, grad, nullptr, out);
}

}  // namespace

// CompositeExplicitAutograd serves every device without a kernel of ours.
TORCH_LIBRARY_IMPL(fastconv, CompositeExplicitAutograd, m) {
  m.impl("max_pool2d", &max_pool2d);
  m.impl("max_pool2d_with_indices", &max_pool2d_with_indices);
  m.impl("avg_pool2d", &avg_pool2d);
  m.impl("adaptive_avg_pool2d", &adaptive_avg_pool2d);
}
#define FASTCONV_POOL2D_IMPLS(m)                               \
  m.impl("max_pool2d", &max_pool2d);                           \
  m.impl("max_pool2d_with_indices", &max_pool2d_with_indices); \
  m.impl("max_pool2d_with_offsets", &max_pool2d_with_offsets); \
  m.impl("max_pool2d_backward", &max_pool2d_backward);         \
  m.impl("avg_pool2d", &avg_pool2d);                           \
  m.impl("avg_pool2d_backward", &avg_pool2d_backward);         \
  m.impl("adaptive_avg_pool2d", &adaptive_avg_pool2d);         \
  m.impl("adaptive_avg_pool2d_backward", &adaptive_avg_pool2d_backward);
TORCH_LIBRARY_IMPL(fastconv, CPU, m){FASTCONV_POOL2D_IMPLS(m)} TORCH_LIBRARY_IMPL(fastconv, CUDA,
                                                                                  m) {
  FASTCONV_POOL2D_IMPLS(m)
}

}  // namespace fastconv
