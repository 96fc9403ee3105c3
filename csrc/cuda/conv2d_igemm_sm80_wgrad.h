// The matrix product at the heart of the filter gradient on tensor cores of sm_80: a block
// multiplies tiles [pixel][filter] and [pixel][column] that cp.async brought into shared memory.
//
// Both operands have the sum's index, the pixel, as their slow dimension, as NHWC tensors do. What
// mma.sync wants is the other way round. For 16-bit elements ldmatrix transposes on its way; TF32
// fragments are made of single values, which any lane may read from anywhere.
#pragma once

#include <type_traits>

#include "cuda/conv2d_layout.h"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mma.h"

namespace fastconv {
namespace cuda {
namespace sm80_wgrad {

// kM filters by kN columns of one block. kTerms: products a float32 product is made of, 1 (TF32) or
// 3 (3xTF32).
template <class Element, int kM_, int kN_, int kTerms_ = 1>
struct WgradTile {
  using T = Element;
  static constexpr int kM = kM_, kN = kN_, kTerms = kTerms_;
  static constexpr bool kIs16Bit = sizeof(T) == 2;
  static constexpr bool kLarge = kM == 128 && kN == 128;
  // A stage is two mma steps deep: 16 KiB of 128 x 128. Four stages and two blocks an SM are 128
  // KiB of an A100's 164.
  static constexpr int kStages = 4;
  static constexpr int kDepth = 64 / static_cast<int>(sizeof(T));  // pixels
  static constexpr int kPack = kPackSize<T>;
  // A warp reads (kWarpM + kWarpN) values a pixel for kWarpM * kWarpN products: 64 x 64 halves the
  // load on shared memory of 32 x 32. float32 sums are kept twice (see kFold), which leaves
  // registers for 64 x 32.
  static constexpr int kWarpsM = 2, kWarpsN = kLarge && !kIs16Bit ? 4 : 2;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kMmaM = kWarpM / 16, kMmaN = kWarpN / 8;
  // Stages after which float32 sums leave the tensor cores, which may truncate when they add, for
  // plain additions: 16 pixels of 3xTF32, whose error is to be float32's, and 64 of TF32.
  static constexpr int kFold = kIs16Bit ? 0 : kTerms == 3 ? 1 : 4;
  static_assert(kTerms == 1 || (kTerms == 3 && !kIs16Bit), "16-bit products are exact");
  static_assert(kWarpM % 32 == 0 && kWarpN % 32 == 0, "what Tf32Values reads at a time");

  using Sums = float[kMmaM][kMmaN][4];

  // The tile of one operand: [pixel][kSize], where kSize is kM or kN.
  template <int kSize>
  struct Side {
    static constexpr int kRowBytes = kSize * static_cast<int>(sizeof(T));
    static constexpr int kUnits = kRowBytes / kPackBytes;
    static constexpr int kBytes = kDepth * kRowBytes;
    static constexpr int kRows =
        kThreads / kUnits;  // that a block loads at a time, a unit a thread
    static_assert(kRowBytes % 128 == 0, "rows are whole wavefronts: offset_of()");

    // Where unit `unit` of pixel `row` lies. Unturned, the same unit of every row would meet the
    // same banks. 16-bit: ldmatrix reads one unit of eight rows. TF32: eight lanes read two
    // neighbouring units of four rows.
    static constexpr int kTurns = kIs16Bit ? 8 : 4;
    static_assert(kDepth % kRows == 0 && kRows % kTurns == 0, "a thread's turn is always the same");
    __device__ static int offset_of(int row, int unit) {
      return row * kRowBytes + (unit ^ (row % kTurns * (8 / kTurns))) * kPackBytes;
    }
  };
  using Grad = Side<kM>;
  using Columns = Side<kN>;

  unsigned char* memory;

  FASTCONV_HOST_DEVICE explicit WgradTile(SharedCarver& carve)
      : memory(carve.take<unsigned char>(kStages * (Grad::kBytes + Columns::kBytes), 128)) {}
  __device__ unsigned char* grad(int stage) const {
    return memory + stage * (Grad::kBytes + Columns::kBytes);
  }
  __device__ unsigned char* columns(int stage) const { return grad(stage) + Grad::kBytes; }
};

// Which of the block's results a thread's are.
struct WgradWarp {
  int lane, m, n;  // m, n: the warp's first row and column

  template <class Tile>
  __device__ static WgradWarp of_thread() {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    return {static_cast<int>(threadIdx.x) % 32, warp / Tile::kWarpsN * Tile::kWarpM,
            warp % Tile::kWarpsN * Tile::kWarpN};
  }
};

// 16-bit: one step of 16 pixels from `row` on.
template <class Tile>
__device__ inline void multiply_16bit(const unsigned char* grad, const unsigned char* columns,
                                      int row, const WgradWarp& at, typename Tile::Sums& sum) {
  uint32_t a[Tile::kMmaM][4], b[Tile::kMmaN / 2][4];
  const int eighth = at.lane / 8;  // which of ldmatrix's matrices this lane names a row of
  const int a_row = row + eighth / 2 * 8 + at.lane % 8, a_unit = at.m / 8 + eighth % 2;
  const int b_row = row + eighth % 2 * 8 + at.lane % 8, b_unit = at.n / 8 + eighth / 2;
#pragma unroll
  for (int i = 0; i < Tile::kMmaM; ++i) {
    ptx::ldmatrix<4, true>(
        a[i], ptx::shared_address(grad + Tile::Grad::offset_of(a_row, a_unit + 2 * i)));
  }
#pragma unroll
  for (int j = 0; j < Tile::kMmaN / 2; ++j) {
    ptx::ldmatrix<4, true>(
        b[j], ptx::shared_address(columns + Tile::Columns::offset_of(b_row, b_unit + 2 * j)));
  }
#pragma unroll
  for (int i = 0; i < Tile::kMmaM; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kMmaN; ++j) {
      const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
      ptx::mma_m16n8k16<typename Tile::T>(sum[i][j], a[i], pair, sum[i][j]);
    }
  }
}

// Values of one operand for a step of 8 pixels: kCount filters or columns of pixels t and t + 4,
// t = lane % 4. Value v is number 32 * (v / 4) + 4 * (lane / 4) + v % 4 of the warp: mma.sync does
// not ask which rows and columns it multiplies, and so four values are one load.
template <class Tile, class Side, int kCount>
struct Tf32Values {
  uint32_t high[2][kCount], low[2][Tile::kTerms == 3 ? kCount : 1];

  __device__ Tf32Values(const unsigned char* tile, int row, int first, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int v = 0; v < kCount; v += 4) {
        const int unit = first / 4 + v / 4 * 8 + lane / 4;
        const auto pack = load_pack<float, 4>(reinterpret_cast<const float*>(
            tile + Side::offset_of(row + lane % 4 + 4 * half, unit)));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if constexpr (Tile::kTerms == 3) {
            const Tf32Pair pair = split_tf32(pack.at[e]);
            high[half][v + e] = pair.hi;
            low[half][v + e] = pair.lo;
          } else {
            high[half][v + e] = ptx::to_tf32(pack.at[e]);
          }
        }
      }
    }
  }
};

// float32: one step of 8 pixels from `row` on.
template <class Tile>
__device__ inline void multiply_tf32(const unsigned char* grad, const unsigned char* columns,
                                     int row, const WgradWarp& at, typename Tile::Sums& sum) {
  const Tf32Values<Tile, typename Tile::Grad, 2 * Tile::kMmaM> a(grad, row, at.m, at.lane);
  const Tf32Values<Tile, typename Tile::Columns, Tile::kMmaN> b(columns, row, at.n, at.lane);
  const auto multiply = [&](const auto& left, const auto& right) {
#pragma unroll
    for (int i = 0; i < Tile::kMmaM; ++i) {
      const uint32_t rows[4] = {left[0][2 * i], left[0][2 * i + 1], left[1][2 * i],
                                left[1][2 * i + 1]};
#pragma unroll
      for (int j = 0; j < Tile::kMmaN; ++j) {
        const uint32_t pair[2] = {right[0][j], right[1][j]};
        ptx::mma_m16n8k8_tf32(sum[i][j], rows, pair, sum[i][j]);
      }
    }
  };
  if constexpr (Tile::kTerms == 3) {  // small terms first
    multiply(a.high, b.low);
    multiply(a.low, b.high);
  }
  multiply(a.high, b.high);
}

// A whole stage; calls `between` behind its first step.
template <class Tile, class F>
__device__ inline void multiply_stage(const Tile& tile, int stage, const WgradWarp& at,
                                      typename Tile::Sums& sum, F&& between) {
  constexpr int kStep = Tile::kIs16Bit ? 16 : 8;
#pragma unroll
  for (int row = 0; row < Tile::kDepth; row += kStep) {
    if constexpr (Tile::kIs16Bit) {
      multiply_16bit<Tile>(tile.grad(stage), tile.columns(stage), row, at, sum);
    } else {
      multiply_tf32<Tile>(tile.grad(stage), tile.columns(stage), row, at, sum);
    }
    if (row == 0) between();
  }
}

// Calls f(row, column, four) for all of a thread's results: four of neighbouring columns, which a
// thread has of float32 anyhow. 16-bit: two neighbouring threads have two each of rows g and g + 8;
// one of them takes both rows' part of g, the other that of g + 8. The warp calls this together.
template <class Tile, class F>
__device__ inline void for_each_four(const typename Tile::Sums& sum, const WgradWarp& at, F&& f) {
  constexpr unsigned kWarp = 0xffffffff;
  const int g = at.lane / 4, t = at.lane % 4;
#pragma unroll
  for (int i = 0; i < Tile::kMmaM; ++i) {
    if constexpr (Tile::kIs16Bit) {
      const bool odd = t % 2 != 0;
#pragma unroll
      for (int j = 0; j < Tile::kMmaN; ++j) {
        const auto& own = sum[i][j];
        const float x = __shfl_xor_sync(kWarp, odd ? own[0] : own[2], 1);
        const float y = __shfl_xor_sync(kWarp, odd ? own[1] : own[3], 1);
        const Pack<float, 4> four = {odd ? x : own[0], odd ? y : own[1], odd ? own[2] : x,
                                     odd ? own[3] : y};
        f(at.m + 16 * i + (odd ? 8 : 0) + g, at.n + 8 * j + t / 2 * 4, four);
      }
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int v = 2 * i + half, row = at.m + 32 * (v / 4) + 4 * g + v % 4;
#pragma unroll
        for (int j = 0; j < Tile::kMmaN; j += 4) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            const Pack<float, 4> four = {sum[i][j][e], sum[i][j + 1][e], sum[i][j + 2][e],
                                         sum[i][j + 3][e]};
            f(row, at.n + 8 * j + 4 * (2 * t + e % 2), four);
          }
        }
      }
    }
  }
}

}  // namespace sm80_wgrad
}  // namespace cuda
}  // namespace fastconv
