// The matrix product at the heart of the sm_80 tensor-core convolutions: a block of four warps
// multiplies tiles A [kM x depth] and B [kN x depth], the depth contiguous in both, and holds the
// sums in registers as mma.sync leaves them.
//
// A stage is 64 bytes of depth: 32 16-bit elements, 16 of 32 bits, two mma steps of either. Four
// stages are on their way by cp.async, so that three hide a latency of some 500 cycles: a stage of
// the 128 x 128 tile computes for 512 at sm_80's rate. Warps are two by two; with 64 x 64 sums each
// one reads (64 + 64) rows of 32 bytes for 64 * 64 * 16 multiply-adds: 64 bytes a cycle and SM, and
// 32 written by the copies, of the 128 that shared memory has. Warps of 32 x 32 ask for 128.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/conv2d_layout.h"
#include "cuda/conv2d_stage.h"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mma.h"

namespace fastconv {
namespace cuda {

// float32 operands as two TF32 numbers each, whose three larger products are summed: 3xTF32.
struct Tf32x3 {};

// What memory holds of the operands Math multiplies: __half, __nv_bfloat16, ptx::Tf32, Tf32x3.
template <class Math>
using IgemmElement =
    std::conditional_t<std::is_same_v<Math, ptx::Tf32> || std::is_same_v<Math, Tf32x3>, float,
                       Math>;

constexpr int kIgemmThreads = 128;
constexpr int kIgemmStages = 4;
constexpr int kIgemmRowBytes = 64;  // of depth, a stage
constexpr int kIgemmUnits = kIgemmRowBytes / kPackBytes;
// One unit a thread and copy: the block covers this many rows at a time.
constexpr int kIgemmRows = kIgemmThreads / kIgemmUnits;

// kBlocks: that an SM is to hold, which bounds the registers: 255 a thread for two, 168 for three,
// 128 for four.
template <int kM_, int kN_, int kBlocks_>
struct IgemmTile {
  static constexpr int kM = kM_, kN = kN_, kBlocks = kBlocks_;
  static constexpr int kWarpM = kM / 2, kWarpN = kN / 2;
  static constexpr int kI = kWarpM / 16, kJ = kWarpN / 8;                     // mma tiles of a warp
  static constexpr int kLoadsA = kM / kIgemmRows, kLoadsB = kN / kIgemmRows;  // units a thread
  static constexpr int kStageBytes = (kM + kN) * kIgemmRowBytes;
  // The large tile has no registers left to gather patches by, and few filters as a rule where
  // there are few channels.
  static constexpr bool kPatches = kBlocks > 2;
  static constexpr int kPitch = stage_pitch(kN);  // of the sums in shared memory
  static constexpr int kSharedBytes =
      std::max(kIgemmStages * kStageBytes, kM * kPitch * static_cast<int>(sizeof(float)));
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0, "ldmatrix brings 16 rows of either");

  using Sums = float[kI][kJ][4];
};
using IgemmLarge = IgemmTile<128, 128, 2>;
using IgemmTall = IgemmTile<128, 64, 3>;  // where there are 64 filters
using IgemmSmall = IgemmTile<64, 64, 4>;

// Where unit `unit` of a row stands in a stage. Two rows share the 128 bytes that all banks have,
// and the XOR gives eight rows' units of one depth eight different places in them: neither
// ldmatrix, which reads those, nor cp.async, which writes two whole rows, meets a bank twice.
__device__ inline int igemm_offset(int row, int unit) {
  return row * kIgemmRowBytes + ((unit ^ ((row >> 1) & (kIgemmUnits - 1))) * kPackBytes);
}
static_assert(kIgemmRowBytes == 64 && kIgemmUnits == 4, "two rows are the banks' 128 bytes");

// Shared addresses, in stage 0, of the row that the lane names to ldmatrix for the first 16 rows.
// Of A: rows 0 to 15 of the first 16 bytes, then of the second, as mma takes A. Of B: rows 0 to 7
// of the first and of the second, then rows 8 to 15, so that the two registers of eight columns are
// neighbours: mma asks for that, and would cost two moves otherwise. Further rows are whole
// multiples of 16 away, which the swizzle does not see; the second step's units are the first's XOR
// 2.
struct IgemmLane {
  uint32_t a, b;
};
constexpr uint32_t kIgemmSecondStep = 2 * kPackBytes;

template <class Tile>
__device__ inline IgemmLane igemm_lane(uint32_t memory) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int row_a = warp / 2 * Tile::kWarpM + lane % 16;
  const int row_b = warp % 2 * Tile::kWarpN + lane / 16 * 8 + lane % 8;
  return {memory + igemm_offset(row_a, lane / 16),
          memory + Tile::kM * kIgemmRowBytes + igemm_offset(row_b, lane / 8 % 2)};
}

// Fragments of one mma step as Math wants them: rounded, or split into two parts.
template <class Math>
struct IgemmFragment {
  static constexpr bool kThree = std::is_same_v<Math, Tf32x3>;
  uint32_t x[4], rest[kThree ? 4 : 1];

  __device__ void load(uint32_t at) {
    ptx::ldmatrix(x, at);
    if constexpr (std::is_same_v<Math, ptx::Tf32>) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = ptx::to_tf32(__uint_as_float(x[i]));
    }
    if constexpr (kThree) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Tf32Pair pair = split_tf32(__uint_as_float(x[i]));
        x[i] = pair.hi;
        rest[i] = pair.lo;
      }
    }
  }
};

// sum += a * b, of b the columns 8 * half to 8 * half + 7.
//
// 3xTF32: the three products start from zero and are added in plain float32. Tensor cores may cut
// bits off where they accumulate, and that would grow with the length of the sum.
template <class Math>
__device__ inline void igemm_multiply(float (&sum)[4], const IgemmFragment<Math>& a,
                                      const IgemmFragment<Math>& b, int half) {
  const uint32_t columns[2] = {b.x[2 * half], b.x[2 * half + 1]};
  if constexpr (std::is_same_v<Math, Tf32x3>) {
    const uint32_t rest[2] = {b.rest[2 * half], b.rest[2 * half + 1]};
    float part[4] = {};
    ptx::mma_m16n8k8_tf32(part, a.rest, columns, part);
    ptx::mma_m16n8k8_tf32(part, a.x, rest, part);
    ptx::mma_m16n8k8_tf32(part, a.x, columns, part);
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] += part[e];
  } else if constexpr (std::is_same_v<Math, ptx::Tf32>) {
    ptx::mma_m16n8k8_tf32(sum, a.x, columns, sum);
  } else {
    ptx::mma_m16n8k16<Math>(sum, a.x, columns, sum);
  }
}

// Multiplies what stands in one stage; `at` is the lane's in that stage. With both parts of the
// operands there are registers for two of A's fragments at a time, and not for the second step's.
template <class Math, class Tile>
__device__ inline void igemm_stage(const IgemmLane& at, typename Tile::Sums& sum) {
  constexpr bool kThree = std::is_same_v<Math, Tf32x3>;
  constexpr int kAtOnce = kThree ? 2 : Tile::kI;
#pragma unroll(kThree ? 1 : 2)
  for (int step = 0; step < 2; ++step) {
    const uint32_t flip = step * kIgemmSecondStep;
#pragma unroll
    for (int first = 0; first < Tile::kI; first += kAtOnce) {
      IgemmFragment<Math> a[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        a[i].load((at.a ^ flip) + (first + i) * 16 * kIgemmRowBytes);
      }
#pragma unroll
      for (int j = 0; j < Tile::kJ; j += 2) {
        IgemmFragment<Math> b;
        b.load((at.b ^ flip) + j * 8 * kIgemmRowBytes);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            igemm_multiply<Math>(sum[first + i][j + half], a[i], b, half);
          }
        }
      }
    }
  }
}

// The whole product by asynchronous copies. load(to): issues the thread's cp.async of the
// next step into the stage at shared address `to`. One barrier a step: when it has been passed, the
// stage has landed for every thread, and the one that load() now fills has been read by all.
template <class Math, class Tile, class Load>
__device__ inline void igemm_async(unsigned char* memory, int steps, typename Tile::Sums& sum,
                                   Load&& load) {
  const uint32_t base = ptx::shared_address(memory);
  const IgemmLane lane = igemm_lane<Tile>(base);
#pragma unroll
  for (int step = 0; step < kIgemmStages - 1; ++step) {
    if (step < steps) load(base + step * Tile::kStageBytes);
    ptx::cp_async_commit();  // empty at the end, so that the wait's count stays right
  }
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kIgemmStages - 2>();
    __syncthreads();
    const int next = step + kIgemmStages - 1;
    if (next < steps) load(base + next % kIgemmStages * Tile::kStageBytes);
    ptx::cp_async_commit();
    const uint32_t from = step % kIgemmStages * Tile::kStageBytes;
    igemm_stage<Math, Tile>({lane.a + from, lane.b + from}, sum);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // before the memory serves the results
}

// The same with values that pass through registers: put(to) brings the next step's. It has the
// registers that the multiplication leaves free, but none to keep values in meanwhile: the SM's
// other blocks multiply while one waits. Two stages.
template <class Math, class Tile, class Put>
__device__ inline void igemm_by_registers(unsigned char* memory, int steps,
                                          typename Tile::Sums& sum, Put&& put) {
  const IgemmLane lane = igemm_lane<Tile>(ptx::shared_address(memory));
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int stage = step % 2 * Tile::kStageBytes;
    put(memory + stage);
    __syncthreads();
    igemm_stage<Math, Tile>({lane.a + stage, lane.b + stage}, sum);
  }
  __syncthreads();  // before the memory serves the results
}

// Puts the sums of a warp's i-th 16 rows into shared memory, [kM][kPitch] floats in all.
template <class Tile>
__device__ inline void igemm_put_row(float* to, int i, const float (&sum)[Tile::kJ][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int row = warp / 2 * Tile::kWarpM + 16 * i + lane / 4;
  const int column = warp % 2 * Tile::kWarpN + lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < Tile::kJ; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Pack<float, 2> pair = {{sum[j][2 * half], sum[j][2 * half + 1]}};
      store_pack(to + (row + 8 * half) * Tile::kPitch + column + 8 * j, pair);
    }
  }
}
template <class Tile>
__device__ inline void igemm_put_sums(float* to, const typename Tile::Sums& sum) {
#pragma unroll
  for (int i = 0; i < Tile::kI; ++i) igemm_put_row<Tile>(to, i, sum[i]);
}

}  // namespace cuda
}  // namespace fastconv
