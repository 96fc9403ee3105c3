// The way of a tile's results from float32 sums in shared memory to global memory: epilogue, one
// rounding, wide stores along whichever of channels and pixels lies innermost; and each channel's
// (mean, M2) over the tile for a BatchNorm that follows.
#pragma once

#include "cuda/conv2d.h"
#include "cuda/conv2d_statistics.h"

namespace fastconv {
namespace cuda {

// Sums [rows][cols] in shared memory, `pitch` floats a row, where pitch % 32 == 4 (16-byte aligned
// rows; lanes along rows or columns meet no bank twice). Row: a pixel; column: a filter.
struct StagedTile {
  float* sums;
  int pitch;
  int rows, cols;          // the buffer's, compile-time sizes of the caller
  const int64_t* offsets;  // [rows] of the row's pixel in `out`, without its channel; -1: none
  int first_k;             // column 0's channel in scale, shift, `out`
  int filters;             // columns that exist, from 0 on; <= cols
};

// Where store_tile() writes.
struct StageTarget {
  EpilogueParams epilogue;
  void* out;
  int64_t channel_stride;  // of out and the residual, in elements
  bool vector;             // channel_stride 1; out, residual and every offset allow 16-byte packs
  float* partials;         // null, or [tile][K][2] of conv2d_statistics.h: this tile's part
};

}  // namespace cuda
}  // namespace fastconv
