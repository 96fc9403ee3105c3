#include "cpu/conv2d_ops.h"

#include <cmath>
#include <utility>

#define FASTCONV_KERNEL_FILE "cpu/conv2d_ops.inl"
#include "cpu/for_each_isa.h"

namespace fastconv {

template <class T>
const Conv2dOps<T>& conv2d_ops([[maybe_unused]] CpuIsa isa) {
#if defined(__x86_64__)
  if (isa == CpuIsa::kAvx512) return avx512::conv2d::ops<T>();
  if (isa == CpuIsa::kAvx2) return avx2::conv2d::ops<T>();
#endif
  return portable::conv2d::ops<T>();
}

template const Conv2dOps<float>& conv2d_ops(CpuIsa);
template const Conv2dOps<double>& conv2d_ops(CpuIsa);
template const Conv2dOps<Half>& conv2d_ops(CpuIsa);
template const Conv2dOps<BFloat16>& conv2d_ops(CpuIsa);

}  // namespace fastconv
