// Filters kept as a row packs them, so that a fused model's calls do not pack again.
#pragma once

#include <ATen/core/Tensor.h>

#include "core/kernel_table.h"

namespace fastconv {

// `weight` as the row's `pack` leaves it: packed at the first call, then kept for as long as the
// weight's memory lives, and packed anew when the weight has changed. Undefined where the row packs
// nothing, or where nobody can tell whether the weight has changed (a tensor of inference mode).
at::Tensor kept_filter(const Conv2dKernel& row, const Conv2dProblem& p, const at::Tensor& weight,
                       const at::Tensor& like);

struct KeptFilters {
  int64_t count, bytes;
};
KeptFilters kept_filters();
void forget_filters();

}  // namespace fastconv
