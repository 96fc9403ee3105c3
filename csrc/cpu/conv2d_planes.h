// A channel of an NCHW image stored so that every tap of a convolution is the whole plane at an
// offset: with its padding, and with rows and columns sorted by their remainder modulo the stride.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/conv2d_igemm.h"

namespace fastconv {

// How one axis of a plane is stored: phase after phase, `length` elements each.
struct PlaneAxis {
  int64_t length = 1;
  std::vector<int64_t> phases;    // remainders modulo the step that some tap needs
  std::vector<int64_t> phase_of;  // index of each tap's
  std::vector<int64_t> shift_of;  // elements into its phase
  PlaneAxis() = default;
  PlaneAxis(const GatherAxis& a, int64_t count) {
    int64_t reach = 0;
    for (int64_t tap = 0; tap < a.taps; ++tap) {
      const int64_t offset = WindowAxis::tap_offset(a, tap), phase = offset % a.step;
      size_t index = 0;
      while (index < phases.size() && phases[index] != phase) ++index;
      if (index == phases.size()) phases.push_back(phase);
      phase_of.push_back(static_cast<int64_t>(index));
      shift_of.push_back(offset / a.step);
      reach = std::max(reach, offset / a.step);
    }
    length = count + reach;
  }
  int64_t total() const { return length * static_cast<int64_t>(phases.size()); }
};

// Where phase (h, w) of a plane begins.
inline int64_t phase_start(const PlaneAxis& h, const PlaneAxis& w, int64_t phase_h,
                           int64_t phase_w) {
  return (phase_h * static_cast<int64_t>(w.phases.size()) + phase_w) * h.length * w.length;
}
// Where tap (r, s) of grid point (0, 0) lies in a plane.
inline int64_t tap_start(const PlaneAxis& h, const PlaneAxis& w, int64_t r, int64_t s) {
  return phase_start(h, w, h.phase_of[r], w.phase_of[s]) + h.shift_of[r] * w.length + w.shift_of[s];
}

}  // namespace fastconv
