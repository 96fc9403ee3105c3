// How a block of Hopper's filter gradient is fed: its tile, the ring of stages, and the thread that
// has TMA fill it. For 16-bit and 32-bit elements: a box is 128 bytes of channels of each of a
// step's pixels.
#pragma once

#include "cuda/conv2d.h"
#include "cuda/conv2d_igemm_sm90_wgrad_work.h"
#include "cuda/ptx/cluster.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/tma.h"

namespace fastconv {
namespace cuda {
namespace sm90_wgrad {

constexpr int kConsumers = 2;  // warpgroups that multiply
constexpr int kThreads = 128 * (1 + kConsumers);

template <class T_, int kRows_, int kChunks_>
struct TileShape {
  using T = T_;
  static constexpr int kRows = kRows_, kChunks = kChunks_;
  static constexpr bool kTall = kRows == 128;
  // A consumer has 64 rows and so many chunks of columns.
  static constexpr int kOwnChunks = kTall ? kChunks : kChunks / kConsumers;
  static constexpr int kColumns = kOwnChunks * kChunk;
  static constexpr int kSums = kColumns / 2;  // a thread
  static constexpr int kTileSums = kRows * kChunks * kChunk;
  static constexpr int kStep = step_pixels(sizeof(T)), kBoxChannels = kStep;
  static constexpr int kBoxBytes = kStep * kRowBytes, kHalfBoxBytes = kBoxBytes / kPair;
  static constexpr int kRowBoxes = kRows / kBoxChannels, kChunkBoxes = kChunk / kBoxChannels;
  static constexpr int kGradBytes = kRowBoxes * kBoxBytes;
  static constexpr int kInputBytes = kChunks * kChunkBoxes * kBoxBytes;
  static constexpr int kStageBytes = kGradBytes + kInputBytes;
  static_assert(kRows == 128 || kRows == 64, "64 for each consumer, or the same for both");
  static_assert(kTall || kChunks % kConsumers == 0, "whole chunks for each");
  static_assert(kHalfBoxBytes % 1024 == 0, "the swizzle's pattern");
};

// The ring, which each kind of kernel adds to what it has of its own.
template <class Tile>
struct Memory {
  uint64_t *full, *empty;
  unsigned char* stages;  // [kStages]: dy, x

  FASTCONV_HOST_DEVICE explicit Memory(SharedCarver& carve)
      : full(carve.take<uint64_t>(Tile::kStages, 8)),
        empty(carve.take<uint64_t>(Tile::kStages, 8)),
        stages(carve.take<unsigned char>(Tile::kStages * Tile::kStageBytes, 1024)) {}

  __device__ unsigned char* grad(int stage) const { return stages + stage * Tile::kStageBytes; }
  __device__ unsigned char* input(int stage) const { return grad(stage) + Tile::kGradBytes; }
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

// Of a tile's chunks of columns, those that exist: none in the odd tile of a pair.
template <class Tile>
__device__ inline int chunks_of(const Params& t, const TileAt& at) {
  return max(0, min(Tile::kChunks, t.chunks - at.first_chunk));
}

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
    grad_pixel = input_pixel = segment.first_step * Tile::kStep;
    if (t.share == Share::kGrad) grad_pixel += rank * (Tile::kStep / kPair);
    if (t.share == Share::kInput) input_pixel += rank * (Tile::kStep / kPair);
    pixel = pixel_at(input_pixel, t.conv.P, t.conv.Q);
    chunks = chunks_of<Tile>(t, at);
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
      const uint32_t box = to + i * Tile::kBoxBytes;
      const int channel = grad_channel + i * Tile::kBoxChannels;
      if (t.share == Share::kGrad) {
        ptx::tma_load_multicast(box + rank * Tile::kHalfBoxBytes, grad_map, full, 3,
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
    for (int i = 0; i < Tile::kChunks * Tile::kChunkBoxes; ++i) {
      if (i >= chunks * Tile::kChunkBoxes) break;
      const uint32_t box = to + i * Tile::kBoxBytes + (shared ? rank * Tile::kHalfBoxBytes : 0);
      const Im2colPosition& tap = boxes[i / Tile::kChunkBoxes];
      const int c = tap.c + i % Tile::kChunkBoxes * Tile::kBoxChannels;
      const Im2colPosition at = {c, w, h, n, tap.offset_w, tap.offset_h};
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
      const uint32_t bytes =
          static_cast<uint32_t>(Tile::kGradBytes + chunks * Tile::kChunkBoxes * Tile::kBoxBytes);
      for (int step = 0; step < segment.steps; ++step) {
        const uint32_t full = ptx::shared_address(memory.full + ring.stage);
        ptx::mbarrier_wait(ptx::shared_address(memory.empty + ring.stage), ring.parity ^ 1);
        ptx::mbarrier_arrive_expect_tx(full, bytes);
        copy_grad(ptx::shared_address(memory.grad(ring.stage)), full);
        copy_input(ptx::shared_address(memory.input(ring.stage)), full);
        grad_pixel += Tile::kStep;
        input_pixel += Tile::kStep;
        advance(pixel, t.step, t.conv.P, t.conv.Q);
        ring.advance(Tile::kStages);
      }
    }
  }
};

// One thread does this; all threads of the block, or of both blocks, meet() afterwards.
template <class Tile>
__device__ inline void init_ring(const Memory<Tile>& memory, int releases) {
  for (int i = 0; i < Tile::kStages; ++i) {
    ptx::mbarrier_init(ptx::shared_address(memory.full + i), 1);
    ptx::mbarrier_init(ptx::shared_address(memory.empty + i), static_cast<uint32_t>(releases));
  }
}
__device__ inline void meet(int cluster) {
  if (cluster > 1) {
    ptx::cluster_sync_relaxed();
  } else {
    __syncthreads();
  }
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

}  // namespace sm90_wgrad
}  // namespace cuda
}  // namespace fastconv
