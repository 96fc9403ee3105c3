// What a block of Hopper's filter gradient does, read off its parameters: its piece of the line of
// units, the tiles of a unit, the channels of a chunk, and where partial sums lie.
#pragma once

#include <cuda.h>  // CUtensorMap; nothing of the driver is linked

#include "cuda/conv2d.h"
#include "cuda/conv2d_igemm_sm90_wgrad.h"

namespace fastconv {
namespace cuda {
namespace sm90_wgrad {

struct Params {
  ConvParams conv;                            // its groups are those of the plan
  int merged, group_channels, group_filters;  // of the problem's groups in each
  float* slots;                               // partial sums, tiles of rows by columns
  bool vector;  // four channels of the filter are neighbours and aligned
  bool tiled;   // the input's map: a 1x1 filter sees the pixels as they lie
  Share share;
  int cluster;
  int k_units, column_units;  // of a group: tiles, or pairs of them
  int channel_chunks, chunks;
  int64_t units, work;                          // work: units * unit_steps
  int steps, unit_steps, worker_steps, pieces;  // as in Plan
  PixelStep step;                               // what a step of pixels on means
};

// A unit's tile of block `rank`.
struct TileAt {
  int group, first_k, first_chunk;
};
__device__ inline TileAt tile_at(const Params& t, int64_t unit, int rank, int rows, int chunks) {
  const Division by_column = divide(unit, t.column_units);
  const Division by_k = divide(by_column.quotient, t.k_units);
  int k = by_k.remainder, column = by_column.remainder;
  if (t.share == Share::kInput) k = k * kPair + rank;
  if (t.share == Share::kGrad) column = column * kPair + rank;
  return {static_cast<int>(by_k.quotient), k * rows, column * chunks};
}

// The steps of one unit in a worker's piece, and the slot for their sums: -1 where they are all.
struct Segment {
  int64_t unit;
  int first_step, steps, slot;
};

// Walks over the segments of a piece. Only its first and its last can be parts of a unit.
struct Piece {
  const Params& t;
  int64_t begin, end, at;

  __device__ explicit Piece(const Params& params, int64_t worker)
      : t(params),
        begin(worker * params.worker_steps),
        end(min(begin + params.worker_steps, params.work)),
        at(begin) {}
  __device__ bool next(Segment& segment) {
    if (at >= end) return false;
    const Division by_unit = divide(at, t.unit_steps);
    const int64_t unit_end = at - by_unit.remainder + t.unit_steps;
    const int64_t stop = min(end, unit_end);
    segment.unit = by_unit.quotient;
    segment.first_step = by_unit.remainder;
    // A last piece reaches beyond the steps that there are.
    segment.steps = min(static_cast<int>(stop - at), t.steps - segment.first_step);
    segment.slot = segment.steps == t.steps ? -1 : at == begin ? 0 : 1;
    at = stop;
    return true;
  }
};

// Of whole units the pieces of the same pixels run together.
__device__ inline int64_t worker_of(const Params& t, int64_t cluster) {
  if (t.pieces == 0) return cluster;
  return cluster % t.units * t.pieces + cluster / t.units;
}
// Of all slots, a worker's: one where its piece begins, and unless units are whole pieces one where
// it ends.
__device__ inline int64_t slot_at(const Params& t, int64_t worker, int slot, int rank) {
  return (worker * (t.pieces == 0 ? 2 : 1) + slot) * t.cluster + rank;
}

// Which workers have a part of a unit, and in which of their slots.
struct Parts {
  int64_t first, last;
};
__device__ inline Parts parts_of(const Params& t, int64_t unit) {
  const int64_t begin = unit * t.unit_steps;
  return {divide(begin, t.worker_steps).quotient,
          divide(begin + t.steps - 1, t.worker_steps).quotient};
}
__device__ inline int part_slot(const Params& t, int64_t unit, int64_t worker) {
  return worker * t.worker_steps < unit * t.unit_steps ? 1 : 0;
}

// A chunk of columns: 64 channels of a tap.
struct ChunkAt {
  int r, s, c;  // c: within the group
};
__device__ inline ChunkAt chunk_at(const Params& t, int chunk) {
  const int tap = chunk / t.channel_chunks, r = tap / t.conv.S;
  return {r, tap - r * t.conv.S, (chunk - tap * t.channel_chunks) * kChunk};
}

// Launches what sums a float32 problem's pieces; conv2d_igemm_sm90_wgrad_float32.cu.
void launch_float32(const Plan& plan, const Params& t, const CUtensorMap& grad,
                    const CUtensorMap& input, const char* name, void* stream);

}  // namespace sm90_wgrad
}  // namespace cuda
}  // namespace fastconv
