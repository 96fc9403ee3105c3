#include "core/kernel_table.h"

namespace fastconv {

KernelTable& kernel_table() {
  static KernelTable table = [] {
    KernelTable t;
#ifdef FASTCONV_WITH_CUDA
    add_cuda_kernels(t);
#endif
    add_cpu_kernels(t);
    return t;
  }();
  return table;
}

}  // namespace fastconv
