// How the Hopper implicit GEMM kernel's warpgroups store their sums.
#pragma once

#include "cuda/conv2d_igemm_sm90_tile.h"
#include "cuda/conv2d_stage.h"
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/fence.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/opaque.h"
#include "cuda/ptx/tma.h"

namespace fastconv {
namespace cuda {
namespace igemm_sm90 {

constexpr int kStoreBarrier = 1;  // and the next: of one multiplying warpgroup

template <class Tile>
using IgemmSums = float[Tile::kBlocks][Tile::kSums];

// ---- any layout, epilogue and statistics ----

// kPartColumns filters of a block's sums into shared memory.
template <class Tile>
__device__ inline void stage_part(const float (&d)[Tile::kSums], int first, int thread, float* to) {
  const int lane = thread % 32, warp = thread / 32;
  float* const at = to + (16 * warp + lane / 4) * Tile::kPitch + 2 * (lane % 4);
#pragma unroll
  for (int i = 0; i < Tile::kPartColumns / 8; ++i) {
    const float* from = d + first + 4 * i;
    store_pack(at + 8 * i, Pack<float, 2>{from[0], from[1]});
    store_pack(at + 8 * i + 8 * Tile::kPitch, Pack<float, 2>{from[2], from[3]});
  }
}

// Where the 64 pixels from `first` on lie in `out`.
__device__ inline void write_offsets(const IgemmParams& t, const IgemmPhase& phase, int64_t first,
                                     int thread, int64_t* offsets) {
  if (thread >= 64) return;
  const int64_t index = first + thread;
  const Pixel at = pixel_at(min(index, phase.pixels - 1), phase.rows, phase.cols);
  offsets[thread] = index < phase.pixels ? phase.origin + offset_of(t.dst, at) : -1;
}

template <class Tile>
__device__ inline void store_staged(const IgemmParams& t, const IgemmMemory<Tile>& memory,
                                    const IgemmTileAt& tile, int first_row,
                                    const IgemmSums<Tile>& d) {
  const IgemmPhase& phase = t.phases[tile.phase];
  // Rolled, with the registers picked by a constant inside: the epilogue's code is there once.
#pragma unroll 1
  for (int part = 0; part < Tile::kBlocks * Tile::kParts; ++part) {
    const int index = ptx::opaque(static_cast<int>(threadIdx.x)), thread = index % 128;
    const int consumer = index / 128 - 1;
    const auto sync = [consumer] { ptx::named_barrier_sync(kStoreBarrier + consumer, 128); };
    float* const sums = memory.sums + consumer * 64 * Tile::kPitch;
    int64_t* const offsets = memory.offsets + consumer * 64;
    const int block = part / Tile::kParts;
    const int first_out = tile.first_out + part % Tile::kParts * Tile::kPartColumns;
    const int64_t first_pixel = tile.first_pixel + first_row + block * 64;
    if (first_pixel >= phase.pixels) return;
    if (first_out >= t.outs) continue;
    if (part % Tile::kParts == 0) write_offsets(t, phase, first_pixel, thread, offsets);
#pragma unroll
    for (int i = 0; i < Tile::kBlocks * Tile::kParts; ++i) {
      if (i == part) {
        stage_part<Tile>(d[i / Tile::kParts], i % Tile::kParts * (Tile::kPartColumns / 2), thread,
                         sums);
      }
    }
    const StagedTile staged = {sums, offsets, tile.group * t.outs + first_out,
                               min(Tile::kPartColumns, t.outs - first_out)};
    sync();
    store_tile<typename Tile::Element, 64, Tile::kPartColumns, 128>(
        staged, t.target, first_pixel / kStatisticsRows, thread, sync);
    sync();  // before `sums` is written again
  }
}

// ---- 16-bit results whose pixels and filters lie as the tile has them ----

// Rounded in registers, two neighbouring filters in one: half the bytes of the sums pass through
// shared memory, without conflicts, and TMA clips at the tensor's edges. 64 filters are eight
// matrices of 8 x 8 wide, a swizzled row.
template <class T>
__device__ inline uint32_t round_pair(float low, float high) {
  const Pack<T, 2> pair = {narrow<T>(low), narrow<T>(high)};
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

// scale, shift and ReLU of two neighbouring filters.
struct PairEpilogue {
  float scale[2] = {1.0f, 1.0f}, shift[2] = {-0.0f, -0.0f};  // -0 changes no number, -0 among them
  bool relu;

  __device__ PairEpilogue(const EpilogueParams& e, int k, int K)
      : relu(e.activation == Activation::kReLU) {
    if (k >= K) return;
    if (e.scale != nullptr) load(static_cast<const float*>(e.scale) + k, scale);
    if (e.shift != nullptr) load(static_cast<const float*>(e.shift) + k, shift);
  }
  // One by one: nobody promises that these begin at a multiple of 8 bytes.
  static __device__ void load(const float* from, float (&to)[2]) {
    to[0] = from[0];
    to[1] = from[1];
  }
  template <class T>
  __device__ uint32_t operator()(float low, float high) const {
    low = low * scale[0] + shift[0];
    high = high * scale[1] + shift[1];
    if (relu) {
      low = activate(low, Activation::kReLU, 0.0f);
      high = activate(high, Activation::kReLU, 0.0f);
    }
    return round_pair<T>(low, high);
  }
};

// 64 pixels of 64 filters, from register `first` on, into the box at `to`.
template <class Tile>
__device__ inline void write_box(const IgemmParams& t, const float (&d)[Tile::kSums], int first,
                                 int first_out, int thread, uint32_t to) {
  using T = typename Tile::Element;
  const int lane = thread % 32, row = thread / 32 * 16 + lane % 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // 16 filters
    const float* from = d + first + 8 * i;
    const int k = first_out + 16 * i + 2 * (lane % 4);
    const PairEpilogue left(t.target.epilogue, k, t.outs), right(t.target.epilogue, k + 8, t.outs);
    const uint32_t matrices[4] = {
        left.operator()<T>(from[0], from[1]), left.operator()<T>(from[2], from[3]),
        right.operator()<T>(from[4], from[5]), right.operator()<T>(from[6], from[7])};
    const int unit = (2 * i + lane / 16) ^ row % 8;
    ptx::stmatrix(to + static_cast<uint32_t>(row * 128 + unit * 16), matrices);
  }
}

template <class Tile>
__device__ inline void store_boxes(const IgemmParams& t, const IgemmMemory<Tile>& memory,
                                   const IgemmTileAt& tile, int consumer, int first_row,
                                   const IgemmSums<Tile>& d) {
  static_assert(64 * Tile::kPitch * 4 >= 64 * 128 && 64 * Tile::kPitch * 4 % 1024 == 0,
                "a box fits where the sums would go, and begins with the swizzle's pattern");
  const uint32_t box = ptx::shared_address(memory.sums + consumer * 64 * Tile::kPitch);
  const int64_t pixels = t.phases[0].pixels;
#pragma unroll
  for (int block = 0; block < Tile::kBlocks; ++block) {
#pragma unroll
    for (int part = 0; part < Tile::kN / 64; ++part) {
      const int64_t first_pixel = tile.first_pixel + first_row + block * 64;
      const int first_out = tile.first_out + part * 64;
      if (first_pixel >= pixels || first_out >= t.outs) continue;
      const int thread = ptx::opaque(static_cast<int>(threadIdx.x)) % 128;
      if (thread == 0) ptx::tma_store_wait_read<0>();  // the box before
      ptx::named_barrier_sync(kStoreBarrier + consumer, 128);
      write_box<Tile>(t, d[block], part * 32, first_out, thread, box);
      ptx::fence_proxy_async();
      ptx::named_barrier_sync(kStoreBarrier + consumer, 128);
      if (thread == 0) {
        ptx::tma_store(&t.results, box, {first_out, static_cast<int>(first_pixel)});
        ptx::tma_store_commit();
      }
    }
  }
}

// ---- a split's sums, as they are ----

// Four lanes fill a sector of 32 bytes.
template <class Tile>
__device__ inline void store_partial(const IgemmParams& t, const IgemmTileAt& tile, int first_row,
                                     const IgemmSums<Tile>& d) {
  const int thread = ptx::opaque(static_cast<int>(threadIdx.x)) % 128;
  const int64_t pixels = t.phases[0].pixels;
  const int first_out = tile.first_out + 2 * (thread % 4);
#pragma unroll
  for (int half = 0; half < 2 * Tile::kBlocks; ++half) {
    const int64_t pixel = tile.first_pixel + first_row + half / 2 * 64 + half % 2 * 8 +
                          thread / 32 * 16 + thread % 32 / 4;
    if (pixel >= pixels) continue;
    float* const to =
        t.partial_sums + ((tile.split * pixels + pixel) * t.G + tile.group) * t.outs + first_out;
#pragma unroll
    for (int i = 0; i < Tile::kSums / 4; ++i) {
      const float* from = d[half / 2] + 4 * i + half % 2 * 2;
      if (first_out + 8 * i < t.outs) to[8 * i] = from[0];
      if (first_out + 8 * i + 1 < t.outs) to[8 * i + 1] = from[1];
    }
  }
}

template <class Tile>
__device__ inline void store(const IgemmParams& t, const IgemmMemory<Tile>& memory,
                             const IgemmTileAt& tile, int consumer, int first_row,
                             const IgemmSums<Tile>& d) {
  if (t.splits > 1) return store_partial<Tile>(t, tile, first_row, d);
  if constexpr (sizeof(typename Tile::Element) == 2) {
    if (t.boxes) return store_boxes<Tile>(t, memory, tile, consumer, first_row, d);
  }
  store_staged<Tile>(t, memory, tile, first_row, d);
}

// Shared memory stays until the last box has been read.
__device__ inline void finish_store(const IgemmParams& t) {
  if (t.boxes && threadIdx.x % 128 == 0) ptx::tma_store_wait_read<0>();
}

}  // namespace igemm_sm90
}  // namespace cuda
}  // namespace fastconv
