// fprop and dgrad as one gather. Along one axis both read, for tap i of an output position, the
// source position
//   j * jump + start + i * move
// fprop: j is the output position, jump the stride, start -pad, move the dilation.
// dgrad: with stride s and g = gcd(s, dil), only every (s / g)-th tap meets an input position x,
// the first being the least r0 with (x + pad - r0 * dil) % s == 0. Positions of the same remainder
// x % s, a phase, share their taps; x = phase + j * s. Then jump is 1, start
// (phase + pad - r0 * dil) / s, move -dil / g. A phase may have no tap at all.
#pragma once

#include <numeric>

#include "cuda/conv2d.h"

namespace fastconv {
namespace cuda {

struct GatherAxis {
  int source, target;  // positions read from and written to
  int phases;          // 1 in fprop; in dgrad the stride, but no more than there are positions
  int jump, move;
  int stride, pad, dil, taps;
  int tap_step;  // from one tap of a phase to its next
};

struct AxisPhase {
  int start, first_tap, taps, positions;
};

__device__ inline AxisPhase axis_phase(const GatherAxis& a, int phase, bool backward) {
  if (!backward) return {-a.pad, 0, a.taps, a.target};
  const int positions = (a.target - 1 - phase) / a.phases + 1;
  const int reach = min(a.tap_step, a.taps);
  for (int r = 0; r < reach; ++r) {
    const int from = phase + a.pad - r * a.dil;
    if (from % a.stride == 0) {
      return {from / a.stride, r, (a.taps - 1 - r) / a.tap_step + 1, positions};
    }
  }
  return {0, 0, 0, positions};
}

// dgrad's remainders by the stride along an axis; one along an empty axis.
inline int64_t phases_of(int64_t stride, int64_t size) {
  return std::max<int64_t>(1, std::min(stride, size));
}

inline GatherAxis axis_of(bool backward, int size, int out, int taps, int stride, int pad,
                          int dil) {
  if (!backward) return {size, out, 1, stride, dil, stride, pad, dil, taps, 1};
  const int common = std::gcd(stride, dil);
  return {out, size, std::min(stride, size), 1, -dil / common, stride, pad,
          dil, taps, stride / common};
}

inline int ceil_log2(int64_t x) {
  int log2 = 0;
  while ((int64_t{1} << log2) < x) ++log2;
  return log2;
}

}  // namespace cuda
}  // namespace fastconv
