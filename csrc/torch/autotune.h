// Measured choices: where fastconv/autotuning.py has timed the rows of a convolution, the fastest
// one goes before the one that is expected to be.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include "core/kernel_table.h"

namespace fastconv {

// The row that was the fastest for such a problem on the tensor's device; null where nobody has
// measured, where the row cannot run now, or where the caller has forced another.
const Conv2dKernel* measured_row(Direction direction, const Conv2dProblem& p,
                                 const at::Tensor& like);

// Where measuring is asked for and this problem has not been: times the rows that can run on the
// tensors of this very call, which they read only and write whole. Returns the row to run, which
// takes tensors as `row` does.
const Conv2dKernel& settled_row(const Conv2dKernel& row, const Conv2dProblem& p,
                                const Conv2dArgs& args, const at::Tensor& like);

// register_autotuning, set_autotuning, set_measured_row.
void bind_autotune(pybind11::module_& m);

}  // namespace fastconv
