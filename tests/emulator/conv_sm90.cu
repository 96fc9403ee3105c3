// A small implicit GEMM convolution of the Hopper kind: activations by TMA's im2col mode, filters
// by a tiled map, wgmma. Y [N, P, Q, K] float32 from X [N, H, W, C] bf16 and filters [K, R, S, C].
#include "cases.h"
#include "cuda/ptx/fence.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/tma.h"
#include "cuda/ptx/wgmma.h"
#include "cuda/tensor_map.h"

namespace fastconv {
namespace testing {
namespace {

using cuda::Im2colMap;
using cuda::launch_kernel;
using cuda::shared_memory;
using cuda::SharedCarver;
using cuda::TiledMap;
using Bf16 = __nv_bfloat16;

constexpr int kTilePixels = 64, kTileFilters = 64, kTileC = 64;
constexpr int kStages = 4;
constexpr int kBytesX = kTilePixels * 128, kBytesF = kTileFilters * 128;
constexpr int kThreads = 160;  // a consumer warpgroup and a producer warp

struct Geometry {
  int N, H, W, C, K, R, S, P, Q;
  int stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
};

struct Memory {
  uint64_t *full, *empty;
  unsigned char *x, *f;
  __host__ __device__ explicit Memory(SharedCarver& carve)
      : full(carve.take<uint64_t>(kStages, 8)),
        empty(carve.take<uint64_t>(kStages, 8)),
        x(carve.take<unsigned char>(kStages * kBytesX, 1024)),
        f(carve.take<unsigned char>(kStages * kBytesF, 1024)) {}
};

__device__ inline void produce(const CUtensorMap* map_x, const CUtensorMap* map_f,
                               const Memory& memory, const Geometry& g, int pixel, int filter) {
  const int n = pixel / (g.P * g.Q), p = pixel / g.Q % g.P, q = pixel % g.Q;
  int step = 0;
  for (int c = 0; c < g.C; c += kTileC) {
    for (int r = 0; r < g.R; ++r) {
      for (int s = 0; s < g.S; ++s, ++step) {
        const int stage = step % kStages;
        const uint32_t full = ptx::shared_address(memory.full + stage);
        ptx::mbarrier_wait(ptx::shared_address(memory.empty + stage),
                           (static_cast<uint32_t>(step / kStages) & 1) ^ 1);
        ptx::mbarrier_arrive_expect_tx(full, kBytesX + kBytesF);
        ptx::tma_load_im2col(
            ptx::shared_address(memory.x + stage * kBytesX), map_x, full,
            {c, q * g.stride_w - g.pad_w, p * g.stride_h - g.pad_h, n,
             static_cast<uint16_t>(s * g.dil_w), static_cast<uint16_t>(r * g.dil_h)});
        ptx::tma_load(ptx::shared_address(memory.f + stage * kBytesF), map_f, full,
                      {c, r * g.S + s, filter});
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    conv_kernel(const __grid_constant__ CUtensorMap map_x,
                const __grid_constant__ CUtensorMap map_f, Geometry g, float* y) {
  SharedCarver carve(shared_memory());
  Memory memory(carve);
  const int tiles_k = (g.K + kTileFilters - 1) / kTileFilters;
  const int pixel = static_cast<int>(blockIdx.x) / tiles_k * kTilePixels;
  const int filter = static_cast<int>(blockIdx.x) % tiles_k * kTileFilters;
  const int steps = (g.C + kTileC - 1) / kTileC * g.R * g.S;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(ptx::shared_address(memory.full + i), 1);
      ptx::mbarrier_init(ptx::shared_address(memory.empty + i), 128);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= 128) {
    if (threadIdx.x == 128) produce(&map_x, &map_f, memory, g, pixel, filter);
    return;
  }
  float d[kTileFilters / 2];
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    ptx::mbarrier_wait(ptx::shared_address(memory.full + stage),
                       static_cast<uint32_t>(step / kStages) & 1);
    const uint32_t x = ptx::shared_address(memory.x + stage * kBytesX);
    const uint32_t f = ptx::shared_address(memory.f + stage * kBytesF);
    ptx::wgmma_fence_registers(d);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kTileC / 16; ++k) {
      ptx::wgmma<Bf16, kTileFilters>(d, ptx::encode_rows_of_128(x + k * 32),
                                     ptx::encode_rows_of_128(f + k * 32), step + k > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::mbarrier_arrive(ptx::shared_address(memory.empty + stage));
  }
  ptx::wgmma_fence_registers(d);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < kTileFilters / 2; ++i) {
    const int at = pixel + 16 * warp + lane / 4 + 8 * (i / 2 % 2);
    const int k = filter + 8 * (i / 4) + 2 * (lane % 4) + i % 2;
    if (at < g.N * g.P * g.Q && k < g.K) y[int64_t{at} * g.K + k] = d[i];
  }
}

std::vector<float> reference(const std::vector<Bf16>& x, const std::vector<Bf16>& f,
                             const Geometry& g) {
  std::vector<float> y(static_cast<size_t>(g.N) * g.P * g.Q * g.K);
  for (int n = 0; n < g.N; ++n) {
    for (int p = 0; p < g.P; ++p) {
      for (int q = 0; q < g.Q; ++q) {
        float* to = &y[static_cast<size_t>(((n * g.P + p) * g.Q + q) * g.K)];
        for (int r = 0; r < g.R; ++r) {
          for (int s = 0; s < g.S; ++s) {
            const int h = p * g.stride_h - g.pad_h + r * g.dil_h;
            const int w = q * g.stride_w - g.pad_w + s * g.dil_w;
            if (h < 0 || h >= g.H || w < 0 || w >= g.W) continue;
            const Bf16* from = &x[static_cast<size_t>(((n * g.H + h) * g.W + w) * g.C)];
            for (int k = 0; k < g.K; ++k) {
              const Bf16* tap = &f[static_cast<size_t>(((k * g.R + r) * g.S + s) * g.C)];
              for (int c = 0; c < g.C; ++c) {
                to[k] += static_cast<float>(from[c]) * static_cast<float>(tap[c]);
              }
            }
          }
        }
      }
    }
  }
  return y;
}

void conv_case(uint64_t seed, Geometry g) {
  g.P = (g.H + 2 * g.pad_h - (g.R - 1) * g.dil_h - 1) / g.stride_h + 1;
  g.Q = (g.W + 2 * g.pad_w - (g.S - 1) * g.dil_w - 1) / g.stride_w + 1;
  const auto x = small_integers<Bf16>(static_cast<size_t>(g.N) * g.H * g.W * g.C, seed);
  const auto f = small_integers<Bf16>(static_cast<size_t>(g.K) * g.R * g.S * g.C, seed + 1);
  const auto want = reference(x, f, g);
  Array<Bf16> x_in(x), f_in(f);
  Array<float> out(want.size());
  const Im2colMap map_x = {cuda::kMapType<Bf16>,
                           x_in.get(),
                           {g.C, g.W, g.H, g.N},
                           {1, g.C, int64_t{g.W} * g.C, int64_t{g.H} * g.W * g.C},
                           {-g.pad_w, -g.pad_h},
                           {g.pad_w - (g.S - 1) * g.dil_w, g.pad_h - (g.R - 1) * g.dil_h},
                           {g.stride_w, g.stride_h},
                           kTileC,
                           kTilePixels,
                           CU_TENSOR_MAP_SWIZZLE_128B};
  // Three dimensions, so that channels beyond C are zeros and not the next tap's.
  const TiledMap map_f = {cuda::kMapType<Bf16>,
                          f_in.get(),
                          3,
                          {g.C, int64_t{g.R} * g.S, g.K},
                          {1, g.C, int64_t{g.R} * g.S * g.C},
                          {kTileC, 1, kTileFilters},
                          {1, 1, 1},
                          CU_TENSOR_MAP_SWIZZLE_128B};
  SharedCarver carve;
  Memory memory(carve);
  const int blocks =
      (g.N * g.P * g.Q + kTilePixels - 1) / kTilePixels * ((g.K + kTileFilters - 1) / kTileFilters);
  launch_kernel({"conv_sm90", blocks, kThreads, nullptr, carve.bytes()}, &conv_kernel,
                cuda::encode(map_x), cuda::encode(map_f), g, out.get());
  expect_equal(out.read(), want, "convolution");
}

const Register same("conv_sm90_same", [](uint64_t seed) {
  conv_case(seed, {4, 15, 14, 80, 104, 3, 3, 0, 0, 1, 1, 1, 1, 1, 1});
});
const Register strided("conv_sm90_strided", [](uint64_t seed) {
  conv_case(seed, {5, 15, 14, 72, 112, 3, 3, 0, 0, 2, 3, 2, 1, 1, 1});
});
const Register dilated("conv_sm90_dilated", [](uint64_t seed) {
  conv_case(seed, {5, 15, 14, 72, 112, 3, 3, 0, 0, 2, 1, 0, 4, 3, 2});
});

}  // namespace
}  // namespace testing
}  // namespace fastconv
