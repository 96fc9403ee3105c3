// Winograd's convolution F(m x m, 3 x 3) in NHWC, m = 2 or 4: fprop of a dense 3 x 3 filter with
// stride 1. A tile of m x m outputs is computed from a patch of (m + 2) x (m + 2) inputs by
// (m + 2)^2 multiplications a channel and filter, where the direct way takes 9 m^2: 2.25 times as
// many for m = 2, 4 times for m = 4.
#pragma once

#include "core/kernel_table.h"
#include "cpu/isa.h"

namespace fastconv {

// The inputs under one tile.
struct WinogradPatch {
  const float* image;
  const float* zeros;  // as many as there are channels: what stands outside the image
  int64_t first;       // of the image, where the patch begins; it may begin outside
  int64_t row, pixel;  // elements between neighbours
  int64_t channels;
  int64_t top, bottom, left, right;  // patch rows [top, bottom), columns [left, right) are inside
};

// The transforms of one instruction set (conv2d_winograd.inl). `ld` is the distance between the
// (m + 2)^2 matrices; what they write may reach to the end of a vector.
struct WinogradOps {
  void (*filter)(const float* g, int64_t channels, int64_t width, float* u, int64_t ld);
  void (*input)(const WinogradPatch&, float* v, int64_t ld);
  bool (*output)(const float* m, int64_t ld, int64_t columns, float* y, int64_t y_ld);
};
const WinogradOps& winograd_ops(int64_t tile, CpuIsa isa);

// args.filter is read where args.packed is given, too: for results that are not finite.
size_t conv2d_winograd_workspace(const Conv2dProblem&, int64_t tile, CpuIsa, int threads);
size_t conv2d_winograd_packed_bytes(const Conv2dProblem&, int64_t tile, CpuIsa);
void conv2d_winograd_pack(const Conv2dProblem&, int64_t tile, CpuIsa, const Conv2dArgs&,
                          const Context&);
void conv2d_winograd(const Conv2dProblem&, int64_t tile, CpuIsa, const Conv2dArgs&, const Context&);

}  // namespace fastconv
