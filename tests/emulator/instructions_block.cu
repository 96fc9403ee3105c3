// Barriers of blocks and clusters, and what clusters share.
#include "cases.h"
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/cluster.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/fence.h"
#include "cuda/ptx/griddepcontrol.h"
#include "cuda/ptx/mbarrier.h"

namespace fastconv {
namespace testing {
namespace {

using cuda::launch_kernel;
using cuda::shared_memory;
using cuda::SharedCarver;

// ---- mbarrier ----

constexpr int kRounds = 5;

// Warp 0 writes, warp 1 doubles and writes back, round by round, through one buffer and two
// mbarriers; nothing else orders them.
__global__ void ping_pong_kernel(const int* from, int* out) {
  SharedCarver carve(shared_memory());
  auto* barriers = carve.take<uint64_t>(2, ptx::kMbarrierBytes);
  auto* buffer = carve.take<int>(32);
  const uint32_t full = ptx::shared_address(barriers), empty = full + 8;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 32);
    ptx::mbarrier_init(empty, 32);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  for (uint32_t round = 0; round < kRounds; ++round) {
    if (threadIdx.x < 32) {
      ptx::mbarrier_wait(empty, (round & 1) ^ 1);  // the first passes at once
      buffer[lane] = from[round * 32 + lane];
      ptx::mbarrier_arrive(full);
    } else {
      ptx::mbarrier_wait(full, round & 1);
      out[round * 32 + lane] = 2 * buffer[31 - lane];
      ptx::mbarrier_arrive(empty);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_inval(full);
    ptx::mbarrier_inval(empty);
  }
}

const Register ping_pong("mbarrier_ping_pong", [](uint64_t seed) {
  const auto from = small_integers<int>(kRounds * 32, seed);
  std::vector<int> want(from.size());
  for (size_t i = 0; i < want.size(); ++i) want[i] = 2 * from[i / 32 * 32 + 31 - i % 32];
  SharedCarver carve;
  carve.take<uint64_t>(2, ptx::kMbarrierBytes);
  carve.take<int>(32);
  Array<int> in(from), out(want.size());
  launch_kernel({"ping_pong", 2, 64, nullptr, carve.bytes()}, &ping_pong_kernel, in.get(),
                out.get());
  expect_equal(out.read(), want, "mbarrier");
});

// Warp 0 copies by cp.async and lets the copies arrive at an mbarrier, where warp 1 waits.
__global__ void noinc_kernel(const int* from, int* out) {
  SharedCarver carve(shared_memory());
  auto* barriers = carve.take<uint64_t>(1, ptx::kMbarrierBytes);
  auto* buffer = carve.take<int>(64);
  const uint32_t full = ptx::shared_address(barriers);
  if (threadIdx.x == 0) ptx::mbarrier_init(full, 32);
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x < 32) {
    for (int i = lane; i < 64; i += 32) {
      ptx::cp_async<4>(ptx::shared_address(buffer + i), from + i);
    }
    ptx::cp_async_mbarrier_arrive_noinc(full);
  } else {
    ptx::mbarrier_wait(full, 0);
    for (int i = lane; i < 64; i += 32) out[i] = buffer[63 - i];
  }
}

const Register noinc("cp_async_mbarrier_arrive", [](uint64_t seed) {
  const auto from = small_integers<int>(64, seed);
  const std::vector<int> want(from.rbegin(), from.rend());
  SharedCarver carve;
  carve.take<uint64_t>(1, ptx::kMbarrierBytes);
  carve.take<int>(64);
  Array<int> in(from), out(want.size());
  launch_kernel({"noinc", 1, 64, nullptr, carve.bytes()}, &noinc_kernel, in.get(), out.get());
  expect_equal(out.read(), want, "cp.async.mbarrier.arrive.noinc");
});

// ---- named barriers, elect.sync ----

// Warps 0 and 1 fill a buffer and only arrive; warps 2 and 3 wait, then read it; for the next round
// the other way round, under another id.
__global__ void named_kernel(const int* from, int* out) {
  SharedCarver carve(shared_memory());
  auto* buffer = carve.take<int>(64);
  const int t = static_cast<int>(threadIdx.x) % 64;
  const bool writer = threadIdx.x < 64;
  for (int round = 0; round < kRounds; ++round) {
    if (writer) {
      if (round > 0) ptx::named_barrier_sync(2, 128);
      buffer[t] = from[round * 64 + t];
      ptx::named_barrier_arrive(1, 128);
    } else {
      ptx::named_barrier_sync(1, 128);
      out[round * 64 + t] = buffer[63 - t];
      if (round + 1 < kRounds) ptx::named_barrier_arrive(2, 128);
    }
  }
}

const Register named("named_barriers", [](uint64_t seed) {
  const auto from = small_integers<int>(kRounds * 64, seed);
  std::vector<int> want(from.size());
  for (size_t i = 0; i < want.size(); ++i) want[i] = from[i / 64 * 64 + 63 - i % 64];
  SharedCarver carve;
  carve.take<int>(64);
  Array<int> in(from), out(want.size());
  launch_kernel({"named", 1, 128, nullptr, carve.bytes()}, &named_kernel, in.get(), out.get());
  expect_equal(out.read(), want, "named barriers");
});

__global__ void elect_kernel(int* out) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (int round = 0; round < 2; ++round) {
    if (ptx::elect_one()) out[2 * warp + round] = 100 + lane;
  }
}

const Register elect("elect_one", [](uint64_t) {
  Array<int> out(std::vector<int>(8, 0));
  launch_kernel({"elect", 1, 128}, &elect_kernel, out.get());
  const auto got = out.read();
  for (int warp = 0; warp < 4; ++warp) {
    expect(got[2 * warp] >= 100 && got[2 * warp] < 132, "nobody was elected");
    expect(got[2 * warp] == got[2 * warp + 1], "another was elected the second time");
  }
});

// ---- clusters ----

constexpr int kCluster = 4;

// Each block gives each other its rank and a number, by stores into the others' memory, arrivals at
// their mbarriers, and loads from their memory.
__global__ void cluster_kernel(const int* from, int* out) {
  SharedCarver carve(shared_memory());
  auto* barriers = carve.take<uint64_t>(1, ptx::kMbarrierBytes);
  auto* mine = carve.take<uint32_t>(1);
  auto* inbox = carve.take<uint32_t>(kCluster);
  const uint32_t all_here = ptx::shared_address(barriers);
  const uint32_t rank = ptx::cluster_rank(), t = threadIdx.x;
  const int number = from[blockIdx.x];
  if (t == 0) {
    ptx::mbarrier_init(all_here, kCluster);
    ptx::fence_mbarrier_init();
    *mine = static_cast<uint32_t>(number);
  }
  ptx::cluster_sync();
  if (t < ptx::cluster_size()) {
    ptx::store_cluster(ptx::mapa(ptx::shared_address(inbox + rank), t),
                       static_cast<uint32_t>(number + 10 * static_cast<int>(t)));
    ptx::mbarrier_arrive_remote_release(ptx::mapa(all_here, t));
  }
  ptx::mbarrier_wait_cluster(all_here, 0);
  if (t < kCluster) {
    const int at = (static_cast<int>(blockIdx.x) * kCluster + static_cast<int>(t)) * 2;
    out[at] = static_cast<int>(inbox[t]);
    out[at + 1] =
        static_cast<int>(ptx::load_cluster<uint32_t>(ptx::mapa(ptx::shared_address(mine), t)));
  }
  ptx::cluster_sync();  // nobody ends while others may read it
}

const Register cluster("cluster", [](uint64_t seed) {
  constexpr int kBlocks = 3 * kCluster;
  const auto from = small_integers<int>(kBlocks, seed);
  std::vector<int> want;
  for (int block = 0; block < kBlocks; ++block) {
    for (int other = 0; other < kCluster; ++other) {
      const int theirs = from[block / kCluster * kCluster + other];
      want.push_back(theirs + 10 * (block % kCluster));
      want.push_back(theirs);
    }
  }
  SharedCarver carve;
  carve.take<uint64_t>(1, ptx::kMbarrierBytes);
  carve.take<uint32_t>(1);
  carve.take<uint32_t>(kCluster);
  Array<int> in(from), out(want.size());
  launch_kernel({"cluster", kBlocks, 64, nullptr, carve.bytes(), kCluster}, &cluster_kernel,
                in.get(), out.get());
  expect_equal(out.read(), want, "cluster");
});

// ---- griddepcontrol ----

__global__ void add_one_kernel(int* x) {
  ptx::griddepcontrol_wait();
  x[threadIdx.x] += 1;
  ptx::griddepcontrol_launch_dependents();
}

const Register overlap("griddepcontrol", [](uint64_t) {
  Array<int> x(std::vector<int>(32, 5));
  cuda::Launch launch = {"add_one", 1, 32};
  launch_kernel(launch, &add_one_kernel, x.get());
  launch.overlap_previous = true;
  launch_kernel(launch, &add_one_kernel, x.get());
  expect_equal(x.read(), std::vector<int>(32, 7), "griddepcontrol");
});

}  // namespace
}  // namespace testing
}  // namespace fastconv
