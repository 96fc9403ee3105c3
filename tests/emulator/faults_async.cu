// Planted faults of kernels that work asynchronously: TMA, mbarriers, wgmma. See faults_simt.cu.
#include "faults.h"

#include "cuda/ptx/fence.h"
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

constexpr int kTile = 64;  // of M, N and K
constexpr int kBytes = kTile * 128;
constexpr int kSteps = 5, kStages = 2;
constexpr int kThreads = 160;  // a consumer warpgroup and a producer warp

enum class F {
  kNone,
  kNoFullWait,
  kReleasedEarly,
  kNoLastWait,
  kConsumerParity,
  kProducerParity,
  kTooManyArrivalsExpected,
  kOneArrivalTooMany,
  kTooManyBytes,
  kTooFewBytes,
  kNoInitFence,
  kNoInit,
  kNoWgmmaFence,
  kNoCommit,
  kOverwrittenBarrier,
  kReadsAccumulators,
  kOutOfBounds,
  kMisaligned,
  kWarpsDiffer,
};

struct Memory {
  uint64_t *full, *empty;
  unsigned char *a, *b;
  __host__ __device__ explicit Memory(SharedCarver& carve)
      : full(carve.take<uint64_t>(kStages, 8)),
        empty(carve.take<uint64_t>(kStages, 8)),
        a(carve.take<unsigned char>(kStages * kBytes, 1024)),
        b(carve.take<unsigned char>(kStages * kBytes, 1024)) {}
};

__device__ void produce(const CUtensorMap* map_a, const CUtensorMap* map_b, const Memory& memory,
                        F fault) {
  for (int step = 0; step < kSteps; ++step) {
    const int stage = step % kStages;
    const uint32_t round = static_cast<uint32_t>(step / kStages) & 1;
    const uint32_t full = ptx::shared_address(memory.full + stage);
    ptx::mbarrier_wait(ptx::shared_address(memory.empty + stage),
                       fault == F::kProducerParity ? round : round ^ 1);
    const uint32_t bytes = fault == F::kTooManyBytes  ? 2 * kBytes + 16
                           : fault == F::kTooFewBytes ? 2 * kBytes - 16
                                                      : 2 * kBytes;
    ptx::mbarrier_arrive_expect_tx(full, bytes);
    if (fault == F::kOneArrivalTooMany) ptx::mbarrier_arrive(full);
    const int shift = fault == F::kMisaligned ? 512 : 0;  // half of the swizzle's pattern
    ptx::tma_load(ptx::shared_address(memory.a + stage * kBytes) + shift, map_a, full,
                  {step * kTile, 0});
    ptx::tma_load(ptx::shared_address(memory.b + stage * kBytes), map_b, full, {step * kTile, 0});
  }
}

__device__ void consume(float (&d)[kTile / 2], const Memory& memory, F fault) {
  for (int i = 0; i < kTile / 2; ++i) d[i] = 0.0f;
  for (int step = 0; step < kSteps; ++step) {
    const int stage = step % kStages;
    const uint32_t round = static_cast<uint32_t>(step / kStages) & 1;
    if (fault != F::kNoFullWait) {
      ptx::mbarrier_wait(ptx::shared_address(memory.full + stage),
                         fault == F::kConsumerParity ? round ^ 1 : round);
    }
    const uint32_t empty = ptx::shared_address(memory.empty + stage);
    const bool other = fault == F::kWarpsDiffer && threadIdx.x / 32 == 3;
    const uint32_t a = ptx::shared_address(memory.a + stage * kBytes) + (other ? 1024 : 0);
    const uint32_t b =
        ptx::shared_address(memory.b + stage * kBytes) + (fault == F::kOutOfBounds ? kBytes : 0);
    ptx::wgmma_fence_registers(d);
    if (fault != F::kNoWgmmaFence) ptx::wgmma_fence();
    for (int k = 0; k < kTile / 16; ++k) {
      ptx::wgmma<Bf16, kTile>(d, ptx::encode_rows_of_128(a + k * 32),
                              ptx::encode_rows_of_128(b + k * 32), 1);
    }
    if (fault != F::kNoCommit) ptx::wgmma_commit();
    if (fault == F::kReadsAccumulators && step == 0) d[0] += 1.0f;
    if (fault == F::kReleasedEarly) ptx::mbarrier_arrive(empty);
    const bool last = step == kSteps - 1;
    if (!(last && fault == F::kNoLastWait)) ptx::wgmma_wait<0>();
    if (fault != F::kReleasedEarly) ptx::mbarrier_arrive(empty);
  }
  ptx::wgmma_fence_registers(d);
}

__global__ void __launch_bounds__(kThreads)
    pipeline_kernel(const __grid_constant__ CUtensorMap map_a,
                    const __grid_constant__ CUtensorMap map_b, float* out, F fault) {
  SharedCarver carve(shared_memory());
  Memory memory(carve);
  if (threadIdx.x == 0 && fault != F::kNoInit) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(ptx::shared_address(memory.full + i), 1);
      ptx::mbarrier_init(ptx::shared_address(memory.empty + i),
                         fault == F::kTooManyArrivalsExpected ? 129 : 128);
    }
    if (fault != F::kNoInitFence) ptx::fence_mbarrier_init();
    if (fault == F::kOverwrittenBarrier) memory.full[1] = 0;
  }
  __syncthreads();
  if (threadIdx.x >= 128) {
    if (threadIdx.x == 128) produce(&map_a, &map_b, memory, fault);
    return;
  }
  float d[kTile / 2];
  consume(d, memory, fault);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (int i = 0; i < kTile / 2; ++i) {
    const int row = 16 * warp + lane / 4 + 8 * (i / 2 % 2);
    out[row * kTile + 8 * (i / 4) + 2 * (lane % 4) + i % 2] = d[i];
  }
}

void run_pipeline(F fault, uint64_t seed) {
  constexpr int K = kSteps * kTile;
  const auto a = small_integers<Bf16>(kTile * K, seed);
  const auto b = small_integers<Bf16>(kTile * K, seed + 1);
  std::vector<float> want(kTile * kTile);
  for (int m = 0; m < kTile; ++m) {
    for (int n = 0; n < kTile; ++n) {
      for (int k = 0; k < K; ++k) {
        want[m * kTile + n] += static_cast<float>(a[m * K + k]) * static_cast<float>(b[n * K + k]);
      }
    }
  }
  Array<Bf16> a_in(a), b_in(b);
  Array<float> out(want.size());
  const auto map = [&](const Array<Bf16>& of) {
    return cuda::encode(TiledMap{cuda::kMapType<Bf16>,
                                 of.get(),
                                 2,
                                 {K, kTile},
                                 {1, K},
                                 {64, kTile},
                                 {1, 1},
                                 CU_TENSOR_MAP_SWIZZLE_128B});
  };
  SharedCarver carve;
  Memory memory(carve);
  launch_kernel({"pipeline", 1, kThreads, nullptr, carve.bytes()}, &pipeline_kernel, map(a_in),
                map(b_in), out.get(), fault);
  expect_equal(out.read(), want, "pipeline");
}

Fault::Run pipeline(F fault) {
  return [fault](bool broken, uint64_t seed) { run_pipeline(broken ? fault : F::kNone, seed); };
}
const Fault no_full_wait("missing_full_wait", pipeline(F::kNoFullWait));
const Fault released("released_before_wgmma_wait", pipeline(F::kReleasedEarly));
const Fault no_last_wait("missing_last_wgmma_wait", pipeline(F::kNoLastWait));
const Fault parity("wrong_consumer_parity", pipeline(F::kConsumerParity));
const Fault producer_parity("wrong_producer_parity", pipeline(F::kProducerParity));
const Fault deadlock("deadlock", pipeline(F::kTooManyArrivalsExpected));
const Fault arrivals("arrival_too_many", pipeline(F::kOneArrivalTooMany));
const Fault many_bytes("expect_tx_too_many_bytes", pipeline(F::kTooManyBytes));
const Fault few_bytes("expect_tx_too_few_bytes", pipeline(F::kTooFewBytes));
const Fault no_init_fence("missing_fence_mbarrier_init", pipeline(F::kNoInitFence));
const Fault no_init("missing_mbarrier_init", pipeline(F::kNoInit));
const Fault no_wgmma_fence("missing_wgmma_fence", pipeline(F::kNoWgmmaFence));
const Fault no_commit("missing_wgmma_commit", pipeline(F::kNoCommit));
const Fault overwritten("overwritten_mbarrier", pipeline(F::kOverwrittenBarrier));
const Fault accumulators("accumulators_used_under_way", pipeline(F::kReadsAccumulators));
const Fault out_of_bounds("wgmma_out_of_bounds", pipeline(F::kOutOfBounds));
const Fault misaligned("tma_destination_misaligned", pipeline(F::kMisaligned));
const Fault warps_differ("wgmma_descriptors_differ", pipeline(F::kWarpsDiffer));

// ---- ordinary stores and the asynchronous proxy ----

constexpr int kRows = 16;
enum class S { kNone, kNoFence, kNoBarrier, kNoReadWait, kEndsEarly };

struct Box {
  unsigned char* at;
  __host__ __device__ explicit Box(SharedCarver& carve)
      : at(carve.take<unsigned char>(kRows * 128, 1024)) {}
};

// Writes boxes of a tensor one after the other through the same memory.
__global__ void store_kernel(const __grid_constant__ CUtensorMap map, S fault) {
  SharedCarver carve(shared_memory());
  Box box(carve);
  constexpr int kBoxes = 4;
  for (int i = 0; i < kBoxes; ++i) {
    for (int e = static_cast<int>(threadIdx.x); e < kRows * 64; e += 64) {
      const int byte = 2 * e;
      *reinterpret_cast<Bf16*>(box.at + (byte ^ (byte / 128 % 8 * 16))) =
          __float2bfloat16_rn(static_cast<float>((e + i) % 200));
    }
    if (fault != S::kNoFence) ptx::fence_proxy_async();
    if (fault != S::kNoBarrier) __syncthreads();
    if (threadIdx.x == 0) {
      ptx::tma_store(&map, ptx::shared_address(box.at), {0, i * kRows});
      ptx::tma_store_commit();
      const bool skip = fault == S::kNoReadWait || (fault == S::kEndsEarly && i == kBoxes - 1);
      if (!skip) ptx::tma_store_wait_read<0>();
    }
    __syncthreads();
  }
}

void run_store(S fault) {
  constexpr int kHeight = 1100;
  std::vector<Bf16> want(kHeight * 64, Bf16(0.0f));
  for (int i = 0; i < 4 * kRows * 64; ++i) {
    want[i] = Bf16(static_cast<float>((i % (kRows * 64) + i / (kRows * 64)) % 200));
  }
  Array<Bf16> out(std::vector<Bf16>(want.size(), Bf16(0.0f)));
  const TiledMap map = {
      cuda::kMapType<Bf16>,      out.get(), 2, {64, kHeight}, {1, 64}, {64, kRows}, {1, 1},
      CU_TENSOR_MAP_SWIZZLE_128B};
  SharedCarver carve;
  Box box(carve);
  launch_kernel({"store", 1, 64, nullptr, carve.bytes()}, &store_kernel, cuda::encode(map), fault);
  expect_equal(out.read(), want, "store");
}
Fault::Run store(S fault) {
  return [fault](bool broken, uint64_t) { run_store(broken ? fault : S::kNone); };
}
const Fault no_fence("missing_fence_proxy_async_before_store", store(S::kNoFence));
const Fault no_barrier("missing_syncthreads_before_store", store(S::kNoBarrier));
const Fault no_read_wait("missing_store_wait", store(S::kNoReadWait));
const Fault ends_early("ends_before_store_has_read", store(S::kEndsEarly));

// wgmma on what threads wrote themselves.
__global__ void __launch_bounds__(128) product_kernel(const Bf16* a, float* out, bool broken) {
  SharedCarver carve(shared_memory());
  auto* tile = carve.take<unsigned char>(kBytes, 1024);
  for (int i = static_cast<int>(threadIdx.x); i < kTile * 64; i += 128) {
    const int byte = 2 * i;
    *reinterpret_cast<Bf16*>(tile + (byte ^ (byte / 128 % 8 * 16))) = a[i];
  }
  if (!broken) ptx::fence_proxy_async();
  __syncthreads();
  float d[kTile / 2] = {};
  ptx::wgmma_fence_registers(d);
  ptx::wgmma_fence();
  const uint64_t matrix = ptx::encode_rows_of_128(ptx::shared_address(tile));
  ptx::wgmma<Bf16, kTile>(d, matrix, matrix, 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_fence_registers(d);
  for (int i = 0; i < kTile / 2; ++i) out[i * 128 + threadIdx.x] = d[i];
}

const Fault no_wgmma_proxy("missing_fence_proxy_async_before_wgmma", [](bool broken,
                                                                        uint64_t seed) {
  const auto a = small_integers<Bf16>(kTile * 64, seed);
  std::vector<float> want(kTile * kTile);
  for (int i = 0; i < kTile / 2; ++i) {
    for (int t = 0; t < 128; ++t) {
      const int m = t / 32 * 16 + t % 32 / 4 + 8 * (i / 2 % 2);
      const int n = 8 * (i / 4) + 2 * (t % 4) + i % 2;
      for (int k = 0; k < 16; ++k) {
        want[i * 128 + t] += static_cast<float>(a[m * 64 + k]) * static_cast<float>(a[n * 64 + k]);
      }
    }
  }
  SharedCarver carve;
  carve.take<unsigned char>(kBytes, 1024);
  Array<Bf16> in(a);
  Array<float> out(want.size());
  launch_kernel({"product", 1, 128, nullptr, carve.bytes()}, &product_kernel, in.get(), out.get(),
                broken);
  expect_equal(out.read(), want, "product");
});

// ---- setmaxnreg ----

__global__ void __launch_bounds__(384, 1) registers_kernel(int* out, bool broken) {
  if (threadIdx.x < 128) {
    if (broken) {
      ptx::setmaxnreg_dec<48>();  // 8 a thread too few for the others
    } else {
      ptx::setmaxnreg_dec<40>();
    }
    out[threadIdx.x] = 1;
  } else {
    ptx::setmaxnreg_inc<232>();
    out[threadIdx.x] = 2;
  }
}

const Fault registers("setmaxnreg_beyond_the_block", [](bool broken, uint64_t) {
  Array<int> out(384);
  launch_kernel({"registers", 1, 384}, &registers_kernel, out.get(), broken);
  std::vector<int> want(384, 2);
  std::fill(want.begin(), want.begin() + 128, 1);
  expect_equal(out.read(), want, "setmaxnreg");
});

}  // namespace
}  // namespace testing
}  // namespace fastconv
