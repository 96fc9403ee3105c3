// What every CUDA row checks and estimates on the host.
#pragma once

#include "core/estimate.h"
#include "core/integers.h"

namespace fastconv {
namespace cuda {

using fastconv::busy_part;
using fastconv::ceil_div;
using fastconv::refuse_beyond_int;

// Expected microseconds of a kernel that moves `bytes` and does `flops`, reaching `share` of an
// SM's 128 float32 multiply-adds a cycle.
inline double expected_us(double bytes, double flops, double share, const Device& device) {
  constexpr double kLaunch = 3;
  return gpu_us(kLaunch, bytes, flops, 128 * 2 * share, device);
}

}  // namespace cuda
}  // namespace fastconv
