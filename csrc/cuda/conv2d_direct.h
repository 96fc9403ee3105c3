// How the direct kernels, fprop and dgrad, share their results out to threads: a thread holds
// kDirectPixels positions of a few neighbouring channels of one group.
//
// Which results a warp holds follows from their layout. NCHW: 32 neighbouring pixels of the same
// channels, so that loads and stores are contiguous and filter loads are one address. NHWC: 8
// channel tiles by 4 pixels, so that a warp stores 32 neighbouring channels of a pixel. NHWC with
// one channel a group (depthwise): 32 neighbouring channels of one pixel.
#pragma once

#include "cuda/conv2d.h"

namespace fastconv {
namespace cuda {

constexpr int kDirectThreads = 128;
constexpr int kDirectPixels = 4;
constexpr int kDirectChannels = 4;  // 8 loads for 16 multiply-adds; 1 where a group has one

struct DirectPlan {
  int64_t pixels;
  int64_t blocks;   // pixel blocks * tile_blocks, tile_blocks fastest
  int tile_blocks;  // channel tiles / lanes, rounded up
  int lanes_log2;   // neighbouring threads along channel tiles
  int tiles;        // of channels, of all groups together
  int tiles_per_group;
  int per_group;  // channels
};

inline DirectPlan direct_plan_of(Layout layout, int64_t groups, int64_t per_group, int64_t pixels) {
  const int64_t channels = per_group == 1 ? 1 : kDirectChannels;
  DirectPlan t = {};
  t.pixels = pixels;
  t.per_group = to_int(per_group);
  t.tiles_per_group = to_int(ceil_div(per_group, channels));
  t.tiles = to_int(groups * t.tiles_per_group);
  t.lanes_log2 = layout == Layout::kNCHW ? 0 : channels == 1 ? 5 : 3;
  t.tile_blocks = to_int(ceil_div(t.tiles, int64_t{1} << t.lanes_log2));
  const int64_t pixels_per_block = (kDirectThreads >> t.lanes_log2) * kDirectPixels;
  t.blocks = ceil_div(pixels, pixels_per_block) * t.tile_blocks;
  return t;
}

// Estimate for `depth` products a result. Loads, conversions and predicates leave `share` of the
// issue slots to multiply-adds, with four blocks on every SM.
inline double direct_us(const Conv2dProblem& p, const DirectPlan& plan, int64_t depth, double share,
                        const Device& device) {
  const int channels = plan.per_group == 1 ? 1 : kDirectChannels;
  const double results =
      static_cast<double>(plan.blocks) * (kDirectThreads * kDirectPixels * channels);
  return expected_us(p.bytes(), 2 * results * static_cast<double>(depth), share,
                     busy_part(device, plan.blocks, 4));
}

// A thread's share of one block.
struct DirectShare {
  int64_t first_pixel;  // and every `pixel_step` on
  int pixel_step;
  int group;
  int first_in_group, channels;  // none: nothing to do
};

__device__ inline DirectShare direct_share(const DirectPlan& t, int64_t block, int per_tile) {
  const int lane = static_cast<int>(threadIdx.x) & ((1 << t.lanes_log2) - 1);
  const int pixel_lane = static_cast<int>(threadIdx.x) >> t.lanes_log2;
  const int pixel_lanes = kDirectThreads >> t.lanes_log2;
  const Division part = divide(block, t.tile_blocks);
  const int tile = (part.remainder << t.lanes_log2) + lane;
  const int group = tile / t.tiles_per_group;
  const int first = (tile - group * t.tiles_per_group) * per_tile;
  const int channels = tile < t.tiles ? min(per_tile, t.per_group - first) : 0;
  return {part.quotient * (pixel_lanes * kDirectPixels) + pixel_lane, pixel_lanes, group, first,
          channels};
}

}  // namespace cuda
}  // namespace fastconv
