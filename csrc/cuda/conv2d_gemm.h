// The matrix product at the heart of the tiled convolutions: a block of 256 threads multiplies
// tiles that stand in shared memory, and hands each result on once.
//
//   kSize 64:  64 x 64 results, 4 x 4 a thread, 16 deep: 8 shared values for 16 multiply-adds
//   kSize 128: 128 x 128 results, 8 x 8 a thread, 8 deep: 16 for 64, one block an SM
//
// A thread fills one quad (four values along one side) of each tile a step, whatever the size:
// kSize * kDepth / 4 == 256. Tiles hold the accumulator's type, so that a 16-bit value is widened
// once and not by each of the 16 threads that read it.
#pragma once

#include <string>

#include "cuda/conv2d.h"

namespace fastconv {
namespace cuda {

constexpr int kGemmThreads = 256;
constexpr int kQuad = 4;

template <class A, int kSize_>
struct GemmTile {
  static constexpr int kSize = kSize_;
  static constexpr int kDepth = kSize == 128 ? 8 : 16;
  static constexpr int kRow = kSize + kQuad;  // one quad of padding: 16-byte aligned, banks rotate
  static constexpr int kParts = kSize / 64;   // 64 results apart, a thread's quads
  static constexpr int kSums = kParts * kQuad;
  static constexpr int kTileElements = kDepth * kRow;
  static constexpr int kElements = 2 * 2 * kTileElements;  // two operands, double-buffered
  // Results pass through the same memory, as many rows at a time as fit.
  static constexpr int kStageRows = kElements / kRow;
  static_assert(kSize * kDepth == kGemmThreads * kQuad, "one quad a thread and operand");
  static_assert(64 % kStageRows == 0 && kSize % kStageRows == 0, "passes are whole");

  static constexpr bool kSharedTotals = kSize == 128;
  static constexpr int kTotals = kSharedTotals ? kSums * kSums * kGemmThreads : 0;

  A *memory, *totals;

  FASTCONV_HOST_DEVICE explicit GemmTile(SharedCarver& carver)
      : memory(carver.take<A>(kElements)), totals(carver.take<A>(kTotals)) {}
  __device__ A* left(int buffer) const { return memory + 2 * buffer * kTileElements; }
  __device__ A* right(int buffer) const { return left(buffer) + kTileElements; }
};

// Where a thread's quads begin: row and col, and 64 further. A warp is 4 rows of quads by 8
// columns. Neighbouring lanes share a column's quad and lanes two apart a row's: a 16-byte load
// takes four wavefronts unless such pairs of lanes ask for one address, and two if they do.
struct GemmThread {
  int row, col;
};
__device__ inline GemmThread gemm_thread() {
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5;
  const int row = (lane >> 4) * 2 + (lane & 1), col = (lane >> 1) & 7;
  return {((warp >> 1) * 4 + row) * kQuad, ((warp & 1) * 8 + col) * kQuad};
}

template <class Gemm, class A>
__device__ inline void multiply_tiles(const Gemm& gemm, int buffer, const GemmThread& at,
                                      A (&sum)[Gemm::kSums][Gemm::kSums]) {
  const A* left = gemm.left(buffer) + at.row;
  const A* right = gemm.right(buffer) + at.col;
#pragma unroll 8  // at 16 the smaller tile holds more values at a time than registers allow
  for (int d = 0; d < Gemm::kDepth; ++d) {
    Pack<A, kQuad> x[Gemm::kParts], y[Gemm::kParts];
#pragma unroll
    for (int part = 0; part < Gemm::kParts; ++part) {
      x[part] = load_pack<A, kQuad>(left + d * Gemm::kRow + part * 64);
      y[part] = load_pack<A, kQuad>(right + d * Gemm::kRow + part * 64);
    }
#pragma unroll
    for (int i = 0; i < Gemm::kSums; ++i) {
#pragma unroll
      for (int j = 0; j < Gemm::kSums; ++j) {
        sum[i][j] += x[i / kQuad].at[i % kQuad] * y[j / kQuad].at[j % kQuad];
      }
    }
  }
}

// The first of two arrays, or the second.
template <bool kFirst, class First, class Second>
__device__ inline auto& choose_part(First& first, Second& second) {
  if constexpr (kFirst) {
    return first;
  } else {
    return second;
  }
}

// Adds up what multiply_tiles() gave in two levels: the error of a plain sum of thousands of
// float32 products grows past that of the peers, which add up in blocks. The 64-tile keeps its
// totals in registers, the 128-tile, for which 64 more would not fit, in shared memory: thread by
// thread, so that no barrier is needed and no bank is asked twice.
template <class Gemm, class A>
struct Totals {
  static constexpr int kFold = 64 / Gemm::kDepth;  // steps: 64 products
  using Sums = A[Gemm::kSums][Gemm::kSums];
  const Gemm& gemm;
  Sums& sum;  // the result; in the 128-tile, the running part of it
  bool folded = false;

  __device__ A& total(int i, int j) const {
    return gemm.totals[(i * Gemm::kSums + j) * kGemmThreads + static_cast<int>(threadIdx.x)];
  }
  __device__ void fold(Sums& part, bool last) {
#pragma unroll
    for (int i = 0; i < Gemm::kSums; ++i) {
#pragma unroll
      for (int j = 0; j < Gemm::kSums; ++j) {
        if constexpr (!Gemm::kSharedTotals) {
          sum[i][j] += part[i][j];
          part[i][j] = 0;
        } else {
          const A value = folded ? total(i, j) + part[i][j] : part[i][j];
          if (!last) total(i, j) = value;
          part[i][j] = last ? value : A(0);
        }
      }
    }
    folded = true;
  }
};

// The whole product: `steps` times load both operands' quads, store them, multiply. While one
// buffer is multiplied the next step's quads are on their way in registers, and one barrier a step
// is enough: a buffer is stored to after every thread has passed the barrier behind its last use.
//   load(left, right)           the next step's quads, and advances
//   store(buffer, left, right)  widened into shared memory
template <class Gemm, class T, class Load, class Store>
__device__ inline void multiply_steps(const Gemm& gemm, int steps,
                                      accumulator_t<T> (&sum)[Gemm::kSums][Gemm::kSums],
                                      Load&& load, Store&& store) {
  if (steps == 0) return;
  using A = accumulator_t<T>;
  const GemmThread at = gemm_thread();
  Pack<T, kQuad> left, right;
  load(left, right);
  store(0, left, right);
  __syncthreads();
  Totals<Gemm, A> totals = {gemm, sum};
  A registers[Gemm::kSharedTotals ? 1 : Gemm::kSums][Gemm::kSums] = {};
  auto& part = choose_part<Gemm::kSharedTotals>(sum, registers);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const bool more = step + 1 < steps;
    if (more) load(left, right);
    multiply_tiles(gemm, step & 1, at, part);
    if (more) store((step & 1) ^ 1, left, right);
    if (!more || step % totals.kFold == totals.kFold - 1) totals.fold(part, !more);
    __syncthreads();
  }
}

// Calls f(row, col, result) for every result of the block, neighbouring threads along rows or along
// columns, by way of shared memory. All threads of the block call this together.
template <class Gemm, class A, class F>
__device__ inline void for_each_result(const Gemm& gemm, const A (&sum)[Gemm::kSums][Gemm::kSums],
                                       bool lanes_along_rows, F&& f) {
  constexpr int kRows = Gemm::kStageRows;
  const GemmThread at = gemm_thread();
#pragma unroll
  for (int first = 0; first < Gemm::kSize; first += kRows) {
    const int part = first / 64;  // every quad of rows lies in one pass
    const int row = part * 64 + at.row - first;
    __syncthreads();
    if (row >= 0 && row < kRows) {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
#pragma unroll
        for (int j = 0; j < Gemm::kParts; ++j) {
          Pack<A, kQuad> quad;
#pragma unroll
          for (int e = 0; e < kQuad; ++e) quad.at[e] = sum[part * kQuad + i][j * kQuad + e];
          store_pack(gemm.memory + (row + i) * Gemm::kRow + j * 64 + at.col, quad);
        }
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int e = static_cast<int>(threadIdx.x); e < kRows * Gemm::kSize; e += kGemmThreads) {
      const int r = lanes_along_rows ? e % kRows : e / Gemm::kSize;
      const int c = lanes_along_rows ? e / kRows : e % Gemm::kSize;
      f(first + r, c, gemm.memory[r * Gemm::kRow + c]);
    }
  }
}

// Four values `stride` apart, of which the first `count` exist; the rest are zero. `vector`:
// they are neighbours, aligned, and all four exist if the first does.
template <class T>
__device__ inline Pack<T, kQuad> load_quad(const T* from, int64_t stride, int count, bool vector) {
  Pack<T, kQuad> quad = {};
  if (vector) {
    if (count > 0) quad = load_pack<T, kQuad>(from);
    return quad;
  }
#pragma unroll
  for (int e = 0; e < kQuad; ++e) {
    if (e < count) quad.at[e] = from[e * stride];
  }
  return quad;
}

// What a block of this size asks for, and `offsets` of its rows or columns.
template <class A, int kSize>
int64_t gemm_shared_bytes() {
  SharedCarver carver;
  GemmTile<A, kSize>{carver};
  carver.take<int64_t>(kSize);
  return carver.bytes();
}

// Empty, or why a product of tiles is no way to compute this.
inline std::string refuse_gemm(const Conv2dProblem& p, int size, const Device& device) {
  // Tiles of many channels waste nearly all of their work where a group has one.
  if (p.G > 1 && p.C == p.G) return "1 channel a group";
  if (p.G > 1 && p.K == p.G) return "1 filter a group";
  const int64_t bytes =
      size == 128 ? gemm_shared_bytes<float, 128>() : gemm_shared_bytes<double, 64>();
  if (bytes <= device.shared_memory_per_block) return {};
  return std::to_string(bytes) + " bytes of shared memory";
}

}  // namespace cuda
}  // namespace fastconv
