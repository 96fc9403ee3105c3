// The way of a tile's results from float32 sums in shared memory to global memory: epilogue, one
// rounding, wide stores along whichever of channels and pixels lies innermost; and each channel's
// (mean, M2) over the tile for a BatchNorm that follows.
#pragma once

#include "cuda/conv2d.h"
#include "cuda/conv2d_statistics.h"

namespace fastconv {
namespace cuda {

// Floats in a row of staged sums: at least 4 more than the columns, and 4 more than a multiple of
// 32. Rows are then 16-byte aligned, and eight lanes that read 16 bytes each meet every bank once,
// whether they stand side by side in a row or one below the other.
constexpr int stage_pitch(int cols) { return (cols + 31) / 32 * 32 + 4; }
constexpr int64_t stage_floats(int rows, int cols) { return int64_t{rows} * stage_pitch(cols); }

// Sums [kRows][kCols] in shared memory, stage_pitch(kCols) floats a row, 16-byte aligned. Row: a
// pixel; column: a filter.
struct StagedTile {
  float* sums;
  const int64_t* offsets;  // [kRows] of the row's pixel in `out`, without its channel; -1: none
  int first_k;             // column 0's channel in scale, shift, `out`
  int filters;             // columns that exist, from 0 on; <= kCols
};

// Where store_tile() writes.
struct StageTarget {
  EpilogueParams epilogue;
  void* out;
  int64_t channel_stride;  // of out and the residual, in elements
  int channels;            // of out: K, or in dgrad C
  bool vector;             // channel_stride 1; out, residual and every offset allow 16-byte packs
  float* partials;         // null, or [tile][K][2] of conv2d_statistics.h
};

// Stores a tile's results, rounded to T (float, __half, __nv_bfloat16), and its part of the
// statistics. kThreads threads call it, `thread` being 0 to kThreads - 1: a block, or a warpgroup.
// They have synchronised since the sums and offsets were written, and do so again before they
// write them anew. sync() is a barrier of just these threads; it is called only with partials.
// The sums are overwritten with partials.
template <class T, int kRows, int kCols, int kThreads, class Sync>
__device__ inline void store_tile(const StagedTile& from, const StageTarget& to, int64_t tile,
                                  int thread, Sync&& sync);

// ---- On the host ---------------------------------------------------------------------------

// The output of fprop; the gradient of the input. `partials` as in StageTarget.
StageTarget fprop_target(const Conv2dProblem& p, const Conv2dArgs& args, float* partials = nullptr);
StageTarget dgrad_target(const Conv2dProblem& p, const Conv2dArgs& args);

}  // namespace cuda
}  // namespace fastconv
