// Strides, in elements, of the densely packed tensors of a Conv2dProblem.
#pragma once

#include "core/conv2d_problem.h"

namespace fastconv {

struct Strides4 {
  int64_t n, c, h, w;
  int64_t at(int64_t in, int64_t ic, int64_t ih, int64_t iw) const {
    return in * n + ic * c + ih * h + iw * w;
  }
};

inline Strides4 dense_strides(Layout layout, int64_t C, int64_t H, int64_t W) {
  if (layout == Layout::kNCHW) return {C * H * W, H * W, W, 1};
  return {H * W * C, 1, W * C, C};
}
inline Strides4 input_strides(const Conv2dProblem& p) {
  return dense_strides(p.layout, p.C, p.H, p.W);
}
inline Strides4 output_strides(const Conv2dProblem& p) {
  return dense_strides(p.layout, p.K, p.P(), p.Q());
}
// (k, c, r, s) in the places of (n, c, h, w); c counts inside a group.
inline Strides4 filter_strides(const Conv2dProblem& p) {
  return dense_strides(p.filter_layout, p.C / p.G, p.R, p.S);
}

}  // namespace fastconv
