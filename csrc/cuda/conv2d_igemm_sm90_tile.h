// The shapes, memory and tile list of the Hopper implicit GEMM kernel.
#pragma once

#include "cuda/conv2d_igemm_sm90.h"
#include "cuda/ptx/cluster.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/mma.h"

namespace fastconv {
namespace cuda {
namespace igemm_sm90 {

// Element: as results are stored; Operand: as the tensor cores take them. kSplit: 3xTF32, where the
// filter comes as two tensors, high and low parts.
template <class Element_, class Operand_, IgemmTileKind kKind_>
struct IgemmTile {
  using Element = Element_;
  using Operand = Operand_;
  static constexpr IgemmTileShape kShape = shape_of(kKind_);
  static constexpr bool kPingPong = kShape.ping_pong;
  static constexpr bool kSplit =
      kKind_ == IgemmTileKind::kSplit128x64 || kKind_ == IgemmTileKind::kSplit128x128;
  static constexpr int kCluster = kShape.cluster;
  static constexpr int kM = kShape.rows, kN = kShape.columns;

  // A step of the main loop: 128 bytes of channels, a row of the widest swizzle, in four products.
  static constexpr int kRowBytes = 128;
  static constexpr int kDepth = kRowBytes / static_cast<int>(sizeof(Element));
  static constexpr int kProducts = 4;

  // Pixels of one warpgroup, in blocks of wgmma's 64.
  static constexpr int kBlocks = (kPingPong ? kM : kM / 2) / 64;
  static constexpr int kSums = kN / 2;  // registers a block

  static constexpr int kBytesA = kM * kRowBytes;
  static constexpr int kPartB = kN * kRowBytes / kCluster;  // what a block of the cluster loads
  static constexpr int kBytesB = kN * kRowBytes;
  static constexpr int kStageBytes = kBytesA + kBytesB * (kSplit ? 2 : 1);

  // Results pass through shared memory 64 pixels at a time. 64 filters make 128 bytes of a 16-bit
  // pixel, a whole line; where a stage has 48 KB, 32 filters leave room for a fourth one.
  static constexpr int kPartColumns = kStageBytes > 32768 ? 32 : 64;
  static constexpr int kParts = kN / kPartColumns;  // a block of 64 pixels
  static constexpr int kPitch = stage_pitch(kPartColumns);

  static constexpr int64_t kAside = 2 * 64 * (kPitch * 4 + 8) + 256 + 4 * 64;  // with margins
  static constexpr int kStages = static_cast<int>((227 * 1024 - kAside) / kStageBytes) < 8
                                     ? static_cast<int>((227 * 1024 - kAside) / kStageBytes)
                                     : 8;
  static_assert(kStages >= 4, "a copy takes about a microsecond: as long as two steps or three");
  static_assert(kBlocks * kSums <= 128 && (!kSplit || kBlocks * kSums <= 64),
                "232 registers hold 128 sums, of 3xTF32 64 and as many of the tensor cores");
  static_assert(kStageBytes % 1024 == 0 && kPartB % 1024 == 0, "the swizzle's pattern");

  // Each warp of each block that reads a stage says when it has done so.
  static constexpr int kReleases = 4 * (kPingPong ? 1 : 2) * kCluster;
};

template <class Tile>
struct IgemmMemory {
  unsigned char* stages;  // [kStages]: activations, filter
  float* sums;            // [2][64][kPitch]: of a warpgroup, on their way out
  int64_t* offsets;       // [2][64]: of their pixels
  uint64_t *full, *empty;

  __host__ __device__ explicit IgemmMemory(SharedCarver& carver)
      : stages(carver.take<unsigned char>(Tile::kStages * Tile::kStageBytes, 1024)),
        sums(carver.take<float>(2 * 64 * Tile::kPitch, 1024)),
        offsets(carver.take<int64_t>(2 * 64)),
        full(carver.take<uint64_t>(Tile::kStages)),
        empty(carver.take<uint64_t>(Tile::kStages)) {}

  __device__ uint32_t stage(int i) const {
    return ptx::shared_address(stages) + static_cast<uint32_t>(i * Tile::kStageBytes);
  }
};

// Where the loop is in the ring of stages.
template <class Tile>
struct IgemmRing {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage == Tile::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  __device__ void skip(int steps) {
    const int to = stage + steps, rounds = to / Tile::kStages;
    stage = to - rounds * Tile::kStages;
    parity ^= static_cast<uint32_t>(rounds) & 1;
  }
};

// A tile of the list. Filter tiles of the same pixels follow each other, so that blocks that run
// together read the same activations: 132 blocks at K = 512 in tiles of 128 read 33 pixel tiles,
// from DRAM once, and the whole filter, which stays in L2 (3x3 on 512 channels: 4.7 of 60 MB).
struct IgemmTileAt {
  int split, phase, group, first_out;  // first_out: in the group
  int64_t first_pixel;

  template <class Tile>
  static __device__ IgemmTileAt of(const IgemmParams& t, int tile) {
    const int filter_tiles = t.G * t.group_tiles;
    IgemmTileAt at;
    at.split = tile / t.split_tiles;
    tile -= at.split * t.split_tiles;
    const int pixel_tile = tile / filter_tiles, filter_tile = tile - pixel_tile * filter_tiles;
    at.phase = 0;
    while (at.phase + 1 < t.phase_count && pixel_tile >= t.phases[at.phase + 1].first_tile) {
      ++at.phase;
    }
    at.group = filter_tile / t.group_tiles;
    at.first_out = (filter_tile - at.group * t.group_tiles) * Tile::kN;
    // The blocks of a cluster have neighbouring pixels and the same filters.
    int64_t index = int64_t{pixel_tile - t.phases[at.phase].first_tile} * Tile::kCluster;
    if constexpr (Tile::kCluster > 1) index += ptx::cluster_rank();
    at.first_pixel = index * Tile::kM;
    return at;
  }
};

// The steps of a tile: taps inside channels, its split's share of them.
struct IgemmSteps {
  int first, count;
  __device__ IgemmSteps(const IgemmParams& t, const IgemmTileAt& at, int depth) {
    const IgemmPhase& phase = t.phases[at.phase];
    const int64_t all = phase.taps_h * phase.taps_w * ((t.red + depth - 1) / depth);
    first = static_cast<int>(all * at.split / t.splits);
    count = static_cast<int>(all * (at.split + 1) / t.splits) - first;
  }
};

// The tiles of this block: every grid-th from its own number on.
template <class Tile>
struct IgemmTiles {
  int tile, step;
  __device__ IgemmTiles()
      : tile(static_cast<int>(blockIdx.x) / Tile::kCluster),
        step(static_cast<int>(gridDim.x) / Tile::kCluster) {}
};

}  // namespace igemm_sm90
}  // namespace cuda
}  // namespace fastconv
