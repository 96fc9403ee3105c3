// Filter gradient of 16-bit elements as an implicit matrix product on Hopper's tensor cores:
//   dw[k, (r,s,c)] = sum over pixels of dy[pixel, k] * x[pixel at tap (r,s), c]
//
// Both operands lie in memory with the summed pixels outermost and channels contiguous: TMA brings
// boxes of 64 pixels by 64 channels as they are, and wgmma takes them MN-major, so that nothing is
// transposed. A producer thread fills a ring of stages; two consumer warpgroups multiply. Groups
// need no care in the sum: a tile that reaches into the next group's channels has columns and rows
// that nobody stores. conv2d_igemm_sm90_wgrad.h says which tile a problem gets and how its pixels
// are split over blocks, whose partial sums are added up in order.
#pragma once

#include "cuda/conv2d_igemm_sm90_wgrad_load.h"
#include "cuda/conv2d_igemm_sm90_wgrad_store.h"
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/fence.h"
#include "cuda/ptx/setmaxnreg.h"
#include "cuda/ptx/wgmma.h"

namespace fastconv {
namespace cuda {
namespace sm90_wgrad {

template <class T, int kRows, int kChunks>
struct BlockTile : TileShape<T, kRows, kChunks> {
  using Shape = TileShape<T, kRows, kChunks>;
  // 200 of 227 KiB: four stages of 48, five of 40, six of 32; more than eight hide nothing more.
  static constexpr int kFit = 200 * 1024 / Shape::kStageBytes;
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static_assert(kStages >= 4, "a copy's latency is a few steps");
  static_assert(Shape::kSums <= 128, "240 registers a thread");
};

// A box as wgmma reads it: pixel k is a swizzled row of 128 bytes with 64 values of M or N, eight
// such rows a pattern; the next 64 of N are in the next box.
template <class Tile>
__device__ inline uint64_t box_matrix(uint32_t start) {
  return ptx::encode({start, Tile::kBoxBytes, 1024, ptx::WgmmaSwizzle::k128});
}

template <class Tile>
__device__ inline void multiply(const Memory<Tile>& memory, int consumer, int steps, int cluster,
                                RingAt& ring, float (&sums)[Tile::kSums]) {
  constexpr ptx::WgmmaMajor kMn = ptx::WgmmaMajor::kMn;
  constexpr int kDepth = 16, kDepthBytes = kDepth * 128;
  constexpr int kOwnInput = Tile::kTall ? 0 : Tile::kOwnChunks * Tile::kBoxBytes;
  const uint32_t grad =
      ptx::shared_address(memory.grad(0)) + (Tile::kTall ? consumer * Tile::kBoxBytes : 0);
  const uint32_t input = ptx::shared_address(memory.input(0)) + consumer * kOwnInput;
  int previous = 0;
  ptx::wgmma_fence_registers(sums);
  for (int step = 0; step < steps; ++step) {
    ptx::mbarrier_wait(ptx::shared_address(memory.full + ring.stage), ring.parity);
    const uint32_t a = grad + ring.stage * Tile::kStageBytes;
    const uint32_t b = input + ring.stage * Tile::kStageBytes;
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < Tile::kStep / kDepth; ++k) {
      ptx::wgmma<typename Tile::T, Tile::kColumns, kMn, kMn>(
          sums, box_matrix<Tile>(a + k * kDepthBytes), box_matrix<Tile>(b + k * kDepthBytes),
          step + k > 0);
    }
    ptx::wgmma_commit();
    if (step > 0) {
      ptx::wgmma_wait<1>();  // the step before has read its stage
      release(memory, previous, cluster);
    }
    previous = ring.stage;
    ring.advance(Tile::kStages);
  }
  ptx::wgmma_wait<0>();
  ptx::wgmma_fence_registers(sums);
  release(memory, previous, cluster);
}

template <class Tile>
__device__ inline void consume(const Params& t, const Memory<Tile>& memory, int rank,
                               int64_t worker) {
  const int consumer = static_cast<int>(threadIdx.x) / 128 - 1;
  RingAt ring;
  Piece piece(t, worker);
  for (Segment segment; piece.next(segment);) {
    float sums[Tile::kSums];
    multiply(memory, consumer, segment.steps, t.cluster, ring, sums);
    store_sums<Tile>(t, segment, consumer, rank, worker, sums);
  }
}

template <class Tile>
__global__ void __launch_bounds__(kThreads, 1)
    conv2d_igemm_sm90_wgrad_kernel(const __grid_constant__ CUtensorMap grad_map,
                                   const __grid_constant__ CUtensorMap input_map,
                                   const __grid_constant__ Params t) {
  SharedCarver carve(shared_memory());
  const Memory<Tile> memory(carve);
  const int rank = static_cast<int>(ptx::cluster_rank());
  const int64_t worker = worker_of(t, blockIdx.x / static_cast<unsigned>(t.cluster));
  if (threadIdx.x == 0) {
    ptx::tma_prefetch_map(&grad_map);
    ptx::tma_prefetch_map(&input_map);
    init_ring(memory, kConsumers * 4 * t.cluster);
    ptx::fence_mbarrier_init();
  }
  meet(t.cluster);
  ptx::griddepcontrol_launch_dependents();  // wgrad_reduce_kernel() waits for the end
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_dec<56>();
    if (threadIdx.x < 32 && ptx::elect_one()) {
      Producer<Tile>(&grad_map, &input_map, t, memory, rank).run(Piece(t, worker));
    }
    __syncwarp();
  } else {
    ptx::setmaxnreg_inc<224>();
    consume(t, memory, rank, worker);
    __syncwarp();
  }
  // Neither block ends while the other's copies or arrivals come.
  if (t.cluster > 1) ptx::cluster_sync_relaxed();
}

}  // namespace sm90_wgrad
}  // namespace cuda
}  // namespace fastconv
