// Planted faults of ordinary kernels, each with its right twin: NAME has the fault, NAME.right has
// not. A case passes when the result is right and nothing was reported.
#include "faults.h"

#include "cuda/ptx/barrier.h"
#include "cuda/ptx/cluster.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/fence.h"
#include "cuda/ptx/mbarrier.h"

namespace fastconv {
namespace testing {
namespace {

using cuda::launch_kernel;
using cuda::shared_memory;
using cuda::SharedCarver;

constexpr int kThreads = 128;
constexpr int kRounds = 8;

int64_t shared_bytes() {
  SharedCarver carve;
  carve.take<int>(kThreads);
  return carve.bytes();
}

// Runs `kernel(from, out, broken)` on kRounds * kThreads numbers; each round's come out reversed.
using Kernel = void (*)(const int*, int*, bool);
void run_reversal(Kernel kernel, bool broken, uint64_t seed) {
  const auto from = small_integers<int>(kRounds * kThreads, seed);
  std::vector<int> want(from.size());
  for (size_t i = 0; i < want.size(); ++i) {
    want[i] = from[i / kThreads * kThreads + kThreads - 1 - i % kThreads];
  }
  Array<int> in(from), out(want.size());
  launch_kernel({"reversal", 1, kThreads, nullptr, shared_bytes()}, kernel, in.get(), out.get(),
                broken);
  expect_equal(out.read(), want, "reversal");
}

// ---- __syncthreads ----

enum class Sync { kBoth, kNoFirst, kNoSecond, kDivergent };

__device__ void reverse(const int* from, int* out, Sync sync) {
  SharedCarver carve(shared_memory());
  int* buffer = carve.take<int>(kThreads);
  const int t = static_cast<int>(threadIdx.x);
  for (int round = 0; round < kRounds; ++round) {
    buffer[t] = from[round * kThreads + t];
    if (sync == Sync::kDivergent) {
      if (t < 64) __syncthreads();
    } else if (sync != Sync::kNoFirst) {
      __syncthreads();
    }
    out[round * kThreads + t] = buffer[kThreads - 1 - t];
    if (sync != Sync::kNoSecond) __syncthreads();
  }
}

__global__ void no_first_kernel(const int* from, int* out, bool broken) {
  reverse(from, out, broken ? Sync::kNoFirst : Sync::kBoth);
}
__global__ void no_second_kernel(const int* from, int* out, bool broken) {
  reverse(from, out, broken ? Sync::kNoSecond : Sync::kBoth);
}
__global__ void divergent_kernel(const int* from, int* out, bool broken) {
  reverse(from, out, broken ? Sync::kDivergent : Sync::kBoth);
}
// The upper half ends before the barrier.
__global__ void after_exit_kernel(const int* from, int* out, bool broken) {
  if (broken && threadIdx.x >= 64) return;
  reverse(from, out, Sync::kBoth);
}

const Fault no_first("missing_first_syncthreads",
                     [](bool b, uint64_t s) { run_reversal(&no_first_kernel, b, s); });
const Fault no_second("missing_second_syncthreads",
                      [](bool b, uint64_t s) { run_reversal(&no_second_kernel, b, s); });
const Fault divergent("divergent_syncthreads",
                      [](bool b, uint64_t s) { run_reversal(&divergent_kernel, b, s); });
const Fault after_exit("syncthreads_after_exit",
                       [](bool b, uint64_t s) { run_reversal(&after_exit_kernel, b, s); });

// ---- bounds ----

__global__ void shared_bounds_kernel(const int* from, int* out, bool broken) {
  SharedCarver carve(shared_memory());
  int* buffer = carve.take<int>(kThreads);
  if (broken && threadIdx.x == 5) buffer[kThreads] = 1;
  reverse(from, out, Sync::kBoth);
}
__global__ void global_bounds_kernel(const int* from, int* out, bool broken) {
  if (broken && threadIdx.x == 5) out[kRounds * kThreads] = 1;
  reverse(from, out, Sync::kBoth);
}
// cp.async writes one element beyond the array.
__global__ void cp_async_bounds_kernel(const int* from, int* out, bool broken) {
  SharedCarver carve(shared_memory());
  int* buffer = carve.take<int>(kThreads);
  if (threadIdx.x == 5) {
    ptx::cp_async<4>(ptx::shared_address(buffer + kThreads - (broken ? 0 : 1)), from);
    ptx::cp_async_wait_all();
  }
  __syncthreads();
  reverse(from, out, Sync::kBoth);
}
// The same beyond all of the block's memory.
__global__ void cp_async_far_kernel(const int* from, int* out, bool broken) {
  SharedCarver carve(shared_memory());
  int* buffer = carve.take<int>(kThreads);
  if (threadIdx.x == 5) {
    ptx::cp_async<4>(ptx::shared_address(buffer) + (broken ? 4096 : 0), from);
    ptx::cp_async_wait_all();
  }
  __syncthreads();
  reverse(from, out, Sync::kBoth);
}

const Fault shared_bounds("shared_out_of_bounds",
                          [](bool b, uint64_t s) { run_reversal(&shared_bounds_kernel, b, s); });
const Fault global_bounds("global_out_of_bounds",
                          [](bool b, uint64_t s) { run_reversal(&global_bounds_kernel, b, s); });
const Fault cp_async_bounds("cp_async_out_of_array", [](bool b, uint64_t s) {
  run_reversal(&cp_async_bounds_kernel, b, s);
});
const Fault cp_async_far("cp_async_out_of_block",
                         [](bool b, uint64_t s) { run_reversal(&cp_async_far_kernel, b, s); });

// ---- cp.async ----

enum class CopyFault { kNone, kWaitsForTooFew, kNoWait, kNoSync };

// Two groups under way, so that one may remain.
__device__ void reverse_by_copies(const int* from, int* out, CopyFault fault) {
  SharedCarver carve(shared_memory());
  int* buffers = carve.take<int>(2 * kThreads);
  const int t = static_cast<int>(threadIdx.x);
  const auto load = [&](int round) {
    if (round < kRounds) {
      ptx::cp_async<4>(ptx::shared_address(buffers + round % 2 * kThreads + t),
                       from + round * kThreads + t);
    }
    ptx::cp_async_commit();
  };
  load(0);
  for (int round = 0; round < kRounds; ++round) {
    load(round + 1);
    if (fault == CopyFault::kWaitsForTooFew) {
      ptx::cp_async_wait<2>();
    } else if (fault != CopyFault::kNoWait) {
      ptx::cp_async_wait<1>();
    }
    if (fault != CopyFault::kNoSync) __syncthreads();
    out[round * kThreads + t] = buffers[round % 2 * kThreads + kThreads - 1 - t];
    __syncthreads();
  }
}
__global__ void few_kernel(const int* from, int* out, bool broken) {
  reverse_by_copies(from, out, broken ? CopyFault::kWaitsForTooFew : CopyFault::kNone);
}
__global__ void no_wait_kernel(const int* from, int* out, bool broken) {
  reverse_by_copies(from, out, broken ? CopyFault::kNoWait : CopyFault::kNone);
}
__global__ void no_sync_kernel(const int* from, int* out, bool broken) {
  reverse_by_copies(from, out, broken ? CopyFault::kNoSync : CopyFault::kNone);
}

void run_copies(Kernel kernel, bool broken, uint64_t seed) {
  const auto from = small_integers<int>(kRounds * kThreads, seed);
  std::vector<int> want(from.size());
  for (size_t i = 0; i < want.size(); ++i) {
    want[i] = from[i / kThreads * kThreads + kThreads - 1 - i % kThreads];
  }
  SharedCarver carve;
  carve.take<int>(2 * kThreads);
  Array<int> in(from), out(want.size());
  launch_kernel({"copies", 1, kThreads, nullptr, carve.bytes()}, kernel, in.get(), out.get(),
                broken);
  expect_equal(out.read(), want, "copies");
}

const Fault few("wrong_cp_async_wait_count",
                [](bool b, uint64_t s) { run_copies(&few_kernel, b, s); });
const Fault no_wait("early_read_of_cp_async",
                    [](bool b, uint64_t s) { run_copies(&no_wait_kernel, b, s); });
const Fault no_sync("cp_async_read_by_others_without_syncthreads",
                    [](bool b, uint64_t s) { run_copies(&no_sync_kernel, b, s); });

// ---- named barriers ----

// Warps 0 and 1 write, 2 and 3 read; with the fault the writers' arrival comes before their stores.
__global__ void named_kernel(const int* from, int* out, bool broken) {
  SharedCarver carve(shared_memory());
  int* buffer = carve.take<int>(kThreads);
  const int t = static_cast<int>(threadIdx.x);
  for (int round = 0; round < kRounds; ++round) {
    if (t < 64) {
      if (broken) ptx::named_barrier_arrive(3, kThreads);
      buffer[t] = from[round * kThreads + t];
      buffer[t + 64] = from[round * kThreads + t + 64];
      if (!broken) ptx::named_barrier_arrive(3, kThreads);
    } else {
      ptx::named_barrier_sync(3, kThreads);
      for (int i = t - 64; i < kThreads; i += 64) {
        out[round * kThreads + i] = buffer[kThreads - 1 - i];
      }
    }
    __syncthreads();
  }
}
__global__ void named_count_kernel(const int* from, int* out, bool broken) {
  ptx::named_barrier_sync(1, broken ? kThreads - 32 : kThreads);
  reverse(from, out, Sync::kBoth);
}
const Fault named("named_barrier_arrival_too_early",
                  [](bool b, uint64_t s) { run_reversal(&named_kernel, b, s); });
const Fault named_count("named_barrier_wrong_count",
                        [](bool b, uint64_t s) { run_reversal(&named_count_kernel, b, s); });

// ---- clusters ----

constexpr int kCluster = 2;
enum class ClusterFault { kNone, kNoFirst, kNoMiddle, kNoLast };

// The blocks of a cluster write their numbers into each other's memory, and read theirs from there.
__global__ void exchange_kernel(const int* from, int* out, ClusterFault fault) {
  SharedCarver carve(shared_memory());
  auto* given = carve.take<uint32_t>(kThreads);
  auto* kept = carve.take<uint32_t>(kThreads);
  const int t = static_cast<int>(threadIdx.x);
  const int at = static_cast<int>(blockIdx.x) * kThreads + t;
  const uint32_t other = ptx::cluster_rank() ^ 1;
  if (fault != ClusterFault::kNoFirst) ptx::cluster_sync();
  kept[t] = static_cast<uint32_t>(from[at]);
  ptx::store_cluster(ptx::mapa(ptx::shared_address(given + t), other),
                     static_cast<uint32_t>(from[at]));
  if (fault != ClusterFault::kNoMiddle) ptx::cluster_sync();
  const uint32_t read =
      ptx::load_cluster<uint32_t>(ptx::mapa(ptx::shared_address(kept + kThreads - 1 - t), other));
  out[at] = static_cast<int>(given[kThreads - 1 - t] * 1000 + read);
  if (fault != ClusterFault::kNoLast) ptx::cluster_sync();
}

void run_exchange(ClusterFault fault, uint64_t seed) {
  constexpr int kBlocks = 2 * kCluster;
  std::mt19937_64 random(seed);
  std::vector<int> from(kBlocks * kThreads), want(from.size());
  for (int& x : from) x = static_cast<int>(random() % 100);
  for (size_t i = 0; i < want.size(); ++i) {
    want[i] = 1001 * from[(i / kThreads ^ 1) * kThreads + kThreads - 1 - i % kThreads];
  }
  SharedCarver carve;
  carve.take<uint32_t>(kThreads);
  carve.take<uint32_t>(kThreads);
  Array<int> in(from), out(want.size());
  launch_kernel({"exchange", kBlocks, kThreads, nullptr, carve.bytes(), kCluster}, &exchange_kernel,
                in.get(), out.get(), fault);
  expect_equal(out.read(), want, "exchange");
}

Fault::Run exchange(ClusterFault fault) {
  return [fault](bool broken, uint64_t seed) {
    run_exchange(broken ? fault : ClusterFault::kNone, seed);
  };
}
const Fault no_first_cluster("missing_first_cluster_barrier", exchange(ClusterFault::kNoFirst));
const Fault no_cluster("missing_cluster_barrier", exchange(ClusterFault::kNoMiddle));
const Fault no_last_cluster("missing_last_cluster_barrier", exchange(ClusterFault::kNoLast));

}  // namespace
}  // namespace testing
}  // namespace fastconv
