// Each CPU operation appends its rows here; table.cpp calls them in order.
#pragma once

#include "core/kernel_table.h"

namespace fastconv {

void add_cpu_conv2d_rows(KernelTable& table);            // conv2d_rows.cpp: dense and grouped
void add_cpu_conv2d_winograd_rows(KernelTable& table);   // conv2d_winograd_rows.cpp
void add_cpu_conv2d_grouped_rows(KernelTable& table);    // conv2d_grouped_rows.cpp
void add_cpu_conv2d_depthwise_rows(KernelTable& table);  // conv2d_depthwise.cpp
void add_cpu_conv2d_reference_rows(KernelTable& table);  // conv2d_reference.cpp: any problem, slow
void add_cpu_max_pool2d_rows(KernelTable& table);
void add_cpu_avg_pool2d_rows(KernelTable& table);
void add_cpu_batch_norm_rows(KernelTable& table);

}  // namespace fastconv
