// What the convolution operators (conv2d.cpp) and the fused ones (conv2d_fused.cpp) share.
#pragma once

#include <ATen/core/Tensor.h>

#include "core/kernel_table.h"
#include "torch/arguments.h"

namespace fastconv {

// Arguments that have been checked, in the kernels' letters; `like` is the input or a gradient.
Conv2dProblem make_problem(at::IntArrayRef input_size, at::IntArrayRef weight_size,
                           c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                           c10::SymIntArrayRef dilation, const c10::SymInt& groups,
                           const at::Tensor& like, bool channels_last, bool filter_channels_last);

// The measured row, else the cheapest one; null where ATen is to run.
const Conv2dKernel* pick_conv2d(Direction direction, const Conv2dProblem& p,
                                const at::Tensor& like);
void launch_conv2d(const Conv2dKernel& row, const Conv2dProblem& p, const Conv2dArgs& args,
                   const at::Tensor& like);

at::Tensor empty_output(const Conv2dProblem& p, const at::Tensor& like, bool channels_last);

// What a forward row reads and writes besides input, filter and output; undefined: nothing. The
// residual may lie in any layout. Where the problem says filter_kept, the packed filter is kept
// (packed_filters.h) if the row has a way to.
struct EpilogueTensors {
  at::Tensor scale, shift, residual, mean = {}, var = {};
};
void run_forward(const Conv2dKernel& row, const Conv2dProblem& p, const at::Tensor& input,
                 const at::Tensor& weight, const EpilogueTensors& epilogue, const at::Tensor& out);

}  // namespace fastconv
