// From torch's arguments to sizes: one place checks what torch.nn.functional checks, with its
// exception types, and says the offending value. Everything is SymInt, so that the same lines serve
// real tensors, meta tensors and torch.compile's symbolic shapes.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <array>
#include <optional>
#include <vector>

#include "core/dtype.h"
#include "core/pool2d_problem.h"

namespace fastconv {

using SymPair = std::array<c10::SymInt, 2>;  // (height, width)
using OptionalTensor = std::optional<at::Tensor>;

// float32, float64, float16, bfloat16, strided and unquantised: what the kernels take. Everything
// else (complex, integers, quantised, other devices) goes to ATen.
bool is_own(const at::Tensor& t);
DType dtype_of(const at::Tensor& t);

// What per-channel arrays are handed to kernels in, and such an array in that type, contiguous.
inline at::ScalarType accumulator_type(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}
inline at::Tensor as_accumulator(const at::Tensor& t) {
  return t.to(accumulator_type(t)).contiguous();
}

// Whether an operation on these tensors gives channels_last, by the rule of torch's convolutions.
bool suggests_channels_last(const at::Tensor& t);
inline at::MemoryFormat memory_format(bool channels_last) {
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}
inline Layout layout_of(bool channels_last) {
  return channels_last ? Layout::kNHWC : Layout::kNCHW;
}

struct Conv2dSizes {
  SymPair stride, padding, dilation;
  c10::SymInt groups;
  std::array<c10::SymInt, 4> output;  // N, K, P, Q
};
// `input` is 4-D here: the callers have made a batch of one out of a 3-D one.
Conv2dSizes check_conv2d(const at::Tensor& input, const at::Tensor& weight,
                         const OptionalTensor& bias, c10::SymIntArrayRef stride,
                         c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                         const c10::SymInt& groups);
// The checks of conv2d that come first, before a 3-D input is told from a wrong one.
void check_conv2d_ranks(const at::Tensor& input, const at::Tensor& weight);

// For operators that take no 3-D input in place of a batch of one.
void check_batched(const char* op, const at::Tensor& input);

// The BatchNorm and residual of a fused convolution, against the convolution's own sizes.
void check_folded(const at::Tensor& input, const Conv2dSizes& sizes, const OptionalTensor& mean,
                  const OptionalTensor& var, const OptionalTensor& bn_weight,
                  const OptionalTensor& bn_bias, const OptionalTensor& residual);

struct Pool2dSizes {
  SymPair window, stride, padding, dilation;
  std::vector<c10::SymInt> output;  // 3-D or 4-D, as the input
};
Pool2dSizes check_max_pool2d(const at::Tensor& input, c10::SymIntArrayRef kernel_size,
                             c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                             c10::SymIntArrayRef dilation, bool ceil_mode);
// The same for an input of which the size alone is known.
Pool2dSizes check_max_pool2d(c10::SymIntArrayRef input_size, c10::SymIntArrayRef kernel_size,
                             c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                             c10::SymIntArrayRef dilation, bool ceil_mode);
Pool2dSizes check_avg_pool2d(const at::Tensor& input, c10::SymIntArrayRef kernel_size,
                             c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                             bool ceil_mode, std::optional<int64_t> divisor_override);
std::vector<c10::SymInt> check_adaptive_avg_pool2d(const at::Tensor& input,
                                                   c10::SymIntArrayRef output_size);

void check_batch_norm(const at::Tensor& input, const OptionalTensor& weight,
                      const OptionalTensor& bias, const OptionalTensor& mean,
                      const OptionalTensor& var, bool training);

// A residual, where there is one, against the output that it is added to: `size`, and the dtype and
// device of `like`.
void check_residual(const char* op, const OptionalTensor& residual, c10::SymIntArrayRef size,
                    const at::Tensor& like);

// The concrete pooling problem; an unbatched input is a batch of one.
Pool2dProblem pool2d_problem(PoolKind kind, at::IntArrayRef input_size, at::IntArrayRef output_size,
                             DType dtype, bool channels_last);
void set_window(Pool2dProblem& problem, const Pool2dSizes& sizes);

}  // namespace fastconv
