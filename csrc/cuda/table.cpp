#include "cuda/table.h"

namespace fastconv {

void add_cuda_kernels(KernelTable& table) {
  add_cuda_conv2d_direct_rows(table);
  add_cuda_max_pool2d_rows(table);
}

}  // namespace fastconv
