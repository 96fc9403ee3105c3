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

#include "cuda/conv2d.h"
#include "cuda/conv2d_igemm_sm90_wgrad.h"
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/cluster.h"
#include "cuda/ptx/fence.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/setmaxnreg.h"
#include "cuda/ptx/tma.h"
#include "cuda/ptx/wgmma.h"

namespace fastconv {
namespace cuda {
namespace sm90_wgrad {

constexpr int kConsumers = 2;
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kPair = 2;  // blocks of a cluster that share something
constexpr int kHalf = kStep / kPair;

struct Params {
  ConvParams conv;
  float* partials;  // null: a block has whole sums
  int64_t results;
  Strides4 to;  // of the partial sums, or of `out`
  bool vector;  // four channels there are neighbours and aligned
  bool tiled;   // the input's map: a 1x1 filter sees the pixels as they lie
  Share share;
  int cluster;
  int k_tiles, column_tiles, channel_chunks, chunks;
  int steps, steps_per_split;
  PixelStep step;  // what kStep pixels on means
};

template <class T_, int kRows_, int kChunks_>
struct BlockTile {
  using T = T_;
  static constexpr int kRows = kRows_, kChunks = kChunks_;
  static constexpr int kRowBoxes = kRows / kChunk;
  // A consumer has 64 rows and so many chunks of columns.
  static constexpr int kOwnChunks = kRows == 128 ? kChunks : kChunks / kConsumers;
  static constexpr int kColumns = kOwnChunks * kChunk;
  static constexpr int kSums = kColumns / 2;  // a thread
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

// A tile of the results and a share of the pixels. Blocks of one split are neighbours, so that
// those that run together read the same pixels from L2; a pair differs in what it does not share.
struct BlockAt {
  int group, first_k, first_chunk, split, first_step, steps;

  __device__ BlockAt(const Params& t, int64_t block, int rows, int chunks) {
    const bool k_first = t.share == Share::kInput;
    const Division inner = divide(block, k_first ? t.k_tiles : t.column_tiles);
    const Division outer = divide(inner.quotient, k_first ? t.column_tiles : t.k_tiles);
    const Division by_group = divide(outer.quotient, t.conv.G);
    first_k = (k_first ? inner.remainder : outer.remainder) * rows;
    first_chunk = (k_first ? outer.remainder : inner.remainder) * chunks;
    group = by_group.remainder;
    split = static_cast<int>(by_group.quotient);
    first_step = split * t.steps_per_split;
    steps = min(t.steps_per_split, t.steps - first_step);
  }
};

// A chunk of columns: 64 channels of a tap.
struct ChunkAt {
  int r, s, c;  // c: within the group
};
__device__ inline ChunkAt chunk_at(const Params& t, int chunk) {
  const int tap = chunk / t.channel_chunks, r = tap / t.conv.S;
  return {r, tap - r * t.conv.S, (chunk - tap * t.channel_chunks) * kChunk};
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

  __device__ Producer(const CUtensorMap* grad, const CUtensorMap* input, const Params& params,
                      const Memory<Tile>& shared, const BlockAt& at)
      : grad_map(grad),
        input_map(input),
        t(params),
        memory(shared),
        rank(static_cast<int>(ptx::cluster_rank())) {
    grad_channel = at.group * t.conv.k_per_group + at.first_k;
    grad_pixel = at.first_step * kStep + (t.share == Share::kGrad ? rank * kHalf : 0);
    input_pixel = at.first_step * kStep + (t.share == Share::kInput ? rank * kHalf : 0);
    pixel = pixel_at(input_pixel, t.conv.P, t.conv.Q);
    chunks = min(Tile::kChunks, t.chunks - at.first_chunk);
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

  __device__ void run(int steps) {
    RingAt ring;
    const uint32_t bytes = static_cast<uint32_t>(Tile::kGradBytes + max(chunks, 0) * kBoxBytes);
    for (int step = 0; step < steps; ++step) {
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
                                float (&sums)[Tile::kSums]) {
  constexpr ptx::WgmmaMajor kMn = ptx::WgmmaMajor::kMn;
  constexpr int kDepth = 16, kDepthBytes = kDepth * 128;
  const uint32_t grad =
      ptx::shared_address(memory.grad) + (Tile::kRowBoxes == 2 ? consumer * kBoxBytes : 0);
  const uint32_t input = ptx::shared_address(memory.input) +
                         (Tile::kRowBoxes == 2 ? 0 : consumer * Tile::kOwnChunks * kBoxBytes);
  RingAt ring;
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
}

// Where a row's sums of one chunk go.
template <class T>
struct Target {
  float* partials;
  T* out;

  __device__ void put(int64_t at, float sum) const {
    if (partials != nullptr) {
      partials[at] = sum;
    } else {
      out[at] = narrow<T>(sum);
    }
  }
  __device__ void put(int64_t at, const Pack<float, 4>& sums) const {
    if (partials != nullptr) {
      store_pack(partials + at, sums);
    } else {
      Pack<T, 4> values;
#pragma unroll
      for (int i = 0; i < 4; ++i) values.at[i] = narrow<T>(sums.at[i]);
      store_pack(out + at, values);
    }
  }
};

// Two neighbouring lanes have two columns each of two groups of eight: after an exchange the even
// one has four of the first, the odd one four of the second.
__device__ inline Pack<float, 4> four_columns(bool odd, const float (&first)[2],
                                              const float (&second)[2]) {
  const float low = __shfl_xor_sync(0xffffffffu, odd ? first[0] : second[0], 1);
  const float high = __shfl_xor_sync(0xffffffffu, odd ? first[1] : second[1], 1);
  return odd ? Pack<float, 4>{{low, high, second[0], second[1]}}
             : Pack<float, 4>{{first[0], first[1], low, high}};
}

// wgmma's D, 64 rows by Tile::kColumns from (first_k, first_chunk) on.
template <class Tile>
__device__ inline void store_sums(const Params& t, const BlockAt& at, int first_k, int first_chunk,
                                  const float (&sums)[Tile::kSums]) {
  constexpr int kGroups = kChunk / 8;  // of eight columns, four sums a thread
  const Target<typename Tile::T> target = {
      t.partials == nullptr ? nullptr : t.partials + at.split * t.results,
      static_cast<typename Tile::T*>(t.conv.out)};
  const int lane = static_cast<int>(threadIdx.x) % 32, pair = lane % 4;
  const bool odd = pair % 2 != 0;
  const int first_row = first_k + static_cast<int>(threadIdx.x) / 32 % 4 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < Tile::kOwnChunks; ++i) {
    if (first_chunk + i >= t.chunks) break;
    const ChunkAt chunk = chunk_at(t, first_chunk + i);
    const int channels = t.conv.c_per_group - chunk.c;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int k = first_row + half * 8;
      const bool exists = k < t.conv.k_per_group;
      const int64_t row = (at.group * t.conv.k_per_group + k) * t.to.n + chunk.r * t.to.h +
                          chunk.s * t.to.w + chunk.c * t.to.c;
#pragma unroll
      for (int j = 0; j < kGroups; j += 2) {
        const int d = (i * kGroups + j) * 4 + half * 2;
        const float first[2] = {sums[d], sums[d + 1]}, second[2] = {sums[d + 4], sums[d + 5]};
        if (t.vector) {
          const Pack<float, 4> four = four_columns(odd, first, second);
          const int column = (j + odd) * 8 + pair / 2 * 4;
          if (exists && column < channels) target.put(row + column, four);
          continue;
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int column = (j + e / 2) * 8 + pair * 2 + e % 2;
          if (!exists || column >= channels) continue;
          target.put(row + column * t.to.c, e < 2 ? first[e] : second[e - 2]);
        }
      }
    }
  }
}

template <class Tile>
__global__ void __launch_bounds__(kThreads, 1)
    conv2d_igemm_sm90_wgrad_kernel(const __grid_constant__ CUtensorMap grad_map,
                                   const __grid_constant__ CUtensorMap input_map, Params t) {
  SharedCarver carve(shared_memory());
  const Memory<Tile> memory(carve);
  const BlockAt at(t, blockIdx.x, Tile::kRows, Tile::kChunks);
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
  ptx::cluster_sync();
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_dec<40>();
    if (threadIdx.x < 32 && ptx::elect_one()) {
      Producer<Tile>(&grad_map, &input_map, t, memory, at).run(at.steps);
    }
    __syncwarp();
  } else {
    ptx::setmaxnreg_inc<232>();
    const int consumer = static_cast<int>(threadIdx.x) / 128 - 1;
    float sums[Tile::kSums];
    multiply(memory, consumer, at.steps, t.cluster, sums);
    const bool by_rows = Tile::kRowBoxes == 2;
    store_sums<Tile>(t, at, at.first_k + (by_rows ? consumer * kChunk : 0),
                     at.first_chunk + (by_rows ? 0 : consumer * Tile::kOwnChunks), sums);
    __syncwarp();
  }
  ptx::cluster_sync();  // neither block ends while the other's copies or arrivals come
}

}  // namespace sm90_wgrad
}  // namespace cuda
}  // namespace fastconv
