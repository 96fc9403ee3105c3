// fprop and dgrad as the same thing: a list of gathers, each multiplied by a piece of the filter
// and scattered to a grid of output pixels.
//
// fprop is one pass. In dgrad, input row h meets filter row r only where h + pad - r * dil is a
// multiple of the stride, so the rows fall into `stride` classes (h mod stride) with taps of their
// own, and the columns likewise: stride_h * stride_w passes, in which no zero is multiplied.
#pragma once

#include <numeric>
#include <vector>

#include "cpu/conv2d_ops.h"
#include "cpu/conv2d_strides.h"

namespace fastconv {

// Grid point (i, j) is output pixel (first_h + i * step_h, first_w + j * step_w).
struct OutputGrid {
  int64_t C = 1, H = 1, W = 1;  // of the whole output tensor
  int64_t first_h = 0, step_h = 1, first_w = 0, step_w = 1;
  int64_t count_h = 1, count_w = 1;
  bool is_whole() const { return count_h == H && count_w == W; }
};

struct Pass {
  Gather gather;  // of group 0
  OutputGrid out;
  int64_t columns = 1;  // output channels of one group
  // Filter element (output channel n, tap_h, tap_w, reduction channel c) of group g lies at
  // offset + g * group_stride + n * stride[0] + tap_h * stride[1] + tap_w * stride[2] + c *
  // stride[3]
  int64_t filter_offset = 0, group_stride = 0;
  int64_t filter_stride[4] = {};
};

// A 1x1 convolution does not see rows: its pixels are one long row.
inline Conv2dProblem without_rows(Conv2dProblem p) {
  if (p.is_1x1() && p.stride_h == 1 && p.stride_w == 1 && p.pad_h == 0 && p.pad_w == 0) {
    p.W *= p.H;
    p.H = 1;
  }
  return p;
}

inline Pass fprop_pass(const Conv2dProblem& p) {
  const Strides4 f = filter_strides(p);
  Pass pass;
  pass.gather.N = p.N;
  pass.gather.C = p.C;
  pass.gather.channels = p.C / p.G;
  pass.gather.h = {p.H, p.P(), p.R, p.stride_h, -p.pad_h, p.dil_h};
  pass.gather.w = {p.W, p.Q(), p.S, p.stride_w, -p.pad_w, p.dil_w};
  pass.out = {p.K, p.P(), p.Q(), 0, 1, 0, 1, p.P(), p.Q()};
  pass.columns = p.K / p.G;
  pass.filter_offset = 0;
  pass.group_stride = p.K / p.G * f.n;
  const int64_t stride[4] = {f.n, f.h, f.w, f.c};
  for (int i = 0; i < 4; ++i) pass.filter_stride[i] = stride[i];
  return pass;
}

// The class of input rows `first`, first + stride, ...: which outputs they meet, under which of the
// filter's R rows (tap, tap + hop, ...).
struct DgradAxis {
  GatherAxis gather;
  int64_t tap = 0, tap_hop = 1;
};
inline DgradAxis dgrad_axis(int64_t first, int64_t H, int64_t P, int64_t R, int64_t stride,
                            int64_t pad, int64_t dil) {
  DgradAxis axis;
  axis.tap_hop = stride / std::gcd(stride, dil);  // taps of a class are this far apart
  while (axis.tap < axis.tap_hop && axis.tap < R && (first + pad - axis.tap * dil) % stride != 0) {
    ++axis.tap;
  }
  const bool any = axis.tap < axis.tap_hop && axis.tap < R;
  axis.gather.size = P;
  axis.gather.count = first < H ? (H - first - 1) / stride + 1 : 0;
  axis.gather.taps = any ? (R - axis.tap - 1) / axis.tap_hop + 1 : 0;
  axis.gather.step = 1;
  axis.gather.first = any ? (first + pad - axis.tap * dil) / stride : 0;
  axis.gather.hop = -(axis.tap_hop * dil / stride);
  return axis;
}

inline std::vector<Pass> dgrad_passes(const Conv2dProblem& p) {
  const Strides4 f = filter_strides(p);
  std::vector<Pass> passes;
  for (int64_t h = 0; h < p.stride_h && h < p.H; ++h) {
    const DgradAxis rows = dgrad_axis(h, p.H, p.P(), p.R, p.stride_h, p.pad_h, p.dil_h);
    for (int64_t w = 0; w < p.stride_w && w < p.W; ++w) {
      const DgradAxis cols = dgrad_axis(w, p.W, p.Q(), p.S, p.stride_w, p.pad_w, p.dil_w);
      Pass pass;
      pass.gather.N = p.N;
      pass.gather.C = p.K;
      pass.gather.channels = p.K / p.G;
      pass.gather.h = rows.gather;
      pass.gather.w = cols.gather;
      pass.out = {
          p.C, p.H, p.W, h, p.stride_h, w, p.stride_w, rows.gather.count, cols.gather.count};
      pass.columns = p.C / p.G;
      pass.filter_offset = rows.tap * f.h + cols.tap * f.w;
      pass.group_stride = p.K / p.G * f.n;
      const int64_t stride[4] = {f.c, f.h * rows.tap_hop, f.w * cols.tap_hop, f.n};
      for (int i = 0; i < 4; ++i) pass.filter_stride[i] = stride[i];
      passes.push_back(pass);
    }
  }
  return passes;
}

inline std::vector<Pass> passes_of(const Conv2dProblem& p, Direction direction) {
  if (direction == Direction::kFprop) return {fprop_pass(p)};
  return dgrad_passes(p);
}

}  // namespace fastconv
