// Depthwise convolution, one input and one output channel a group: conv2d_depthwise_nhwc.cpp,
// conv2d_depthwise_window.cpp (large filters in NHWC) and conv2d_depthwise_nchw.cpp stand behind
// the rows of conv2d_depthwise.cpp.
#pragma once

#include "core/kernel_table.h"
#include "cpu/isa.h"

namespace fastconv {

constexpr int64_t kMaxDepthwiseRows = 64;  // of a filter, in NHWC

size_t conv2d_depthwise_nhwc_workspace(const Conv2dProblem&, Direction, CpuIsa);
size_t conv2d_depthwise_nchw_workspace(const Conv2dProblem&, Direction, CpuIsa, int threads);
void conv2d_depthwise_nhwc(const Conv2dProblem&, Direction, CpuIsa, const Conv2dArgs&,
                           const Context&);
size_t conv2d_depthwise_window_workspace(const Conv2dProblem&, Direction, CpuIsa, int threads);
void conv2d_depthwise_window(const Conv2dProblem&, Direction, CpuIsa, const Conv2dArgs&,
                             const Context&);
void conv2d_depthwise_nchw(const Conv2dProblem&, Direction, CpuIsa, const Conv2dArgs&,
                           const Context&);

}  // namespace fastconv
