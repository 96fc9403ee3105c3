// The only bridge to Python's Triton kernels: what fastconv/triton_kernels registers, and calls.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include "core/kernel_table.h"

namespace fastconv {

// Null when Triton's rows run on CPU tensors (`gpu`: on CUDA tensors), otherwise why they do not.
const char* why_no_triton(bool gpu);

// A GPU as Python sees it: for builds without CUDA, which cannot ask the driver.
Device gpu_seen_from_python(int index);

// register_triton, set_triton_interpreted, triton_fields.
void bind_triton(pybind11::module_& m);

}  // namespace fastconv
