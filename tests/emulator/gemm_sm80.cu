// A small GEMM of the Ampere kind: cp.async in stages, ldmatrix, mma.sync.
// C [M x N] float32 = A [M x K] * B [N x K]^T, both row by row, any M and N, K in 16-byte packs.
#include "cases.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mma.h"

namespace fastconv {
namespace testing {
namespace {

using cuda::launch_kernel;
using cuda::shared_memory;
using cuda::SharedCarver;

constexpr int kTile = 64;  // of M and N a block; 4 warps have 32 x 32 each
constexpr int kThreads = 128;
constexpr int kStages = 3;
constexpr int kRowBytes = 64;  // of K a stage: two mma steps of 32 bytes, of any element type
constexpr int kPitch = kRowBytes + 16;  // 5 units of 16 bytes: ldmatrix's 8 rows hit all banks once

struct Stages {
  unsigned char *a, *b;
  __host__ __device__ explicit Stages(SharedCarver& carve)
      : a(carve.take<unsigned char>(kStages * kTile * kPitch)),
        b(carve.take<unsigned char>(kStages * kTile * kPitch)) {}
};

// Rows first_row .. + 63 of `from`, bytes at .. at + 63 of each; zeros outside.
__device__ inline void load_tile(unsigned char* to, const void* from, int rows, int row_bytes,
                                 int first_row, int at) {
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kRowBytes / 16; i += kThreads) {
    const int row = i / 4, unit = i % 4;
    const bool inside = first_row + row < rows && at + unit * 16 < row_bytes;
    const auto* source = static_cast<const unsigned char*>(from) +
                         (inside ? int64_t{first_row + row} * row_bytes + at + unit * 16 : 0);
    ptx::cp_async<16>(ptx::shared_address(to + row * kPitch + unit * 16), source, inside ? 16 : 0);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    gemm_kernel(const T* a, const T* b, float* c, int M, int N, int K) {
  SharedCarver carve(shared_memory());
  Stages stages(carve);
  const int row_bytes = K * static_cast<int>(sizeof(T));
  const int m0 = static_cast<int>(blockIdx.x) / ((N + kTile - 1) / kTile) * kTile;
  const int n0 = static_cast<int>(blockIdx.x) % ((N + kTile - 1) / kTile) * kTile;
  const int steps = (row_bytes + kRowBytes - 1) / kRowBytes;
  const auto load = [&](int step) {
    if (step < steps) {
      const int at = step % kStages * kTile * kPitch;
      load_tile(stages.a + at, a, M, row_bytes, m0, step * kRowBytes);
      load_tile(stages.b + at, b, N, row_bytes, n0, step * kRowBytes);
    }
    ptx::cp_async_commit();  // empty at the end, so that the wait's count stays right
  };
  for (int step = 0; step < kStages - 1; ++step) load(step);

  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int warp_m = warp / 2 * 32, warp_n = warp % 2 * 32;
  float sum[2][4][4] = {};
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // the stage has landed for all, and the next one to be filled has been read
    load(step + kStages - 1);
    const unsigned char* at_a = stages.a + step % kStages * kTile * kPitch;
    const unsigned char* at_b = stages.b + step % kStages * kTile * kPitch;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a_registers[2][4], b_registers[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // Matrices: rows 0-7, rows 8-15 of the first 16 bytes, then of the second.
        const int row = lane % 16, unit = 2 * half + lane / 16;
        ptx::ldmatrix(a_registers[i],
                      ptx::shared_address(at_a + (warp_m + 16 * i + row) * kPitch + unit * 16));
        ptx::ldmatrix(b_registers[i],
                      ptx::shared_address(at_b + (warp_n + 16 * i + row) * kPitch + unit * 16));
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t b_pair[2] = {b_registers[j / 2][j % 2], b_registers[j / 2][2 + j % 2]};
          if constexpr (sizeof(T) == 4) {
            ptx::mma_m16n8k8_tf32(sum[i][j], a_registers[i], b_pair, sum[i][j]);
          } else {
            ptx::mma_m16n8k16<T>(sum[i][j], a_registers[i], b_pair, sum[i][j]);
          }
        }
      }
    }
  }
  ptx::cp_async_wait<0>();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int m = m0 + warp_m + 16 * i + lane / 4 + 8 * (e / 2);
        const int n = n0 + warp_n + 8 * j + 2 * (lane % 4) + e % 2;
        if (m < M && n < N) c[int64_t{m} * N + n] = sum[i][j][e];
      }
    }
  }
}

template <class T>
void gemm_case(uint64_t seed) {
  constexpr int M = 100, N = 72, K = 136;
  const auto a = small_integers<T>(M * K, seed);
  const auto b = small_integers<T>(N * K, seed + 1);
  std::vector<float> want(M * N);
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      for (int k = 0; k < K; ++k) {
        want[m * N + n] += static_cast<float>(a[m * K + k]) * static_cast<float>(b[n * K + k]);
      }
    }
  }
  SharedCarver carve;
  Stages stages(carve);
  Array<T> a_in(a), b_in(b);
  Array<float> out(want.size());
  const int blocks = (M + kTile - 1) / kTile * ((N + kTile - 1) / kTile);
  launch_kernel({"gemm_sm80", blocks, kThreads, nullptr, carve.bytes()}, &gemm_kernel<T>,
                a_in.get(), b_in.get(), out.get(), M, N, K);
  expect_equal(out.read(), want, "GEMM");
}

const Register bf16("gemm_sm80_bf16", gemm_case<__nv_bfloat16>);
const Register f16("gemm_sm80_f16", gemm_case<__half>);
const Register tf32("gemm_sm80_tf32", gemm_case<float>);

}  // namespace
}  // namespace testing
}  // namespace fastconv
