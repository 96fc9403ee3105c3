// Implicit GEMM convolutions on Hopper's tensor cores: what the host prepares and the kernel reads.
//
// fprop and dgrad are one loop. The results are matrix products
//   results [pixels x outs] = sum over taps of activations [pixels x red] * filter [red x outs]
// where activations are what the window slides over (input or gradient) and red and outs its
// channels and the result's, of one group. dgrad with a stride falls into stride_h * stride_w
// phases, the results of which meet the same taps each; fprop is one phase.
//
// A namespace of its own: other kernels' files have tiles and parameters of the same names, and the
// linker takes two templates over such types for one.
#pragma once

#include "cuda/conv2d_stage.h"
#include "cuda/tensor_map.h"

namespace fastconv {
namespace cuda {
namespace igemm_sm90 {

constexpr int kMostPhases = 4;          // of stride 2; each has a tensor map of its own
constexpr int kIgemmThreads = 3 * 128;  // a warpgroup that loads, two that multiply
constexpr int kStatisticsRows = 64;     // pixels of one partial (mean, M2)

struct IgemmPhase {
  int64_t pixels;        // N * rows * cols
  int64_t origin;        // of its first pixel in `out`
  int rows, cols;        // results of an image
  int first_tile;        // in the list of pixel tiles
  int start_h, start_w;  // where the first result's window begins in the activations
  int taps_h, taps_w;
  int first_r, first_s;    // the filter's row and column of the first tap
  int offset_h, offset_w;  // where in the window the first tap lies
};

struct IgemmParams {
  CUtensorMap activations[kMostPhases];
  CUtensorMap filter;
  CUtensorMap results;  // where `boxes`
  IgemmPhase phases[kMostPhases];
  StageTarget target;
  Strides4 dst;                // from one of a phase's results to the next
  int phase_count, tiles;      // tiles: pixel tiles times filter tiles
  int splits, split_tiles;     // split_tiles: tiles of one split
  float* partial_sums;         // of more than one split: [split][pixel][G * outs]
  int group_tiles, G;          // filter tiles of a group
  int red, outs;               // a group
  int jump_h, jump_w;          // of the window from one result to the next
  int move_h, move_w;          // in the window from one tap to the next, negative in dgrad
  int tap_step_h, tap_step_w;  // in the filter from one tap to the next
  int S;
  int low_row;  // of the filter's map: where its low parts begin (3xTF32)
  bool boxes;   // 16-bit results leave by TMA, in boxes of 64 pixels and 64 filters
  bool tiled;   // the activations' map is [pixels][channels], not im2col
};

// The shapes of tile that exist. `columns`: filters. In ping-pong each of the two warpgroups has a
// tile of its own and stores it while the other multiplies; otherwise they share one.
enum class IgemmTileKind { kPing128x64, kPing128x128, kWide128x256, kSplit128x64, kSplit128x128 };
struct IgemmTileShape {
  IgemmTileKind kind;
  int rows, columns, cluster;
  bool ping_pong;
};
constexpr IgemmTileShape kIgemmTiles[] = {
    {IgemmTileKind::kPing128x64, 128, 64, 1, true},
    {IgemmTileKind::kPing128x128, 128, 128, 2, true},
    {IgemmTileKind::kWide128x256, 128, 256, 2, false},
    {IgemmTileKind::kSplit128x64, 128, 64, 1, false},    // 3xTF32
    {IgemmTileKind::kSplit128x128, 128, 128, 1, false},  // 3xTF32
};
constexpr const IgemmTileShape& shape_of(IgemmTileKind kind) {
  return kIgemmTiles[static_cast<int>(kind)];
}

// Few tiles of long sums are split over more blocks: each split's sums stay float32, and a second
// kernel adds them up in order and has the epilogue.
struct IgemmReduction {
  const float* partial_sums;  // [splits][pixels][K]
  int64_t pixels;
  int K, splits;
  int rows, cols;  // of an image of results
  Strides4 dst;
  EpilogueParams epilogue;
  void* out;
};
void reduce_igemm(const char* name, DType dtype, const IgemmReduction& t, void* stream);

// One for each element type, in files of their own: each takes ptxas half a minute.
void launch_igemm_bfloat16(const Launch& launch, IgemmTileKind kind, const IgemmParams& t);
void launch_igemm_float16(const Launch& launch, IgemmTileKind kind, const IgemmParams& t);
void launch_igemm_float32(const Launch& launch, IgemmTileKind kind, const IgemmParams& t);

}  // namespace igemm_sm90
}  // namespace cuda
}  // namespace fastconv
