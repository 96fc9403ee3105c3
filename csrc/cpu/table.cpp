#include "cpu/table.h"

namespace fastconv {

void add_cpu_kernels(KernelTable& table) {
  add_cpu_conv2d_rows(table);
  add_cpu_conv2d_winograd_rows(table);
  add_cpu_conv2d_grouped_rows(table);
  add_cpu_conv2d_depthwise_rows(table);
  add_cpu_conv2d_reference_rows(table);
  add_cpu_max_pool2d_rows(table);
  add_cpu_avg_pool2d_rows(table);
  add_cpu_batch_norm_rows(table);
}

}  // namespace fastconv
