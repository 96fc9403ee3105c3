// Named barriers, clusters, and the registers that warpgroups hand each other.
#include "emulator/barrier.h"

#include <algorithm>
#include <cstring>
#include <map>

#include "emulator/scheduler.h"

namespace fastconv {
namespace emulator {
namespace {

constexpr int kNamedBarriers = 16;
constexpr int kWarpgroup = 128;

struct NamedBarrier {
  int threads = 0;  // 0: nobody is there
  int arrived = 0;
  uint64_t completed = 0;
};
struct NamedBarriers {
  NamedBarrier at[kNamedBarriers];
};

// A warp arrives; the number of completions that a thread of it would wait for.
uint64_t arrive_at(int id, int threads, const char* what) {
  if (id < 1 || id >= kNamedBarriers) {
    fail(std::string(what) + ": barrier " + std::to_string(id) +
         " (1 to 15; 0 is __syncthreads's)");
  }
  if (threads < 32 || threads % 32 != 0 ||
      threads > static_cast<int>(current_block().threads.size())) {
    fail(std::string(what) + ": a count of " + std::to_string(threads) +
         " (whole warps of the block)");
  }
  struct Arrival {
    int id, threads;
    uint64_t until;
  } mine = {id, threads, 0};
  NamedBarrier& barrier = current_block().extra<NamedBarriers>("named barriers").at[id];
  meet_warp(0xffffffffu, what, mine, [&](Arrival** lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes[lane] == nullptr) continue;
      if (lanes[lane]->id != id || lanes[lane]->threads != threads) {
        fail(std::string(what) + ": the lanes of a warp name different barriers or counts");
      }
      lanes[lane]->until = barrier.completed + 1;
    }
    if (barrier.threads != 0 && barrier.threads != threads) {
      fail(std::string(what) + ": barrier " + std::to_string(id) + " with a count of " +
           std::to_string(threads) + " where others came with " + std::to_string(barrier.threads));
    }
    barrier.threads = threads;
    barrier.arrived += 32;
    if (barrier.arrived < threads) return;
    barrier.threads = barrier.arrived = 0;
    ++barrier.completed;
    notify(&barrier);
  });
  return mine.until;
}

// Kept with rank 0.
struct ClusterBarrier {
  int arrived = 0;
  uint64_t completed = 0;
  std::map<const Thread*, uint64_t> until;  // of threads between arrive and wait
};
ClusterBarrier& cluster_barrier() {
  return current_cluster().blocks[0]->extra<ClusterBarrier>("cluster barrier");
}
int cluster_threads() {
  const Cluster& cluster = current_cluster();
  return static_cast<int>(cluster.blocks.size() * cluster.blocks[0]->threads.size());
}

// Of each thread of a block that has the SM to itself; they come in eights.
int launch_registers(int threads) { return std::min(65536 / threads, 256) / 8 * 8; }
struct Registers {
  int available = 0;           // not held by any warpgroup
  std::map<int, int> of_each;  // a thread's, by warpgroup; absent: as launched
};

}  // namespace

void named_barrier_sync(int id, int threads) {
  const uint64_t until = arrive_at(id, threads, "bar.sync");
  const NamedBarrier& barrier = current_block().extra<NamedBarriers>("named barriers").at[id];
  while (barrier.completed < until) {
    wait_on(&barrier, "bar.sync " + std::to_string(id) + ", " + std::to_string(threads));
  }
}

void named_barrier_arrive(int id, int threads) { arrive_at(id, threads, "bar.arrive"); }

bool elect_one() {
  struct Vote {
    bool elected;
  } mine = {false};
  // Which lane hardware takes is not said, only that it is always the same.
  int& chosen = current_block().extra<std::map<int, int>>("elect.sync")[current().warp()];
  meet_warp(0xffffffffu, "elect.sync", mine, [&chosen](Vote** lanes) {
    if (chosen == 0) chosen = 1 + static_cast<int>((*current_cluster().random)() % 32);
    for (int i = 0; i < 32; ++i) {
      if (lanes[(chosen - 1 + i) % 32] == nullptr) continue;
      lanes[(chosen - 1 + i) % 32]->elected = true;
      break;
    }
  });
  return mine.elected;
}

uint32_t cluster_rank() { return static_cast<uint32_t>(current_block().rank); }
uint32_t cluster_size() { return static_cast<uint32_t>(current_cluster().blocks.size()); }

void cluster_arrive() {
  ClusterBarrier& barrier = cluster_barrier();
  char nothing = 0;
  meet_warp(0xffffffffu, "barrier.cluster.arrive", nothing, [](char**) {});
  if (!barrier.until.emplace(&current(), barrier.completed + 1).second) {
    fail("barrier.cluster.arrive twice without a wait between");
  }
  if (++barrier.arrived < cluster_threads()) return;
  barrier.arrived = 0;
  ++barrier.completed;
  notify(&barrier);
}

void cluster_wait() {
  ClusterBarrier& barrier = cluster_barrier();
  const auto mine = barrier.until.find(&current());
  if (mine == barrier.until.end()) fail("barrier.cluster.wait without an arrive");
  const uint64_t until = mine->second;
  barrier.until.erase(mine);
  while (barrier.completed < until) wait_on(&barrier, "barrier.cluster.wait");
  char nothing = 0;
  meet_warp(0xffffffffu, "barrier.cluster.wait", nothing, [](char**) {});
}

uint32_t mapa(uint32_t address, uint32_t rank) {
  if (rank >= cluster_size()) {
    fail("mapa: rank " + std::to_string(rank) + " of a cluster of " +
         std::to_string(cluster_size()));
  }
  return (address & ((1u << kRankShift) - 1u)) | rank << kRankShift;
}

void check_reachable(uint32_t address, const char* what) {
  const Block& there = shared_owner(address, what);
  if (there.rank == current_block().rank) return;
  if (cluster_barrier().completed == 0) {
    fail(std::string(what) +
         ": another block's shared memory before the first cluster barrier: it may not have "
         "started");
  }
  check_not_ended(address, what);
}

void check_not_ended(uint32_t address, const char* what) {
  const Block& there = shared_owner(address, what);
  if (there.exited == static_cast<int>(there.threads.size())) {
    fail(std::string(what) + ": the shared memory of a block that has ended");
  }
}

void load_cluster(uint32_t address, void* to, int64_t bytes) {
  const char* const what = "ld.shared::cluster";
  check_reachable(address, what);
  std::memcpy(to, shared_at(address, bytes, what, bytes), static_cast<size_t>(bytes));
}

void store_cluster(uint32_t address, const void* from, int64_t bytes) {
  const char* const what = "st.shared::cluster";
  check_reachable(address, what);
  std::memcpy(shared_at(address, bytes, what, bytes), from, static_cast<size_t>(bytes));
}

void setmaxnreg(int registers, bool more) {
  const char* const what = more ? "setmaxnreg.inc" : "setmaxnreg.dec";
  Block& block = current_block();
  const int threads = static_cast<int>(block.threads.size());
  const int group = current().index / kWarpgroup;
  if ((group + 1) * kWarpgroup > threads) {
    fail(std::string(what) + ": the block ends within this warpgroup");
  }
  Registers& all = block.extra<Registers>("registers");
  const auto held = [&] {
    const auto found = all.of_each.find(group);
    return found == all.of_each.end() ? launch_registers(threads) : found->second;
  };
  int mine = registers;
  meet_warpgroup(what, mine, [&](int** wanted) {
    for (int i = 0; i < kWarpgroup; ++i) {
      if (*wanted[i] != registers) {
        fail(std::string(what) + ": the warps of a warpgroup ask for different counts");
      }
    }
  });
  if (current().index % kWarpgroup == 0) {
    const int change = registers - held();
    if (more ? change < 0 : change > 0) {
      fail(std::string(what) + " from " + std::to_string(held()) + " to " +
           std::to_string(registers) + " registers");
    }
    while (all.available < change * kWarpgroup) {
      wait_on(&all, std::string(what) + " " + std::to_string(registers) + ": the block has " +
                        std::to_string(all.available) + " registers to give, " +
                        std::to_string(change * kWarpgroup) + " are asked for");
    }
    all.available -= change * kWarpgroup;
    all.of_each[group] = registers;
    notify(&all);
  }
  meet_warpgroup(what, mine, [](int**) {});
}

}  // namespace emulator
}  // namespace fastconv
