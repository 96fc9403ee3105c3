// A small GEMM of the Hopper kind: TMA with 128-byte swizzle into a ring of stages guarded by
// mbarriers, wgmma, a producer warp, consumer warpgroups that take its registers, clusters of two
// blocks that load half of B each for both, and an epilogue by stmatrix and TMA store.
// C [M x N] bf16 = A [M x K] * B [N x K]^T, all row by row.
#include "cases.h"
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/cluster.h"
#include "cuda/ptx/fence.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/setmaxnreg.h"
#include "cuda/ptx/tma.h"
#include "cuda/ptx/wgmma.h"
#include "cuda/tensor_map.h"

namespace fastconv {
namespace testing {
namespace {

using cuda::launch_kernel;
using cuda::shared_memory;
using cuda::SharedCarver;
using cuda::TiledMap;
using Bf16 = __nv_bfloat16;

constexpr int kTileM = 128, kTileN = 128, kTileK = 64;  // 64 bf16: the swizzle's 128 bytes
constexpr int kConsumers = 2;                           // warpgroups of 64 rows of M
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kCluster = 2;
constexpr int kStages = 3;
constexpr int kBytesA = kTileM * 128, kBytesB = kTileN * 128, kPartB = kBytesB / kCluster;
constexpr int kBoxColumns = 64, kBoxBytes = 64 * 128;  // of C: 64 rows, 64 columns
// Each consumer warp of each block of the cluster says when it has done with a stage.
constexpr int kReleases = kConsumers * 4 * kCluster;

struct Memory {
  uint64_t *full, *empty;
  unsigned char *a, *b, *c;
  __host__ __device__ explicit Memory(SharedCarver& carve)
      : full(carve.take<uint64_t>(kStages, 8)),
        empty(carve.take<uint64_t>(kStages, 8)),
        a(carve.take<unsigned char>(kStages * kBytesA, 1024)),
        b(carve.take<unsigned char>(kStages * kBytesB, 1024)),
        c(carve.take<unsigned char>(kTileM * kTileN * 2, 1024)) {}
};

__device__ inline void produce(const CUtensorMap* map_a, const CUtensorMap* map_b,
                               const Memory& memory, int m0, int n0, int steps) {
  const int rank = static_cast<int>(ptx::cluster_rank());
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    const uint32_t round = static_cast<uint32_t>(step / kStages) & 1;
    const uint32_t full = ptx::shared_address(memory.full + stage);
    ptx::mbarrier_wait(ptx::shared_address(memory.empty + stage), round ^ 1);
    ptx::mbarrier_arrive_expect_tx(full, kBytesA + kBytesB);
    ptx::tma_load(ptx::shared_address(memory.a + stage * kBytesA), map_a, full,
                  {step * kTileK, m0});
    ptx::tma_load_multicast(ptx::shared_address(memory.b + stage * kBytesB + rank * kPartB), map_b,
                            full, (1 << kCluster) - 1,
                            {step * kTileK, n0 + rank * kTileN / kCluster});
  }
}

// The warp has done with the stage, in both blocks: their producers fill each other's halves.
__device__ inline void release(const Memory& memory, int stage) {
  const uint32_t empty = ptx::shared_address(memory.empty + stage);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane < kCluster) {
    ptx::mbarrier_arrive_remote(ptx::mapa(empty, static_cast<uint32_t>(lane)));
  }
}

__device__ inline uint32_t pack(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &both, 4);
  return bits;
}

// 64 x 128 accumulators as two boxes of 64 x 64 in shared memory, swizzled, then stored.
__device__ inline void store(const float (&d)[kTileN / 2], const CUtensorMap* map_c,
                             unsigned char* box, int m, int n, int consumer) {
  const int warp = static_cast<int>(threadIdx.x) / 32 % 4,
            lane = static_cast<int>(threadIdx.x) % 32;
  const int row = 16 * warp + lane % 16;
#pragma unroll
  for (int i = 0; i < kTileN / 16; ++i) {
    const uint32_t matrices[4] = {pack(d[8 * i], d[8 * i + 1]), pack(d[8 * i + 2], d[8 * i + 3]),
                                  pack(d[8 * i + 4], d[8 * i + 5]),
                                  pack(d[8 * i + 6], d[8 * i + 7])};
    const int unit = 2 * (i % 4) + lane / 16;
    const int at = i / 4 * kBoxBytes + row * 128 + (unit ^ row % 8) * 16;
    ptx::stmatrix(ptx::shared_address(box + at), matrices);
  }
  ptx::fence_proxy_async();
  ptx::named_barrier_sync(1 + consumer, 128);
  if (warp == 0 && ptx::elect_one()) {
    for (int i = 0; i < kTileN / kBoxColumns; ++i) {
      ptx::tma_store(map_c, ptx::shared_address(box + i * kBoxBytes), {n + i * kBoxColumns, m});
    }
    ptx::tma_store_commit();
    ptx::tma_store_wait_read<0>();
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap map_a,
                const __grid_constant__ CUtensorMap map_b,
                const __grid_constant__ CUtensorMap map_c, int blocks_n, int K) {
  SharedCarver carve(shared_memory());
  Memory memory(carve);
  // The blocks of a cluster are neighbours along M.
  const int cluster = static_cast<int>(blockIdx.x) / kCluster;
  const int m0 = (cluster / blocks_n * kCluster + static_cast<int>(ptx::cluster_rank())) * kTileM;
  const int n0 = cluster % blocks_n * kTileN;
  const int steps = (K + kTileK - 1) / kTileK;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(ptx::shared_address(memory.full + i), 1);
      ptx::mbarrier_init(ptx::shared_address(memory.empty + i), kReleases);
    }
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_sync();
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_dec<40>();
    if (threadIdx.x < 32 && ptx::elect_one()) {
      produce(&map_a, &map_b, memory, m0, n0, steps);
    }
    __syncwarp();
  } else {
    ptx::setmaxnreg_inc<232>();
    const int consumer = static_cast<int>(threadIdx.x) / 128 - 1;
    float d[kTileN / 2];
    ptx::wgmma_fence_registers(d);
    for (int step = 0; step < steps; ++step) {
      const int stage = step % kStages;
      ptx::mbarrier_wait(ptx::shared_address(memory.full + stage),
                         static_cast<uint32_t>(step / kStages) & 1);
      const uint32_t a = ptx::shared_address(memory.a + stage * kBytesA) + consumer * 64 * 128;
      const uint32_t b = ptx::shared_address(memory.b + stage * kBytesB);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kTileK / 16; ++k) {
        ptx::wgmma<Bf16, kTileN>(d, ptx::encode_rows_of_128(a + k * 32),
                                 ptx::encode_rows_of_128(b + k * 32), step + k > 0);
      }
      ptx::wgmma_commit();
      if (step > 0) {
        ptx::wgmma_wait<1>();  // the step before has read its stage
        release(memory, (step - 1) % kStages);
      }
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_fence_registers(d);
    store(d, &map_c, memory.c + consumer * 2 * kBoxBytes, m0 + consumer * 64, n0, consumer);
    __syncwarp();
  }
  ptx::cluster_sync();  // neither block ends while the other's copies or arrivals come
}

TiledMap rows_of_128(const Bf16* base, int rows, int columns, int box_rows) {
  return {cuda::kMapType<Bf16>, base,           2,      {columns, rows},
          {1, columns},         {64, box_rows}, {1, 1}, CU_TENSOR_MAP_SWIZZLE_128B};
}

const Register gemm("gemm_sm90", [](uint64_t seed) {
  constexpr int M = 300, N = 264, K = 264;  // each tensor is larger than 128 KiB
  const auto a = small_integers<Bf16>(M * K, seed);
  auto b = small_integers<Bf16>(N * K, seed + 1);
  for (size_t i = 0; i < b.size(); i += 2) b[i] = Bf16(0.0f);  // sums below 256 are exact in bf16
  std::vector<Bf16> want(M * N);
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      float sum = 0.0f;
      for (int k = 0; k < K; ++k) {
        sum += static_cast<float>(a[m * K + k]) * static_cast<float>(b[n * K + k]);
      }
      want[m * N + n] = Bf16(sum);
    }
  }
  Array<Bf16> a_in(a), b_in(b), out(want.size());
  SharedCarver carve;
  Memory memory(carve);
  const int blocks_n = (N + kTileN - 1) / kTileN;
  const int clusters = (M + kTileM * kCluster - 1) / (kTileM * kCluster) * blocks_n;
  launch_kernel({"gemm_sm90", clusters * kCluster, kThreads, nullptr, carve.bytes(), kCluster},
                &gemm_kernel, cuda::encode(rows_of_128(a_in.get(), M, K, kTileM)),
                cuda::encode(rows_of_128(b_in.get(), N, K, kTileN / kCluster)),
                cuda::encode(rows_of_128(out.get(), M, N, 64)), blocks_n, K);
  expect_equal(out.read(), want, "GEMM");
});

}  // namespace
}  // namespace testing
}  // namespace fastconv
