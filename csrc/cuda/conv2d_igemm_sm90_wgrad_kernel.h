// Filter gradient as an implicit matrix product on Hopper's tensor cores:
//   dw[k, (r,s,c)] = sum over pixels of dy[pixel, k] * x[pixel at tap (r,s), c]
//
// Both operands lie in memory with the summed pixels outermost and channels contiguous: TMA brings
// boxes of 64 pixels by 64 channels as they are, and wgmma takes them MN-major, so that nothing is
// transposed. A producer thread fills a ring of stages; two consumer warpgroups multiply. Groups
// need no care in the sum: a tile that reaches into the next group's channels has columns and rows
// that nobody stores. conv2d_igemm_sm90_wgrad.h says which tile a problem gets and how its pixels
// are split over blocks, whose partial sums are added up in order.
#pragma once

#include <cstring>

#include "cuda/conv2d.h"
#include "cuda/conv2d_igemm_sm90_wgrad_work.h"
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/cluster.h"
#include "cuda/ptx/fence.h"
#include "cuda/ptx/griddepcontrol.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/setmaxnreg.h"
#include "cuda/ptx/tma.h"
#include "cuda/ptx/wgmma.h"

namespace fastconv {
namespace cuda {
namespace sm90_wgrad {

constexpr int kConsumers = 2;
constexpr int kThreads = 128 * (1 + kConsumers);

template <class T_, int kRows_, int kChunks_>
struct BlockTile {
  using T = T_;
  static constexpr int kRows = kRows_, kChunks = kChunks_;
  static constexpr int kRowBoxes = kRows / kChunk;
  // A consumer has 64 rows and so many chunks of columns.
  static constexpr int kOwnChunks = kRows == 128 ? kChunks : kChunks / kConsumers;
  static constexpr int kColumns = kOwnChunks * kChunk;
  static constexpr int kSums = kColumns / 2;  // a thread
  static constexpr int kTileSums = kRows * kChunks * kChunk;
  static constexpr int kGradBytes = kRowBoxes * kBoxBytes, kInputBytes = kChunks * kBoxBytes;
  // 200 of 227 KiB: four stages of 48, five of 40, six of 32; more than eight hide nothing more.
  static constexpr int kFit = 200 * 1024 / (kGradBytes + kInputBytes);
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static_assert(kRows == 128 || kRows == 64, "one or two boxes of dy");
  static_assert(kStages >= 4, "a copy's latency is a few steps");
  static_assert(kSums <= 128, "240 registers a thread");
};

template <class Tile>
struct Memory {
  uint64_t *full, *empty;
  unsigned char *grad, *input;

  FASTCONV_HOST_DEVICE explicit Memory(SharedCarver& carve)
      : full(carve.take<uint64_t>(Tile::kStages, 8)),
        empty(carve.take<uint64_t>(Tile::kStages, 8)),
        grad(carve.take<unsigned char>(Tile::kStages * Tile::kGradBytes, 1024)),
        input(carve.take<unsigned char>(Tile::kStages * Tile::kInputBytes, 1024)) {}
};

// Where a ring's user stands: the stage, and the parity of its round.
struct RingAt {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance(int stages) {
    if (++stage < stages) return;
    stage = 0;
    parity ^= 1;
  }
};

// The producer's view: what it copies a step. Of a shared operand it copies half of the pixels, to
// both blocks.
template <class Tile>
struct Producer {
  using Im2colPosition = ptx::Im2colPosition;

  const CUtensorMap *grad_map, *input_map;
  const Params& t;
  const Memory<Tile>& memory;
  int rank;
  int grad_channel, grad_pixel;         // of the next box
  int input_pixel;                      // its flat index
  Pixel pixel;                          // its window
  Im2colPosition boxes[Tile::kChunks];  // channels and tap's distances
  int chunks;                           // that exist
  RingAt ring;

  __device__ Producer(const CUtensorMap* grad, const CUtensorMap* input, const Params& params,
                      const Memory<Tile>& shared, int block_rank)
      : grad_map(grad), input_map(input), t(params), memory(shared), rank(block_rank) {}

  __device__ void begin(const Segment& segment) {
    const TileAt at = tile_at(t, segment.unit, rank, Tile::kRows, Tile::kChunks);
    grad_channel = at.group * t.conv.k_per_group + at.first_k;
    grad_pixel = segment.first_step * kStep + (t.share == Share::kGrad ? rank * kHalf : 0);
    input_pixel = segment.first_step * kStep + (t.share == Share::kInput ? rank * kHalf : 0);
    pixel = pixel_at(input_pixel, t.conv.P, t.conv.Q);
    chunks = max(0, min(Tile::kChunks, t.chunks - at.first_chunk));
#pragma unroll
    for (int i = 0; i < Tile::kChunks; ++i) {
      const ChunkAt chunk = chunk_at(t, at.first_chunk + i);
      boxes[i] = {at.group * t.conv.c_per_group + chunk.c,
                  0,
                  0,
                  0,
                  static_cast<uint16_t>(chunk.s * t.conv.dil_w),
                  static_cast<uint16_t>(chunk.r * t.conv.dil_h)};
    }
  }

  __device__ void copy_grad(uint32_t to, uint32_t full) const {
#pragma unroll
    for (int i = 0; i < Tile::kRowBoxes; ++i) {
      const uint32_t box = to + i * kBoxBytes;
      const int channel = grad_channel + i * kChunk;
      if (t.share == Share::kGrad) {
        ptx::tma_load_multicast(box + rank * (kBoxBytes / kPair), grad_map, full, 3,
                                {channel, grad_pixel});
      } else {
        ptx::tma_load(box, grad_map, full, {channel, grad_pixel});
      }
    }
  }

  __device__ void copy_input(uint32_t to, uint32_t full) const {
    const int w = pixel.col * t.conv.stride_w - t.conv.pad_w;
    const int h = pixel.row * t.conv.stride_h - t.conv.pad_h;
    const int n = static_cast<int>(pixel.n);
    const bool shared = t.share == Share::kInput;
#pragma unroll
    for (int i = 0; i < Tile::kChunks; ++i) {
      if (i >= chunks) break;
      const uint32_t box = to + i * kBoxBytes + (shared ? rank * (kBoxBytes / kPair) : 0);
      const Im2colPosition& tap = boxes[i];
      const Im2colPosition at = {tap.c, w, h, n, tap.offset_w, tap.offset_h};
      if (t.tiled && shared) {
        ptx::tma_load_multicast(box, input_map, full, 3, {at.c, input_pixel});
      } else if (t.tiled) {
        ptx::tma_load(box, input_map, full, {at.c, input_pixel});
      } else if (shared) {
        ptx::tma_load_im2col_multicast(box, input_map, full, 3, at);
      } else {
        ptx::tma_load_im2col(box, input_map, full, at);
      }
    }
  }

  __device__ void run(Piece piece) {
    for (Segment segment; piece.next(segment);) {
      begin(segment);
      const uint32_t bytes = static_cast<uint32_t>(Tile::kGradBytes + chunks * kBoxBytes);
      for (int step = 0; step < segment.steps; ++step) {
        const uint32_t full = ptx::shared_address(memory.full + ring.stage);
        ptx::mbarrier_wait(ptx::shared_address(memory.empty + ring.stage), ring.parity ^ 1);
        ptx::mbarrier_arrive_expect_tx(full, bytes);
        copy_grad(ptx::shared_address(memory.grad + ring.stage * Tile::kGradBytes), full);
        copy_input(ptx::shared_address(memory.input + ring.stage * Tile::kInputBytes), full);
        grad_pixel += kStep;
        input_pixel += kStep;
        advance(pixel, t.step, t.conv.P, t.conv.Q);
        ring.advance(Tile::kStages);
      }
    }
  }
};

// A box as wgmma reads it: pixel k is a swizzled row of 128 bytes with 64 values of M or N, eight
// such rows a pattern; the next 64 of N are in the next box.
__device__ inline uint64_t box_matrix(uint32_t start) {
  return ptx::encode({start, kBoxBytes, 1024, ptx::WgmmaSwizzle::k128});
}

// A warp has done with the stage, in every block whose copies reach it.
template <class Tile>
__device__ inline void release(const Memory<Tile>& memory, int stage, int cluster) {
  const uint32_t empty = ptx::shared_address(memory.empty + stage);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane < cluster) {
    ptx::mbarrier_arrive_remote(ptx::mapa(empty, static_cast<uint32_t>(lane)));
  }
}

template <class Tile>
__device__ inline void multiply(const Memory<Tile>& memory, int consumer, int steps, int cluster,
                                RingAt& ring, float (&sums)[Tile::kSums]) {
  constexpr ptx::WgmmaMajor kMn = ptx::WgmmaMajor::kMn;
  constexpr int kDepth = 16, kDepthBytes = kDepth * 128;
  const uint32_t grad =
      ptx::shared_address(memory.grad) + (Tile::kRowBoxes == 2 ? consumer * kBoxBytes : 0);
  const uint32_t input = ptx::shared_address(memory.input) +
                         (Tile::kRowBoxes == 2 ? 0 : consumer * Tile::kOwnChunks * kBoxBytes);
  int previous = 0;
  ptx::wgmma_fence_registers(sums);
  for (int step = 0; step < steps; ++step) {
    ptx::mbarrier_wait(ptx::shared_address(memory.full + ring.stage), ring.parity);
    const uint32_t a = grad + ring.stage * Tile::kGradBytes;
    const uint32_t b = input + ring.stage * Tile::kInputBytes;
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kStep / kDepth; ++k) {
      ptx::wgmma<typename Tile::T, Tile::kColumns, kMn, kMn>(
          sums, box_matrix(a + k * kDepthBytes), box_matrix(b + k * kDepthBytes), step + k > 0);
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
  if (Tile::kRowBoxes == 2) return {consumer * kChunk, 0};
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

template <class Tile>
__device__ inline void consume(const Params& t, const Memory<Tile>& memory, int rank,
                               int64_t worker) {
  const int consumer = static_cast<int>(threadIdx.x) / 128 - 1;
  const Part part = part_of<Tile>(consumer);
  RingAt ring;
  Piece piece(t, worker);
  for (Segment segment; piece.next(segment);) {
    float sums[Tile::kSums];
    multiply(memory, consumer, segment.steps, t.cluster, ring, sums);
    const TileAt at = tile_at(t, segment.unit, rank, Tile::kRows, Tile::kChunks);
    if (segment.slot < 0) {
      store_whole<Tile>(t, at, part, sums);
    } else {
      const int64_t slot = slot_at(t, worker, segment.slot, rank);
      store_slot<Tile>(t.slots + slot * Tile::kTileSums, part, t.conv.k_per_group - at.first_k,
                       sums);
    }
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
    for (int i = 0; i < Tile::kStages; ++i) {
      ptx::mbarrier_init(ptx::shared_address(memory.full + i), 1);
      ptx::mbarrier_init(ptx::shared_address(memory.empty + i),
                         static_cast<uint32_t>(kConsumers * 4 * t.cluster));
    }
    ptx::fence_mbarrier_init();
  }
  if (t.cluster > 1) {
    ptx::cluster_sync_relaxed();
  } else {
    __syncthreads();
  }
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

}  // namespace sm90_wgrad
}  // namespace cuda
}  // namespace fastconv
