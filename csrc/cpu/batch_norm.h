// How a BatchNorm call is cut into pieces: a function of the problem alone, so that its sums have
// the same order, and the same bits, with any number of threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/batch_norm_problem.h"

namespace fastconv {

// Count, mean and M2 (the sum of squared differences from the mean) of a set of numbers.
struct Moments {
  double count = 0, mean = 0, m2 = 0;

  // Chan, Golub and LeVeque: the moments of two sets together.
  void merge(double other_count, double other_mean, double other_m2) {
    const double total = count + other_count;
    if (other_count == 0) return;
    const double delta = other_mean - mean, share = other_count / total;
    mean += delta * share;
    m2 += other_m2 + delta * delta * count * share;
    count = total;
  }
};

struct BatchNormPlan {
  // Rows of C channels (NHWC), or planes of HW elements (NCHW). With one channel, or planes of one
  // element, the two are the same memory: the one with longer contiguous runs is taken.
  bool by_rows;
  int64_t N, C, HW, M;

  // A channel's elements, or the rows, in order: blocks, several of which make a slice. A block is
  // summed in one go (and read twice, from L1, when planes); a slice is a thread's work, its sums
  // are kept and added in order.
  int64_t blocks, slices;
  // Planes: a block is a chunk of one large plane or some small planes whole. 4,096 floats are half
  // of L1; 8 planes whose distance is a power of two still fit the ways of one cache set.
  int64_t chunks_of_plane, chunk, planes_of_block;

  static constexpr int64_t kChunk = 4096, kSmallBlock = 2048, kMostPlanes = 8;
  static constexpr int64_t kRowsOfBlock = 128;
  static constexpr int64_t kRowsOfSlice = 512, kMostSlices = 64;
  // Channels whose sums a thread holds at once: 512 take 10 KiB of L1.
  static constexpr int64_t kGroup = 512;
  static constexpr int64_t kCoefficients = 5;

  explicit BatchNormPlan(const BatchNormProblem& t)
      : by_rows((t.layout == Layout::kNHWC && t.C > 1) ||
                (t.layout == Layout::kNCHW && t.H * t.W == 1 && t.C > 1)),
        N(t.N),
        C(t.C),
        HW(t.H * t.W),
        M(t.N * t.H * t.W),
        chunks_of_plane(std::max<int64_t>(1, (HW + kChunk - 1) / kChunk)),
        // Whole multiples of four AVX-512 vectors.
        chunk(((HW + chunks_of_plane - 1) / chunks_of_plane + 63) / 64 * 64),
        planes_of_block(
            chunks_of_plane > 1
                ? 1
                : std::clamp<int64_t>(kSmallBlock / std::max<int64_t>(HW, 1), 1, kMostPlanes)) {
    if (by_rows) {
      blocks = (M + kRowsOfBlock - 1) / kRowsOfBlock;
      slices = std::clamp<int64_t>((M + kRowsOfSlice - 1) / kRowsOfSlice, 1, kMostSlices);
    } else {
      // 64 channels are pieces enough; fewer are cut in slices of at least 16 blocks.
      blocks = (N + planes_of_block - 1) / planes_of_block * chunks_of_plane;
      const int64_t wanted = (64 + C - 1) / std::max<int64_t>(C, 1);
      slices = std::clamp<int64_t>((blocks + 15) / 16, 1, std::max<int64_t>(wanted, 1));
    }
  }
  int64_t groups() const { return (C + kGroup - 1) / kGroup; }
  int64_t slice_begin(int64_t slice) const { return blocks * slice / slices; }
  // Rows, or elements of a channel, in blocks [0, block).
  int64_t elements_before(int64_t block) const {
    if (by_rows) return std::min(M, block * kRowsOfBlock);
    if (chunks_of_plane == 1) return std::min(N, block * planes_of_block) * HW;
    const int64_t plane = block / chunks_of_plane, within = block % chunks_of_plane;
    return plane * HW + std::min(HW, within * chunk);
  }
  double slice_count(int64_t slice) const {
    return static_cast<double>(elements_before(slice_begin(slice + 1)) -
                               elements_before(slice_begin(slice)));
  }

  // Two sums a channel and slice, then (rows only) the coefficients of each channel, each array
  // with room for a vector past its end.
  size_t partial_doubles() const { return static_cast<size_t>(2 * slices * C); }
  size_t workspace() const {
    return sizeof(double) *
           (partial_doubles() + (by_rows ? static_cast<size_t>(kCoefficients * (C + 16)) : 0));
  }
};

}  // namespace fastconv
