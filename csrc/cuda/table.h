// Each CUDA operation appends its rows here; table.cpp calls them in order.
#pragma once

#include "core/kernel_table.h"

namespace fastconv {

void add_cuda_conv2d_direct_rows(KernelTable& table);  // conv2d_direct_fprop.cu: any problem
void add_cuda_max_pool2d_rows(KernelTable& table);     // max_pool2d.cu

}  // namespace fastconv
