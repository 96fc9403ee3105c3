// Filter gradient of float32 on Hopper's tensor cores, by TF32 or by three products of it:
//   dw[k, (r,s,c)] = sum over pixels of dy[pixel, k] * x[pixel at tap (r,s), c]
//
// In memory, and in the boxes that TMA brings, the summed pixels are the slow dimension. wgmma
// takes 32-bit operands from shared memory with the summed dimension contiguous only. So dy goes
// through registers, which any thread may read from anywhere, and x is turned: three warps read a
// box's rows and write its columns, 32 pixels of a channel side by side, into a second ring. What
// splits a number in two for three products does so on the way.
//
//   the first warp's thread  TMA          -> stages (dy, x)
//   three warps beside it    stages (x)   -> turned
//   two warpgroups           stages (dy)  -> registers; times turned -> sums
//
// Of eight pixels wgmma's k = 0, 1, 2, 3 are pixels 0, 2, 4, 6, and k = 4 .. 7 are 1, 3, 5, 7:
// whatever the order, the sum is the same, and in this one a warp reads 32 banks of dy at once.
#pragma once

#include "cuda/conv2d_igemm_sm90_wgrad_load.h"
#include "cuda/conv2d_igemm_sm90_wgrad_store.h"
#include "cuda/conv2d_layout.h"
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/fence.h"
#include "cuda/ptx/setmaxnreg.h"
#include "cuda/ptx/wgmma.h"

namespace fastconv {
namespace cuda {
namespace sm90_wgrad {

constexpr int kTurners = 3;  // warps

// kTerms: products that one is made of, 1 (TF32) or 3 (3xTF32).
template <int kRows, int kChunks, int kTerms_>
struct Float32Tile : TileShape<float, kRows, kChunks> {
  using Shape = TileShape<float, kRows, kChunks>;
  static constexpr int kTerms = kTerms_;
  static constexpr int kDepth = 8, kProducts = Shape::kStep / kDepth;
  // Steps after which sums leave the tensor cores, which may truncate when they add, for plain
  // additions: 32 pixels of 3xTF32, whose error is to be float32's, and 64 of TF32.
  static constexpr int kFold = kTerms == 3 ? 1 : 2;
  static constexpr int kTurnedBytes = kChunks * kChunk * kRowBytes;  // of one number of each
  static constexpr int kTurnedStage = kTurnedBytes * (kTerms == 3 ? 2 : 1);
  // Three, so that the consumers need not be at the same step.
  static constexpr int kTurned = 3;
  // 224 of 227 KiB in the largest. A stage is free again once its products are issued.
  static constexpr int kFit = (224 * 1024 - kTurned * kTurnedStage) / Shape::kStageBytes;
  static constexpr int kStages = kFit < 6 ? kFit : 6;
  static_assert(kStages >= 4, "a copy's latency is two steps or three");
  static_assert(Shape::kSums <= 64, "as many again in the tensor cores, and dy's values");
};

template <class Tile>
struct Float32Memory : Memory<Tile> {
  uint64_t *turned_full, *turned_empty;
  unsigned char* turned;

  FASTCONV_HOST_DEVICE explicit Float32Memory(SharedCarver& carve)
      : Memory<Tile>(carve),
        turned_full(carve.take<uint64_t>(Tile::kTurned, 8)),
        turned_empty(carve.take<uint64_t>(Tile::kTurned, 8)),
        turned(carve.take<unsigned char>(Tile::kTurned * Tile::kTurnedStage, 1024)) {}
};

// ---- the warps that turn x ----

// Where a channel of a pixel lies in a box, as TMA's swizzle has it.
__device__ inline int in_box(int pixel, int channel) {
  return pixel * kRowBytes + ((channel / 4) ^ (pixel % 8)) * 16 + channel % 4 * 4;
}

// Eight pixels of a box's 32 channels, a lane a channel: read row by row, written as the two units
// of 16 bytes that wgmma multiplies in one product. Both ways a warp meets all banks equally.
template <class Tile>
__device__ inline void turn_eight(const unsigned char* box, unsigned char* columns, int eight) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int unit = 0; unit < 2; ++unit) {
    Pack<float, 4> high, low;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = *reinterpret_cast<const float*>(box + in_box(eight * 8 + 2 * i + unit, lane));
      if constexpr (Tile::kTerms == 3) {
        const Tf32Pair split = split_tf32(x);
        high.at[i] = __uint_as_float(split.hi);
        low.at[i] = __uint_as_float(split.lo);
      } else {
        high.at[i] = x;  // TMA has rounded it
      }
    }
    unsigned char* to = columns + lane * kRowBytes + ((2 * eight + unit) ^ (lane % 8)) * 16;
    store_four(reinterpret_cast<float*>(to), high);
    if constexpr (Tile::kTerms == 3) {
      store_four(reinterpret_cast<float*>(to + Tile::kTurnedBytes), low);
    }
  }
}

template <class Tile>
__device__ inline void turn_step(const unsigned char* input, unsigned char* turned, int turner,
                                 int boxes) {
  constexpr int kEights = Tile::kStep / 8;
  static_assert(Tile::kBoxChannels == 32, "a lane a channel");
#pragma unroll 2  // loads in flight
  for (int i = turner; i < boxes * kEights; i += kTurners) {
    const int box = i / kEights;
    turn_eight<Tile>(input + box * Tile::kBoxBytes, turned + box * 32 * kRowBytes, i % kEights);
  }
}

// The consumers hand a stage back: what they multiply by then was turned before.
template <class Tile>
__device__ inline void turn(const Params& t, const Float32Memory<Tile>& memory, int rank,
                            int64_t worker) {
  const int turner = static_cast<int>(threadIdx.x) / 32 - 1;
  RingAt ring, turned;
  Piece piece(t, worker);
  for (Segment segment; piece.next(segment);) {
    const TileAt at = tile_at(t, segment.unit, rank, Tile::kRows, Tile::kChunks);
    const int boxes = chunks_of<Tile>(t, at) * Tile::kChunkBoxes;
    for (int step = 0; step < segment.steps; ++step) {
      ptx::mbarrier_wait(ptx::shared_address(memory.full + ring.stage), ring.parity);
      ptx::mbarrier_wait(ptx::shared_address(memory.turned_empty + turned.stage),
                         turned.parity ^ 1);
      turn_step<Tile>(memory.input(ring.stage), memory.turned + turned.stage * Tile::kTurnedStage,
                      turner, boxes);
      ptx::fence_proxy_async();  // what wgmma reads was stored in the ordinary way
      __syncwarp();
      if (threadIdx.x % 32 == 0) {
        ptx::mbarrier_arrive(ptx::shared_address(memory.turned_full + turned.stage));
      }
      ring.advance(Tile::kStages);
      turned.advance(Tile::kTurned);
    }
  }
}

// ---- the warpgroups that multiply ----

// A thread's values of dy in a step: of product k (row, t), (row + 8, t), (row, t + 4),
// (row + 8, t + 4) with row = lane / 4 and t = lane % 4.
template <class Tile>
struct GradValues {
  float at[Tile::kProducts][4];

  __device__ void load(const unsigned char* grad, int consumer) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int first =
        (Tile::kTall ? consumer * 64 : 0) + static_cast<int>(threadIdx.x) / 32 % 4 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first + i % 2 * 8;
      const unsigned char* from = grad + row / 32 * Tile::kBoxBytes;
#pragma unroll
      for (int k = 0; k < Tile::kProducts; ++k) {
        const int pixel = k * 8 + lane % 4 * 2 + i / 2;
        at[k][i] = *reinterpret_cast<const float*>(from + in_box(pixel, row % 32));
      }
    }
  }
};

// The same as wgmma takes them.
template <class Tile>
struct GradOperands {
  static constexpr bool kSplit = Tile::kTerms == 3;
  uint32_t high[Tile::kProducts][4], low[kSplit ? Tile::kProducts : 1][4];

  __device__ explicit GradOperands(const GradValues<Tile>& values) {
#pragma unroll
    for (int k = 0; k < Tile::kProducts; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kSplit) {
          const Tf32Pair split = split_tf32(values.at[k][i]);
          high[k][i] = split.hi;
          low[k][i] = split.lo;
        } else {
          high[k][i] = __float_as_uint(values.at[k][i]);  // TMA has rounded it
        }
      }
    }
  }
};

// Issues a step's products: the smallest first, where there are three of each.
template <class Tile>
__device__ inline void multiply_step(const GradOperands<Tile>& grad, uint32_t columns,
                                     bool accumulate, float (&d)[Tile::kSums]) {
  constexpr int kN = Tile::kColumns, kDepthBytes = Tile::kDepth * 4;
  int add = accumulate;
  if constexpr (Tile::kTerms == 3) {
#pragma unroll
    for (int k = 0; k < Tile::kProducts; ++k) {
      const uint64_t high = ptx::encode_rows_of_128(columns + k * kDepthBytes);
      const uint64_t low = ptx::encode_rows_of_128(columns + Tile::kTurnedBytes + k * kDepthBytes);
      ptx::wgmma<ptx::Tf32, kN>(d, grad.low[k], high, add);
      ptx::wgmma<ptx::Tf32, kN>(d, grad.high[k], low, 1);
      add = 1;
    }
  }
#pragma unroll
  for (int k = 0; k < Tile::kProducts; ++k) {
    const uint64_t high = ptx::encode_rows_of_128(columns + k * kDepthBytes);
    ptx::wgmma<ptx::Tf32, kN>(d, grad.high[k], high, add);
    add = 1;
  }
}

// While a step is multiplied, the next one's dy is read.
template <class Tile>
__device__ inline void multiply(const Float32Memory<Tile>& memory, int consumer, int steps,
                                int cluster, RingAt& ring, RingAt& turned,
                                float (&sums)[Tile::kSums]) {
  const uint32_t columns = ptx::shared_address(memory.turned) +
                           (Tile::kTall ? 0 : consumer * Tile::kColumns * kRowBytes);
#pragma unroll
  for (int i = 0; i < Tile::kSums; ++i) sums[i] = 0;
  float d[Tile::kSums];
  GradValues<Tile> values;
  const auto load = [&] {
    ptx::mbarrier_wait(ptx::shared_address(memory.full + ring.stage), ring.parity);
    values.load(memory.grad(ring.stage), consumer);
  };
  load();
  for (int step = 0; step < steps; ++step) {
    const GradOperands<Tile> grad(values);
    ptx::mbarrier_wait(ptx::shared_address(memory.turned_full + turned.stage), turned.parity);
    ptx::wgmma_fence_registers(d);
    ptx::wgmma_fence();
    multiply_step<Tile>(grad, columns + turned.stage * Tile::kTurnedStage, step % Tile::kFold > 0,
                        d);
    ptx::wgmma_commit();
    release(memory, ring.stage, cluster);  // the products have the registers
    ring.advance(Tile::kStages);
    if (step + 1 < steps) load();
    ptx::wgmma_wait<0>();
    ptx::wgmma_fence_registers(d);
    if (threadIdx.x % 32 == 0) {
      ptx::mbarrier_arrive(ptx::shared_address(memory.turned_empty + turned.stage));
    }
    turned.advance(Tile::kTurned);
    if (step % Tile::kFold == Tile::kFold - 1 || step + 1 == steps) {
#pragma unroll
      for (int i = 0; i < Tile::kSums; ++i) sums[i] += d[i];
    }
  }
}

template <class Tile>
__device__ inline void consume(const Params& t, const Float32Memory<Tile>& memory, int rank,
                               int64_t worker) {
  const int consumer = static_cast<int>(threadIdx.x) / 128 - 1;
  RingAt ring, turned;
  Piece piece(t, worker);
  for (Segment segment; piece.next(segment);) {
    float sums[Tile::kSums];
    multiply(memory, consumer, segment.steps, t.cluster, ring, turned, sums);
    store_sums<Tile>(t, segment, consumer, rank, worker, sums);
  }
}

template <class Tile>
__global__ void __launch_bounds__(kThreads, 1)
    conv2d_igemm_sm90_wgrad_float32_kernel(const __grid_constant__ CUtensorMap grad_map,
                                           const __grid_constant__ CUtensorMap input_map,
                                           const __grid_constant__ Params t) {
  SharedCarver carve(shared_memory());
  const Float32Memory<Tile> memory(carve);
  const int rank = static_cast<int>(ptx::cluster_rank());
  const int64_t worker = worker_of(t, blockIdx.x / static_cast<unsigned>(t.cluster));
  if (threadIdx.x == 0) {
    ptx::tma_prefetch_map(&grad_map);
    ptx::tma_prefetch_map(&input_map);
    init_ring(memory, kConsumers * 4 * t.cluster);
    for (int i = 0; i < Tile::kTurned; ++i) {
      ptx::mbarrier_init(ptx::shared_address(memory.turned_full + i), kTurners);
      ptx::mbarrier_init(ptx::shared_address(memory.turned_empty + i), kConsumers * 4);
    }
    ptx::fence_mbarrier_init();
  }
  meet(t.cluster);
  ptx::griddepcontrol_launch_dependents();  // wgrad_reduce_kernel() waits for the end
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_dec<72>();
    if (threadIdx.x >= 32) {
      turn(t, memory, rank, worker);
    } else if (ptx::elect_one()) {
      Producer<Tile>(&grad_map, &input_map, t, memory, rank).run(Piece(t, worker));
    }
    __syncwarp();
  } else {
    ptx::setmaxnreg_inc<216>();
    consume(t, memory, rank, worker);
    __syncwarp();
  }
  // Neither block ends while the other's copies or arrivals come.
  if (t.cluster > 1) ptx::cluster_sync_relaxed();
}

}  // namespace sm90_wgrad
}  // namespace cuda
}  // namespace fastconv
