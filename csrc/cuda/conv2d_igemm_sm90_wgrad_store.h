// How sums of Hopper's filter gradient leave a block: into the gradient where a block has all of
// them, otherwise into a slot of partial sums, which a second kernel adds up in order.
#pragma once

#include <cstring>

#include "cuda/conv2d.h"
#include "cuda/conv2d_igemm_sm90_wgrad_work.h"
#include "cuda/ptx/griddepcontrol.h"

namespace fastconv {
namespace cuda {
namespace sm90_wgrad {

// Two neighbouring lanes have two columns each of two groups of eight: after an exchange the even
// one has four of the first, the odd one four of the second.
__device__ inline Pack<float, 4> four_columns(bool odd, const float (&first)[2],
                                              const float (&second)[2]) {
  const float low = __shfl_xor_sync(0xffffffffu, odd ? first[0] : second[0], 1);
  const float high = __shfl_xor_sync(0xffffffffu, odd ? first[1] : second[1], 1);
  return odd ? Pack<float, 4>{{low, high, second[0], second[1]}}
             : Pack<float, 4>{{first[0], first[1], low, high}};
}

// Where a consumer's sums begin in its block's tile.
struct Part {
  int row, chunk;
};
template <class Tile>
__device__ inline Part part_of(int consumer) {
  if (Tile::kTall) return {consumer * 64, 0};
  return {0, consumer * Tile::kOwnChunks};
}

// Calls put(row, column, four sums side by side) for all of a thread's sums of its part.
template <class Tile, class Put>
__device__ inline void each_four(const float (&sums)[Tile::kSums], Put&& put) {
  const int lane = static_cast<int>(threadIdx.x) % 32, pair = lane % 4;
  const bool odd = pair % 2 != 0;
  const int first_row = static_cast<int>(threadIdx.x) / 32 % 4 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < Tile::kColumns / 8; i += 2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int d = i * 4 + half * 2;
      const float first[2] = {sums[d], sums[d + 1]}, second[2] = {sums[d + 4], sums[d + 5]};
      put(first_row + half * 8, i * 8 + odd * 8 + pair / 2 * 4, four_columns(odd, first, second));
    }
  }
}

// 16 bytes as one number: member by member, nvcc forgets their alignment and stores 4 at a time.
__device__ inline void store_four(float* to, const Pack<float, 4>& four) {
  using Whole = unsigned __int128;
  static_assert(sizeof(Whole) == sizeof(four) && alignof(Whole) == kPackBytes, "a pack");
  uint32_t words[4];
  memcpy(words, &four, sizeof(words));
  *reinterpret_cast<Whole*>(to) =
      Whole{words[0]} | Whole{words[1]} << 32 | Whole{words[2]} << 64 | Whole{words[3]} << 96;
}

// All columns, whether they exist or not: wgrad_reduce_kernel() knows what to read.
template <class Tile>
__device__ inline void store_slot(float* slot, const Part& part, int rows,
                                  const float (&sums)[Tile::kSums]) {
  constexpr int kRowSums = Tile::kChunks * kChunk;
  float* to = slot + part.row * kRowSums + part.chunk * kChunk;
  each_four<Tile>(sums, [&](int row, int column, const Pack<float, 4>& four) {
    if (part.row + row < rows) store_four(to + row * kRowSums + column, four);
  });
}

// Four channels of a filter's tap into the gradient: those of them that exist, and of merged groups
// those of the filter's own.
template <class T>
__device__ inline void store_gradient(const Params& t, int group, int k, const ChunkAt& chunk,
                                      int column, const Pack<float, 4>& four) {
  if (k >= t.conv.k_per_group) return;
  const int own = t.merged == 1 ? 0 : k / t.group_filters;
  const int c = chunk.c + column - own * t.group_channels;
  if (c <= -4 || c >= t.group_channels) return;
  T* to = static_cast<T*>(t.conv.out) + (int64_t{group} * t.conv.k_per_group + k) * t.conv.flt.n +
          chunk.r * t.conv.flt.h + chunk.s * t.conv.flt.w + c * t.conv.flt.c;
  Pack<T, 4> values;
#pragma unroll
  for (int i = 0; i < 4; ++i) values.at[i] = narrow<T>(four.at[i]);
  if (t.vector) {
    store_pack(to, values);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (within(c + i, t.group_channels)) to[i * t.conv.flt.c] = values.at[i];
  }
}

template <class Tile>
__device__ inline void store_whole(const Params& t, const TileAt& at, const Part& part,
                                   const float (&sums)[Tile::kSums]) {
  each_four<Tile>(sums, [&](int row, int column, const Pack<float, 4>& four) {
    const int chunk = at.first_chunk + part.chunk + column / kChunk;
    if (chunk >= t.chunks) return;
    store_gradient<typename Tile::T>(t, at.group, at.first_k + part.row + row, chunk_at(t, chunk),
                                     column % kChunk, four);
  });
}

// A consumer's sums of a segment.
template <class Tile>
__device__ inline void store_sums(const Params& t, const Segment& segment, int consumer, int rank,
                                  int64_t worker, const float (&sums)[Tile::kSums]) {
  const Part part = part_of<Tile>(consumer);
  const TileAt at = tile_at(t, segment.unit, rank, Tile::kRows, Tile::kChunks);
  if (segment.slot < 0) {
    store_whole<Tile>(t, at, part, sums);
  } else {
    const int64_t slot = slot_at(t, worker, segment.slot, rank);
    store_slot<Tile>(t.slots + slot * Tile::kTileSums, part, t.conv.k_per_group - at.first_k, sums);
  }
}

constexpr int kReduceThreads = 128;

// Four neighbouring sums of a unit that no worker has whole: its parts, added up in order.
template <class T>
__global__ void __launch_bounds__(kReduceThreads)
    wgrad_reduce_kernel(const __grid_constant__ Params t, int rows, int chunks) {
  ptx::griddepcontrol_wait();  // launched while the last pieces are still summed
  const int quads = chunks * (kChunk / 4), tile_quads = rows * quads;
  const int64_t all = t.units * t.cluster * tile_quads;
  for (int64_t i = blockIdx.x * int64_t{kReduceThreads} + threadIdx.x; i < all;
       i += gridDim.x * int64_t{kReduceThreads}) {
    const Division in_tile = divide(i, tile_quads);
    const Division by_rank = divide(in_tile.quotient, t.cluster);
    const int64_t unit = by_rank.quotient;
    const int rank = by_rank.remainder;
    const TileAt tile = tile_at(t, unit, rank, rows, chunks);
    const int k = tile.first_k + in_tile.remainder / quads;
    const int column = in_tile.remainder % quads * 4;
    const int chunk = tile.first_chunk + column / kChunk;
    if (k >= t.conv.k_per_group || chunk >= t.chunks) continue;
    const Parts parts = parts_of(t, unit);
    if (parts.first == parts.last) continue;  // that worker has stored it
    Pack<float, 4> sum = {};
#pragma unroll 4  // loads in flight; the additions stay in order
    for (int64_t worker = parts.first; worker <= parts.last; ++worker) {
      const int64_t at = slot_at(t, worker, part_slot(t, unit, worker), rank);
      const Pack<float, 4> part =
          load_pack<float, 4>(t.slots + (at * tile_quads + in_tile.remainder) * 4);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum.at[e] += part.at[e];
    }
    store_gradient<T>(t, tile.group, k, chunk_at(t, chunk), column % kChunk, sum);
  }
}

// Nothing where each unit was summed by one worker.
template <class T>
void launch_reduce(const Plan& plan, const Params& t, const char* name, void* stream) {
  if (t.slots == nullptr) return;
  const int64_t quads = plan.units * t.cluster * plan.tile.sums() / 4;
  launch_kernel({name, blocks_for(quads, kReduceThreads), kReduceThreads, stream, 0, 1, true},
                &wgrad_reduce_kernel<T>, t, plan.tile.rows, plan.tile.chunks);
}

}  // namespace sm90_wgrad
}  // namespace cuda
}  // namespace fastconv
