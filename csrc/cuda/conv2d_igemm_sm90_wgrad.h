// Filter gradient on Hopper's tensor cores: which tile a problem gets, what two blocks share, and
// who sums which pixels. All of it follows from the problem alone, as the bits of the result must.
//
// The product: rows are filters, columns are chunks of 64 channels of one tap (r, s), and the sum
// runs over the pixels in steps of 64, of float32 32. A box that is copied has 128 bytes of each of
// a step's pixels, what a swizzled row holds: a chunk, of float32 half of one. A tile takes any
// neighbouring chunks, so that 64 channels of a 3x3 filter, 9 chunks, are three full tiles of
// three, and dy is read once for three taps.
//
// Narrow groups are merged until they fill a chunk: of a tile's products those between different
// groups are thrown away, which at 4 channels a group still leaves 128 multiply-adds a cycle and
// SM.
//
// The work is a line of units (a tile, or the pair of tiles of two blocks), each of unit_steps
// steps, cut into equal pieces of worker_steps, one a block or cluster. Either a unit is a whole
// number of pieces: then all units pass the same pixels at the same time, from L2. Or pieces end
// anywhere, and 72 tiles fill 132 SMs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/conv2d_problem.h"
#include "cuda/limits.h"

namespace fastconv {
namespace cuda {
namespace sm90_wgrad {

constexpr int kChunk = 64;      // channels
constexpr int kRowBytes = 128;  // of a pixel, that one copy brings
constexpr int kPair = 2;        // blocks of a cluster that share something

// Pixels a stage, and as many channels a box.
constexpr int step_pixels(int64_t element_bytes) {
  return static_cast<int>(kRowBytes / element_bytes);
}

struct Tile {
  int rows, chunks;
  constexpr int64_t sums() const { return int64_t{rows} * chunks * kChunk; }
};
// Of 128 rows each consumer warpgroup takes 64 and all columns; of 64 rows all, and half of the
// columns: where K is 64, half of a taller tile would be nothing. 64 x 256 sums are 128 registers a
// thread, the most that leaves room for the rest.
constexpr Tile kTiles[] = {{128, 4}, {128, 3}, {128, 2}, {128, 1}, {64, 4}};
// float32 keeps its sums twice, in the tensor cores and in plain additions.
constexpr Tile kFloat32Tiles[] = {{128, 2}, {128, 1}, {64, 2}};

// What the two blocks of a cluster have in common and load half each for both.
enum class Share { kNothing, kGrad, kInput };

// Groups as the kernel sees them: `merged` of the problem's make one.
struct Groups {
  int64_t merged, count, channels, filters;  // of one
};
inline Groups groups_of(const Conv2dProblem& p) {
  const int64_t channels = p.C / p.G, filters = p.K / p.G;
  int64_t merged = 1;
  for (int64_t m = 2; m <= p.G && m * std::max(channels, filters) <= kChunk; ++m) {
    if (p.G % m == 0) merged = m;
  }
  return {merged, p.G / merged, channels * merged, filters * merged};
}

struct Plan {
  Groups groups = {};
  int64_t element_bytes = 2;
  int terms = 1;  // products that one is made of
  Tile tile = {};
  Share share = Share::kNothing;
  int64_t k_tiles = 0, column_tiles = 0;   // a group; the pair's rounded up to even
  int64_t channel_chunks = 0, chunks = 0;  // a tap; a group
  int64_t units = 0, steps = 0;            // of all groups; a unit
  int64_t unit_steps = 0;                  // at least `steps`: a whole number of pieces, or `steps`
  int64_t worker_steps = 0, workers = 0;
  double cycles = 0;  // on 132 SMs

  int step() const { return step_pixels(element_bytes); }  // pixels
  int cluster() const { return share == Share::kNothing ? 1 : kPair; }
  // Pieces a unit where that is a whole number, else 0.
  int64_t pieces() const { return unit_steps % worker_steps == 0 ? unit_steps / worker_steps : 0; }
  // Partial sums: one a worker, or one where a piece begins and one where it ends.
  int64_t slots() const { return pieces() == 1 ? 0 : (pieces() > 1 ? 1 : 2) * workers * cluster(); }
  int64_t partial_bytes() const { return slots() * tile.sums() * 4; }
};

namespace detail {

constexpr int64_t kSms = 132;  // of an H200. Elsewhere the pieces are the same, the fill another.
// What bounds a step. Tensor cores: 2048 multiply-adds a cycle and SM, of which power and waits
// leave four fifths. L2: 5.6 TB/s measured on this architecture are about 28 bytes a cycle and SM;
// 128 x 256 results want 48 of it and 128 x 128 want 64, so that what is shared decides: 128 x 256
// with a shared input want 32. Memory, where units pass other pixels and the tensors are larger
// than L2 holds: 4.3 TB/s are 18.
constexpr double kMultiplyAdds = 0.8 * 2048, kL2Bytes = 28, kMemoryBytes = 18, kL2Holds = 40e6;
// Shared memory, which bounds float32: 128 bytes a cycle, of which waits leave four fifths, too.
constexpr double kSharedBytes = 0.8 * 128;
constexpr double kBlock = 2500;          // cycles until a block's first product, and after its last
constexpr double kStoreBytes = 16;       // of sums, a cycle and SM
constexpr double kReduceBytes = 20;      // of partial sums read again
constexpr double kLaunch = 5000;         // cycles of a second launch
constexpr int64_t kChainPixels = 32768;  // a float32 sum of more loses digits
constexpr int64_t kFloat32Chain = 8192;  // which float32 itself cannot spare
constexpr int64_t kBudget = 256 << 20;   // bytes of partial sums, unless filling 132 SMs wants more
constexpr int64_t kMostWaves = 4;
constexpr int64_t kMostWorkerSteps = 1 << 30;  // an int on the device

inline int64_t chain_steps(const Plan& plan) {
  return (plan.element_bytes == 2 ? kChainPixels : kFloat32Chain) / plan.step();
}

// Bytes of shared memory that a step of float32 reads and writes. Copies write both operands. Each
// consumer reads its rows into registers. The columns are read and written once more to be turned,
// as two numbers each for three products, and read for each product of 64 rows.
inline double shared_bytes(const Plan& plan) {
  const double row_reads = plan.tile.rows == 128 ? 1 : 2;
  const double column_reads = plan.tile.rows == 128 ? 2 : 1;
  const double turned = plan.terms == 3 ? 2 : 1;
  return plan.tile.rows * kRowBytes * (1 + row_reads) +
         plan.tile.chunks * kChunk * kRowBytes * (2 + turned + column_reads * plan.terms);
}

// Of float32, 128 x 128 results by three products take 1536 cycles of products and 1536 of shared
// memory, where mma.sync takes 2560 at best and is expected at 65 % of that; by one product (TF32)
// they take 512 and 896, where mma.sync takes 853 at best.
inline double step_cycles(const Plan& plan, double tensor_bytes) {
  const Tile& tile = plan.tile;
  const double columns = tile.chunks * kChunk;
  const double grad = tile.rows * (plan.share == Share::kGrad ? 0.5 : 1.0);
  const double input = columns * (plan.share == Share::kInput ? 0.5 : 1.0);
  const bool apart = plan.pieces() == 0 && tensor_bytes > kL2Holds;
  const double loads = (grad + input) * kRowBytes / (apart ? kMemoryBytes : kL2Bytes);
  // As many bytes of TF32 are half as many numbers, at half the rate.
  const double products = tile.rows * columns * step_pixels(2) * plan.terms / kMultiplyAdds;
  const double turning = plan.element_bytes == 2 ? 0 : shared_bytes(plan) / kSharedBytes;
  return std::max({products, loads, turning});
}

inline double cycles_of(const Plan& plan, double tensor_bytes) {
  const int64_t resident = kSms / plan.cluster();
  const double waves = static_cast<double>(ceil_div(plan.workers, resident));
  const double store = 4.0 * static_cast<double>(plan.tile.sums()) / kStoreBytes;
  const int64_t stores = plan.pieces() > 0 ? 1 : 1 + ceil_div(plan.worker_steps, plan.unit_steps);
  const double block = static_cast<double>(plan.worker_steps) * step_cycles(plan, tensor_bytes) +
                       kBlock + store * static_cast<double>(stores);
  // Of the slots where pieces begin and end, as many are read as there are pieces and units.
  const int64_t parts = plan.pieces() > 0 ? plan.workers : plan.workers + plan.units;
  const double read = 4.0 * static_cast<double>(plan.tile.sums() * parts * plan.cluster());
  return waves * block + (plan.slots() == 0 ? 0 : kLaunch + read / (kSms * kReduceBytes));
}

// Units of a whole number of pieces, for about `waves` times 132 SMs, within what precision and
// memory ask for.
inline void cut_whole(Plan& plan, int64_t waves) {
  const int64_t resident = kSms / plan.cluster();
  const int64_t affordable = kBudget / (plan.units * plan.cluster() * plan.tile.sums() * 4);
  const int64_t fill = waves * resident / plan.units;
  const int64_t chain = std::min(affordable, ceil_div(plan.steps, chain_steps(plan)));
  const int64_t pieces = std::max<int64_t>(1, std::min(plan.steps, std::max(fill, chain)));
  plan.worker_steps = ceil_div(plan.steps, pieces);
  plan.unit_steps = ceil_div(plan.steps, plan.worker_steps) * plan.worker_steps;
  plan.workers = plan.units * (plan.unit_steps / plan.worker_steps);
}

// Pieces that end anywhere, one or more for each of 132 SMs.
inline void cut_anywhere(Plan& plan) {
  const int64_t resident = kSms / plan.cluster();
  const int64_t all = plan.units * plan.steps;
  const int64_t waves = ceil_div(std::min(plan.steps, ceil_div(all, resident)), chain_steps(plan));
  plan.unit_steps = plan.steps;
  plan.worker_steps =
      std::min(ceil_div(all, resident * std::min(waves, kMostWaves)), kMostWorkerSteps);
  plan.workers = ceil_div(all, plan.worker_steps);
}

}  // namespace detail

// The best of all tiles, shares and cuts by the estimate above.
inline Plan plan_of(const Conv2dProblem& p) {
  const double tensor_bytes = p.bytes();
  const Groups groups = groups_of(p);
  Plan best;
  const auto consider = [&](Plan& plan) {
    plan.cycles = detail::cycles_of(plan, tensor_bytes);
    if (best.workers == 0 || plan.cycles < best.cycles) best = plan;
  };
  const auto consider_tile = [&](const Tile& tile) {
    for (const Share share : {Share::kNothing, Share::kGrad, Share::kInput}) {
      Plan plan;
      plan.groups = groups;
      plan.element_bytes = size_of(p.dtype);
      plan.terms = p.dtype == DType::kFloat32 && !p.tf32 ? 3 : 1;
      plan.tile = tile;
      plan.share = share;
      plan.channel_chunks = ceil_div(groups.channels, kChunk);
      plan.chunks = plan.channel_chunks * p.R * p.S;
      plan.k_tiles = ceil_div(groups.filters, tile.rows);
      plan.column_tiles = ceil_div(plan.chunks, tile.chunks);
      int64_t& paired = share == Share::kInput ? plan.k_tiles : plan.column_tiles;
      paired = ceil_div(paired, plan.cluster()) * plan.cluster();
      plan.units = plan.k_tiles * plan.column_tiles / plan.cluster() * groups.count;
      plan.steps = ceil_div(p.N * p.P() * p.Q(), plan.step());
      for (int64_t waves = 1; waves <= detail::kMostWaves; ++waves) {
        detail::cut_whole(plan, waves);
        consider(plan);
      }
      detail::cut_anywhere(plan);
      consider(plan);
    }
  };
  if (p.dtype == DType::kFloat32) {
    for (const Tile& tile : kFloat32Tiles) consider_tile(tile);
  } else {
    for (const Tile& tile : kTiles) consider_tile(tile);
  }
  return best;
}

}  // namespace sm90_wgrad
}  // namespace cuda
}  // namespace fastconv
