// What stands behind the rows that conv2d_rows.cpp lists.
#pragma once

#include "core/kernel_table.h"
#include "cpu/isa.h"

namespace fastconv {

// The workspace is counted for as many threads as the launch will have. fprop and dgrad are in
// conv2d_igemm.h.
size_t conv2d_wgrad_workspace(const Conv2dProblem&, CpuIsa, const Device&);
void conv2d_wgrad(const Conv2dProblem&, CpuIsa, const Conv2dArgs&, const Context&);

size_t conv2d_bgrad_workspace(const Conv2dProblem&);
void conv2d_bgrad(const Conv2dProblem&, CpuIsa, const Conv2dArgs&, const Context&);

}  // namespace fastconv
