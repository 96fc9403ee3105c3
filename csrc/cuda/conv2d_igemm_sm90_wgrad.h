// Filter gradient on Hopper's tensor cores: which tile a problem gets, what two blocks share, and
// how its pixels are split over blocks. All of it follows from the problem alone, as the bits of
// the result must.
//
// The product: rows are filters, columns are chunks of 64 channels of one tap (r, s), and the sum
// runs over the pixels in steps of 64. A chunk is 128 bytes of a pixel: what a swizzled row holds.
// A tile takes any neighbouring chunks, so that 64 channels of a 3x3 filter, 9 chunks, are three
// full tiles of three, and dy is read once for three taps.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/conv2d_problem.h"
#include "cuda/limits.h"

namespace fastconv {
namespace cuda {
namespace sm90_wgrad {

constexpr int kStep = 64;   // pixels a stage
constexpr int kChunk = 64;  // channels
constexpr int kElementBytes = 2;
constexpr int kBoxBytes = kStep * kChunk * kElementBytes;  // what one copy brings

struct Tile {
  int rows, chunks;
};
// Of 128 rows each consumer warpgroup takes 64 and all columns; of 64 rows all, and half of the
// columns: where K is 64, half of a taller tile would be nothing. 64 x 256 sums are 128 registers a
// thread, the most that leaves room for the rest.
constexpr Tile kTiles[] = {{128, 4}, {128, 3}, {128, 2}, {128, 1}, {64, 4}};

// What the two blocks of a cluster have in common and load half each for both.
enum class Share { kNothing, kGrad, kInput };

struct Plan {
  Tile tile = {};
  Share share = Share::kNothing;
  int64_t k_tiles = 0, column_tiles = 0;   // a group; the pair's rounded up to even
  int64_t tiles = 0;                       // of all groups
  int64_t channel_chunks = 0, chunks = 0;  // a tap; a group
  int64_t steps = 0, steps_per_split = 0, splits = 0;
  double cycles = 0;  // on 132 SMs

  int64_t blocks() const { return tiles * splits; }
};

namespace detail {

constexpr int64_t kSms = 132;  // of an H200. Elsewhere the split is the same, the fill another.
// What bounds a step. Tensor cores: 2048 multiply-adds a cycle and SM. L2: 5.6 TB/s measured on
// this architecture are about 28 bytes a cycle and SM; 128 x 256 results want 48 of it and 128 x
// 128 64, so that what is shared decides: 128 x 256 with a shared input want 32.
constexpr double kMultiplyAdds = 2048, kL2Bytes = 28;
constexpr double kBlock = 2500;         // cycles until a block's first product, and after its last
constexpr double kStoreBytes = 16;      // of sums, a cycle and SM
constexpr double kReduceBytes = 20;     // of partial sums read again
constexpr double kLaunch = 5000;        // cycles of a second launch
constexpr int64_t kChainSteps = 256;    // 16,384 pixels: a float32 sum of more loses digits
constexpr int64_t kBudget = 128 << 20;  // bytes of partial sums, unless filling 132 SMs wants more

inline double step_cycles(const Tile& tile, Share share) {
  const double columns = tile.chunks * kChunk;
  const double grad = tile.rows * (share == Share::kGrad ? 0.5 : 1.0);
  const double input = columns * (share == Share::kInput ? 0.5 : 1.0);
  return std::max(tile.rows * columns * kStep / kMultiplyAdds,
                  (grad + input) * kStep * kElementBytes / kL2Bytes);
}

inline double cycles_of(const Plan& plan, int64_t results) {
  const double waves = static_cast<double>(ceil_div(plan.blocks(), kSms));
  const double stored = 4.0 * plan.tile.rows * plan.tile.chunks * kChunk / kStoreBytes;
  const double block =
      static_cast<double>(plan.steps_per_split) * step_cycles(plan.tile, plan.share) + kBlock +
      stored;
  const double partials = 4.0 * static_cast<double>(results * plan.splits);
  const double reduce = plan.splits == 1 ? 0 : kLaunch + partials / (kSms * kReduceBytes);
  return waves * block + reduce;
}

// The split that fills about `waves` times 132 SMs, within what precision and memory ask for.
inline void split(Plan& plan, int64_t waves, int64_t results) {
  const int64_t most = std::max<int64_t>(1, std::min(plan.steps, kBudget / (4 * results)));
  const int64_t least = std::min(most, ceil_div(plan.steps, kChainSteps));
  const int64_t wanted = std::min(most, std::max(least, waves * kSms / plan.tiles));
  plan.steps_per_split = ceil_div(plan.steps, wanted);
  plan.splits = ceil_div(plan.steps, plan.steps_per_split);
}

}  // namespace detail

// The best of all tiles, shares and splits by the estimate above.
inline Plan plan_of(const Conv2dProblem& p) {
  constexpr int kMostWaves = 8;
  Plan best;
  for (const Tile& tile : kTiles) {
    for (const Share share : {Share::kNothing, Share::kGrad, Share::kInput}) {
      Plan plan;
      plan.tile = tile;
      plan.share = share;
      plan.channel_chunks = ceil_div(p.C / p.G, kChunk);
      plan.chunks = plan.channel_chunks * p.R * p.S;
      plan.k_tiles = ceil_div(p.K / p.G, tile.rows);
      plan.column_tiles = ceil_div(plan.chunks, tile.chunks);
      int64_t& paired = share == Share::kInput ? plan.k_tiles : plan.column_tiles;
      if (share != Share::kNothing) paired = ceil_div(paired, 2) * 2;
      plan.tiles = plan.k_tiles * plan.column_tiles * p.G;
      plan.steps = ceil_div(p.N * p.P() * p.Q(), kStep);
      for (int64_t waves = 1; waves <= kMostWaves; ++waves) {
        detail::split(plan, waves, p.filter_elements());
        plan.cycles = detail::cycles_of(plan, p.filter_elements());
        if (best.splits == 0 || plan.cycles < best.cycles) best = plan;
      }
    }
  }
  return best;
}

// Partial sums, KRSC whatever the filter's layout; none where one block has the whole sum.
inline int64_t partial_bytes(const Plan& plan, const Conv2dProblem& p) {
  return plan.splits == 1 ? 0 : 4 * plan.splits * p.filter_elements();
}

}  // namespace sm90_wgrad
}  // namespace cuda
}  // namespace fastconv
