// What every CUDA row checks and estimates on the host.
#pragma once

#include "core/conv2d_problem.h"
#include "core/estimate.h"
#include "core/integers.h"

namespace fastconv {
namespace cuda {

using fastconv::busy_part;
using fastconv::ceil_div;
using fastconv::refuse_beyond_int;

// Expected microseconds of a kernel that moves `bytes` and does `flops`, reaching `share` of an
// SM's 128 float32 multiply-adds a cycle; sm_80's has 64.
inline double expected_us(double bytes, double flops, double share, const Device& device) {
  constexpr double kLaunch = 3;
  const double lanes = device.sm_arch == 80 ? 64 : 128;
  return gpu_us(kLaunch, bytes, flops, lanes * 2 * share, device);
}

// What an SM's tensor cores do in a cycle by mma.sync: on sm_90 some 60 % of what wgmma does; cards
// between have half of an A100's. TF32 is half of 16 bits, 3xTF32 three products of that.
inline double mma_flops(const Conv2dProblem& p, const Device& device) {
  const double half = device.sm_arch >= 90 ? 0.6 * 2048 : device.sm_arch == 80 ? 1024 : 512;
  if (p.dtype != DType::kFloat32) return 2 * half;
  return p.tf32 ? half : half / 3;
}

}  // namespace cuda
}  // namespace fastconv
