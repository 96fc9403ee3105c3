#include "cpu/table.h"

namespace fastconv {
void add_cpu_conv2d_depthwise_rows(KernelTable&) {}
}  // namespace fastconv
