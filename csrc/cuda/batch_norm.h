// How a BatchNorm call is cut into pieces on a GPU, and where its workspace's arrays lie: functions
// of the problem alone, so that the sums have the same order, and the same bits, on every card.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/batch_norm_problem.h"

namespace fastconv {
namespace cuda {

struct BatchNormPlan {
  // Rows of C channels (NHWC), or planes of HW elements (NCHW). With one channel, or planes of one
  // element, the two are the same memory: the one with longer contiguous runs is taken.
  bool by_rows;
  int64_t C, HW;
  int64_t extent;  // elements of a channel: rows, or N * HW
  // Blocks sum slices of `per_slice` elements of a channel; a slice's two sums are kept and added
  // in order. 64 divides it, hence every pack of 16 bytes lies in one slice.
  int64_t per_slice, slices;

  static constexpr int64_t kCoefficients = 4;  // most that a channel's second step needs
  // 512 blocks of 256 threads are 1,000 threads on each of an H200's 132 SMs.
  static constexpr int64_t kBlocks = 512;

  explicit BatchNormPlan(const BatchNormProblem& t)
      : by_rows((t.layout == Layout::kNHWC && t.C > 1) ||
                (t.layout == Layout::kNCHW && t.H * t.W == 1 && t.C > 1)),
        C(t.C),
        HW(t.C == 1 ? t.N * t.H * t.W : t.H * t.W),
        extent(t.N * t.H * t.W) {
    // A block takes 128 channels of 128 rows or more, or 4,096 elements or more of one channel.
    const int64_t groups = by_rows ? (C + 127) / 128 : C, least = by_rows ? 128 : 4096;
    const int64_t wanted = (kBlocks + groups - 1) / std::max<int64_t>(groups, 1);
    const int64_t most = std::max<int64_t>(extent / least, 1);
    per_slice = (extent + std::min(wanted, most) - 1) / std::min(wanted, most);
    per_slice = std::max<int64_t>((per_slice + 63) / 64 * 64, 64);
    slices = std::max<int64_t>((extent + per_slice - 1) / per_slice, 1);
  }

  // The workspace, in doubles: two sums a slice and channel, the pivots, the coefficients. What is
  // kept in float leaves half of its room free.
  int64_t sums() const { return slices * C; }
  size_t workspace() const {
    return sizeof(double) * static_cast<size_t>(2 * sums() + (1 + kCoefficients) * C);
  }
};

}  // namespace cuda
}  // namespace fastconv
