// The Hopper implicit GEMM kernel: persistent blocks of a warpgroup that has TMA fill a ring of
// stages and two that multiply them with wgmma and store.
#pragma once

#include "cuda/conv2d_igemm_sm90_store.h"
#include "cuda/conv2d_layout.h"
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/setmaxnreg.h"
#include "cuda/ptx/tma.h"
#include "cuda/ptx/wgmma.h"

namespace fastconv {
namespace cuda {
namespace igemm_sm90 {

constexpr int kOrderBarrier = 3;  // and the next: a warpgroup's turn in ping-pong

// ---- the warpgroup that loads ----

// Where a tile's windows begin, for either kind of map.
struct IgemmLoadAt {
  const CUtensorMap* map;
  bool tiled;
  int row;  // of a tiled map
  ptx::Im2colPosition window;
};

// One tap of kDepth channels from `c` on, of kM pixels and kN filters.
template <class Tile>
__device__ inline void load_step(const IgemmParams& t, const IgemmMemory<Tile>& memory, int stage,
                                 const IgemmLoadAt& at, int c, int tap, int filter_row) {
  const uint32_t full = ptx::shared_address(memory.full + stage);
  const uint32_t a = memory.stage(stage), b = a + Tile::kBytesA;
  ptx::mbarrier_arrive_expect_tx(full, Tile::kStageBytes);
  if (at.tiled) {
    ptx::tma_load(a, at.map, full, {at.window.c, at.row});
  } else {
    ptx::tma_load_im2col(a, at.map, full, at.window);
  }
  if constexpr (Tile::kCluster > 1) {
    const int rank = static_cast<int>(ptx::cluster_rank());
    ptx::tma_load_multicast(b + static_cast<uint32_t>(rank * Tile::kPartB), &t.filter, full,
                            (1 << Tile::kCluster) - 1,
                            {c, tap, filter_row + rank * (Tile::kN / Tile::kCluster)});
  } else {
    ptx::tma_load(b, &t.filter, full, {c, tap, filter_row});
  }
  if constexpr (Tile::kSplit) {
    ptx::tma_load(b + Tile::kBytesB, &t.filter, full, {c, tap, t.low_row + filter_row});
  }
}

// Taps run inside channels: the nine windows of a 3x3 filter overlap in all but an edge, and so
// close together their 128 bytes of each pixel are read from L2, not DRAM, eight times of nine.
template <class Tile>
__device__ inline void produce_tile(const IgemmParams& t, const IgemmMemory<Tile>& memory,
                                    const IgemmTileAt& tile, IgemmRing<Tile>& ring) {
  const IgemmPhase& phase = t.phases[tile.phase];
  const Pixel pixel = pixel_at(tile.first_pixel, phase.rows, phase.cols);
  IgemmLoadAt at;
  at.map = &t.activations[tile.phase];
  at.tiled = t.tiled;
  at.row = static_cast<int>(tile.first_pixel);
  at.window.w = pixel.col * t.jump_w + phase.start_w;
  at.window.h = pixel.row * t.jump_h + phase.start_h;
  at.window.n = static_cast<int>(pixel.n);
  const int filter_row = tile.group * t.outs + tile.first_out;
  const IgemmSteps steps(t, tile, Tile::kDepth);
  if (steps.count == 0) return;
  const int taps = phase.taps_h * phase.taps_w;
  int c = steps.first / taps * Tile::kDepth;
  int i = steps.first % taps / phase.taps_w, j = steps.first % taps % phase.taps_w;
  for (int step = 0; step < steps.count; ++step) {
    at.window.c = tile.group * t.red + c;
    at.window.offset_h = static_cast<uint16_t>(phase.offset_h + i * t.move_h);
    at.window.offset_w = static_cast<uint16_t>(phase.offset_w + j * t.move_w);
    const int row = phase.first_r + i * t.tap_step_h, col = phase.first_s + j * t.tap_step_w;
    ptx::mbarrier_wait(ptx::shared_address(memory.empty + ring.stage), ring.parity ^ 1);
    load_step<Tile>(t, memory, ring.stage, at, c, row * t.S + col, filter_row);
    ring.advance();
    if (++j < phase.taps_w) continue;
    j = 0;
    if (++i < phase.taps_h) continue;
    i = 0;
    c += Tile::kDepth;
  }
}

// ---- the warpgroups that multiply ----

// The warp has done with the stage. In a cluster every block fills part of every other's.
template <class Tile>
__device__ inline void release(const IgemmMemory<Tile>& memory, int stage) {
  const uint32_t empty = ptx::shared_address(memory.empty + stage);
  const uint32_t lane = threadIdx.x % 32;
  if constexpr (Tile::kCluster > 1) {
    if (lane < Tile::kCluster) ptx::mbarrier_arrive_remote(ptx::mapa(empty, lane));
  } else {
    if (lane == 0) ptx::mbarrier_arrive(empty);
  }
}

template <class Tile>
__device__ inline void clear(IgemmSums<Tile>& d) {
#pragma unroll
  for (int b = 0; b < Tile::kBlocks; ++b) {
#pragma unroll
    for (int i = 0; i < Tile::kSums; ++i) d[b][i] = 0.0f;
  }
}

template <class Tile>
__device__ inline void fence_registers(IgemmSums<Tile>& d) {
#pragma unroll
  for (int b = 0; b < Tile::kBlocks; ++b) ptx::wgmma_fence_registers(d[b]);
}

// One group of products is always under way while the next is issued. Calls seen_all() once every
// stage was seen filled.
template <class Tile, class SeenAll>
__device__ inline void multiply(const IgemmMemory<Tile>& memory, IgemmRing<Tile>& ring, int steps,
                                int first_row, IgemmSums<Tile>& d, SeenAll&& seen_all) {
  clear<Tile>(d);
  fence_registers<Tile>(d);
  if (steps == 0) {
    seen_all();
    return;
  }
  int before = 0;
  for (int step = 0; step < steps; ++step) {
    ptx::mbarrier_wait(ptx::shared_address(memory.full + ring.stage), ring.parity);
    const uint32_t a = memory.stage(ring.stage) + first_row * Tile::kRowBytes;
    const uint32_t b = memory.stage(ring.stage) + Tile::kBytesA;
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < Tile::kProducts; ++k) {
#pragma unroll
      for (int block = 0; block < Tile::kBlocks; ++block) {
        ptx::wgmma<typename Tile::Operand, Tile::kN>(
            d[block], ptx::encode_rows_of_128(a + block * 64 * Tile::kRowBytes + k * 32),
            ptx::encode_rows_of_128(b + k * 32), 1);
      }
    }
    ptx::wgmma_commit();
    if (step > 0) {
      ptx::wgmma_wait<1>();
      release<Tile>(memory, before);
    }
    before = ring.stage;
    ring.advance();
  }
  seen_all();
  ptx::wgmma_wait<0>();
  fence_registers<Tile>(d);
  release<Tile>(memory, before);
}

// The same for 3xTF32: activations are read into registers and split there, and what the tensor
// cores have added up over 32 channels moves to ordinary float32 sums, since they may truncate.
// Four of 64 additions a thread keep an SM's adders busy for 128 cycles; the twelve products of
// both warpgroups take 1536.
template <class Tile>
__device__ inline void multiply_split(const IgemmMemory<Tile>& memory, IgemmRing<Tile>& ring,
                                      int steps, int first_row, IgemmSums<Tile>& sums) {
  static_assert(Tile::kBlocks == 1, "one block's fragments fit the registers");
  const int lane = static_cast<int>(threadIdx.x) % 32,
            warp = static_cast<int>(threadIdx.x) / 32 % 4;
  const int row = first_row + 16 * warp + lane / 4;
  clear<Tile>(sums);
  float d[Tile::kSums];
  for (int step = 0; step < steps; ++step) {
    ptx::mbarrier_wait(ptx::shared_address(memory.full + ring.stage), ring.parity);
    const float* a =
        reinterpret_cast<const float*>(memory.stages + ring.stage * Tile::kStageBytes) + row * 32;
    uint32_t high[Tile::kProducts][4], low[Tile::kProducts][4];
#pragma unroll
    for (int k = 0; k < Tile::kProducts; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // (row, t), (row + 8, t), (row, t + 4), (row + 8, t + 4)
        const int unit = (2 * k + i / 2) ^ (lane / 4);  // row % 8 is lane / 4
        const Tf32Pair split = split_tf32(a[i % 2 * 8 * 32 + unit * 4 + lane % 4]);
        high[k][i] = split.hi;
        low[k][i] = split.lo;
      }
    }
    const uint32_t b = memory.stage(ring.stage) + Tile::kBytesA;
    ptx::wgmma_fence_registers(d);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < Tile::kProducts; ++k) {
      const uint64_t b_high = ptx::encode_rows_of_128(b + k * 32);
      const uint64_t b_low = ptx::encode_rows_of_128(b + Tile::kBytesB + k * 32);
      ptx::wgmma<ptx::Tf32, Tile::kN>(d, low[k], b_high, k > 0);  // the smallest products first
      ptx::wgmma<ptx::Tf32, Tile::kN>(d, high[k], b_low, 1);
    }
#pragma unroll
    for (int k = 0; k < Tile::kProducts; ++k) {
      ptx::wgmma<ptx::Tf32, Tile::kN>(d, high[k], ptx::encode_rows_of_128(b + k * 32), 1);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::wgmma_fence_registers(d);
    release<Tile>(memory, ring.stage);
    ring.advance();
#pragma unroll
    for (int i = 0; i < Tile::kSums; ++i) sums[0][i] += d[i];
  }
}

// A warpgroup without a pixel of the tile.
template <class Tile>
__device__ inline void pass(const IgemmMemory<Tile>& memory, IgemmRing<Tile>& ring, int steps) {
  for (int step = 0; step < steps; ++step) {
    ptx::mbarrier_wait(ptx::shared_address(memory.full + ring.stage), ring.parity);
    release<Tile>(memory, ring.stage);
    ring.advance();
  }
}

// A block's tiles go to its warpgroups in turn. The second may look at the ring only when the first
// has seen its last stage filled: an mbarrier tells this round from the next, not from the one
// after. From there on, the first's last products, its epilogue and the second's main loop overlap.
template <class Tile>
__device__ inline void consume(const IgemmParams& t, const IgemmMemory<Tile>& memory,
                               int consumer) {
  IgemmRing<Tile> ring;
  const int first_row = Tile::kPingPong ? 0 : consumer * 64 * Tile::kBlocks;
  IgemmTiles<Tile> tiles;
  int turn = 0;
  for (int tile = tiles.tile; tile < t.tiles; tile += tiles.step, turn ^= 1) {
    const IgemmTileAt at = IgemmTileAt::of<Tile>(t, tile);
    const int steps = IgemmSteps(t, at, Tile::kDepth).count;
    if (Tile::kPingPong && turn != consumer) {
      ring.skip(steps);
      continue;
    }
    if (Tile::kPingPong && tile != tiles.tile) {
      ptx::named_barrier_sync(kOrderBarrier + consumer, 256);
    }
    if (!Tile::kPingPong && at.first_pixel + first_row >= t.phases[at.phase].pixels) {
      pass<Tile>(memory, ring, steps);
      continue;
    }
    IgemmSums<Tile> d;
    if constexpr (Tile::kSplit) {
      multiply_split<Tile>(memory, ring, steps, first_row, d);
    } else {
      multiply<Tile>(memory, ring, steps, first_row, d, [&] {
        if (Tile::kPingPong && tile + tiles.step < t.tiles) {
          ptx::named_barrier_arrive(kOrderBarrier + 1 - consumer, 256);
        }
      });
    }
    store<Tile>(t, memory, at, consumer, first_row, d);
  }
  finish_store(t);
}

template <class Tile>
__global__ void __launch_bounds__(kIgemmThreads, 1)
    conv2d_igemm_sm90_kernel(const __grid_constant__ IgemmParams t) {
  SharedCarver carver(shared_memory());
  const IgemmMemory<Tile> memory(carver);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kStages; ++i) {
      ptx::mbarrier_init(ptx::shared_address(memory.full + i), 1);
      ptx::mbarrier_init(ptx::shared_address(memory.empty + i), Tile::kReleases);
    }
    ptx::fence_mbarrier_init();
  }
  if constexpr (Tile::kCluster > 1) {
    ptx::cluster_sync_relaxed();
  } else {
    __syncthreads();
  }
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_dec<40>();
    if (threadIdx.x < 32 && ptx::elect_one()) {
      ptx::tma_prefetch_map(&t.filter);
      IgemmRing<Tile> ring;
      IgemmTiles<Tile> tiles;
      for (int tile = tiles.tile; tile < t.tiles; tile += tiles.step) {
        produce_tile<Tile>(t, memory, IgemmTileAt::of<Tile>(t, tile), ring);
      }
    }
    __syncwarp();
  } else {
    ptx::setmaxnreg_inc<232>();
    consume<Tile>(t, memory, static_cast<int>(threadIdx.x) / 128 - 1);
    __syncwarp();
  }
  // Neither block ends while the other's copies or arrivals come.
  if constexpr (Tile::kCluster > 1) ptx::cluster_sync_relaxed();
}

// At most a block an SM: each has 227 KB of shared memory.
template <class Tile>
void launch_tile(Launch launch, const IgemmParams& t) {
  SharedCarver carver;
  const IgemmMemory<Tile> memory(carver);
  launch.threads = kIgemmThreads;
  launch.cluster = Tile::kCluster;
  launch.shared_bytes = carver.bytes();
  launch_kernel(launch, &conv2d_igemm_sm90_kernel<Tile>, t);
}

template <class Element, class Operand>
void launch_igemm(const Launch& launch, IgemmTileKind kind, const IgemmParams& t) {
  switch (kind) {
    case IgemmTileKind::kPing128x64:
      return launch_tile<IgemmTile<Element, Operand, IgemmTileKind::kPing128x64>>(launch, t);
    case IgemmTileKind::kPing128x128:
      return launch_tile<IgemmTile<Element, Operand, IgemmTileKind::kPing128x128>>(launch, t);
    case IgemmTileKind::kWide128x256:
      return launch_tile<IgemmTile<Element, Operand, IgemmTileKind::kWide128x256>>(launch, t);
    case IgemmTileKind::kSplit128x64:
      if constexpr (sizeof(Element) == 4) {
        return launch_tile<IgemmTile<Element, Operand, IgemmTileKind::kSplit128x64>>(launch, t);
      }
      break;
    case IgemmTileKind::kSplit128x128:
      if constexpr (sizeof(Element) == 4) {
        return launch_tile<IgemmTile<Element, Operand, IgemmTileKind::kSplit128x128>>(launch, t);
      }
  }
}

}  // namespace igemm_sm90
}  // namespace cuda
}  // namespace fastconv
