// Each CUDA operation appends its rows here; table.cpp calls them in order.
#pragma once

#include "core/kernel_table.h"

namespace fastconv {

// Convolution: from specialised to general; the last row of each direction takes any problem.
void add_cuda_conv2d_igemm_sm90_rows(KernelTable& table);     // fprop, dgrad, statistics; 1x1 too
void add_cuda_conv2d_small_channel_rows(KernelTable& table);  // fprop
void add_cuda_conv2d_depthwise_rows(KernelTable& table);      // fprop and dgrad
void add_cuda_conv2d_depthwise_wgrad_rows(KernelTable& table);
void add_cuda_conv2d_igemm_sm80_rows(KernelTable& table);        // fprop, dgrad, statistics
void add_cuda_conv2d_tiled_rows(KernelTable& table);             // fprop and dgrad, 1x1 too
void add_cuda_conv2d_igemm_sm90_wgrad_rows(KernelTable& table);  // sm_90a builds
void add_cuda_conv2d_igemm_sm80_wgrad_rows(KernelTable& table);
void add_cuda_conv2d_tiled_wgrad_rows(KernelTable& table);
void add_cuda_conv2d_direct_fprop_rows(KernelTable& table);
void add_cuda_conv2d_direct_dgrad_rows(KernelTable& table);
void add_cuda_conv2d_direct_wgrad_rows(KernelTable& table);
void add_cuda_conv2d_bgrad_rows(KernelTable& table);
void add_cuda_conv2d_max_pool2d_rows(KernelTable& table);
void add_cuda_max_pool2d_rows(KernelTable& table);  // max_pool2d.cu
void add_cuda_avg_pool2d_rows(KernelTable& table);  // avg_pool2d.cu: adaptive too
void add_cuda_batch_norm_rows(KernelTable& table);  // batch_norm.cu

}  // namespace fastconv
