// The Triton kernels as rows of the kernel table. The kernels, and how each is launched, are in
// fastconv/triton_kernels; what they take and what they are expected to cost is here, so that one
// choice compares all rows.
#pragma once

#include "core/kernel_table.h"

namespace fastconv {

// Calls the Python side (csrc/torch/triton.cpp), which compiles the kernel on first use.
void launch_triton(const char* row, const Conv2dProblem& problem, const Conv2dArgs& args,
                   const Context& context);
void launch_triton(const char* row, const Pool2dProblem& problem, const Pool2dArgs& args,
                   const Context& context);
void launch_triton(const char* row, const BatchNormProblem& problem, const BatchNormArgs& args,
                   const Context& context);

}  // namespace fastconv
