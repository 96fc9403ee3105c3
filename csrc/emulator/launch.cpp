// A launch: its shape checked as CUDA would, then cluster after cluster, in a random order.
#include "emulator/launch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>

#include "emulator/scheduler.h"

extern "C" {
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* at, size_t bytes);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* at, size_t bytes);
}

namespace fastconv {
namespace emulator {
namespace {

std::atomic<uint64_t> the_seed{0};
std::atomic<int> the_sm_count{kSmCount};

std::mutex log_mutex;
bool logging = false;
std::vector<LogEntry> the_log;

// What CUDA refuses at the launch, and its words.
void check_shape(const LaunchShape& shape) {
  const auto refuse = [&](const char* what, int64_t value, const char* limit) {
    throw std::runtime_error(std::string(shape.name) + ": launching with " + what + " " +
                             std::to_string(value) + ": invalid configuration argument (" + limit +
                             ")");
  };
  if (shape.blocks < 1 || shape.blocks > 0x7fffffff) {
    refuse("a grid of", shape.blocks, "1 to 2^31 - 1 blocks");
  }
  if (shape.threads < 1 || shape.threads > 1024) {
    refuse("blocks of", shape.threads, "1 to 1024 threads");
  }
  if (shape.shared_bytes < 0 || shape.shared_bytes > kSharedMemoryPerBlock) {
    refuse("bytes of shared memory", shape.shared_bytes, "at most 232448 a block");
  }
  if (shape.cluster < 1 || shape.cluster > 8 || shape.blocks % shape.cluster != 0) {
    refuse("clusters of", shape.cluster, "1 to 8 blocks, and the grid is a multiple");
  }
}

// One block's shared memory: exactly `bytes`, anything beyond poisoned for AddressSanitizer.
class SharedArena {
 public:
  explicit SharedArena(int64_t bytes)
      : bytes_(static_cast<size_t>(bytes)), capacity_((bytes_ / 1024 + 2) * 1024) {
    at_ = static_cast<unsigned char*>(std::aligned_alloc(1024, capacity_));
    if (at_ == nullptr) throw std::bad_alloc();
  }
  ~SharedArena() {
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(at_, capacity_);
    std::free(at_);
  }
  SharedArena(const SharedArena&) = delete;
  SharedArena& operator=(const SharedArena&) = delete;

  unsigned char* fresh() {
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(at_, capacity_);
    std::memset(at_, 0xff, capacity_);
    if (__asan_poison_memory_region) {
      __asan_poison_memory_region(at_ + bytes_, capacity_ - bytes_);
    }
    return at_;
  }

 private:
  size_t bytes_, capacity_;
  unsigned char* at_;
};

// A cluster of blocks and threads, made once a launch and set back for each of its clusters.
void build(Cluster& cluster, const LaunchShape& shape) {
  for (int rank = 0; rank < shape.cluster; ++rank) {
    auto block = std::make_unique<Block>();
    block->cluster = &cluster;
    block->rank = rank;
    block->shared_bytes = shape.shared_bytes;
    block->threads.resize(static_cast<size_t>(shape.threads));
    for (int i = 0; i < shape.threads; ++i) {
      Thread& thread = block->threads[static_cast<size_t>(i)];
      thread.block = block.get();
      thread.index = i;
      thread.view.thread = {static_cast<unsigned>(i), 0, 0};
      thread.view.block_size = dim3(static_cast<unsigned>(shape.threads));
      thread.view.grid_size = dim3(static_cast<unsigned>(shape.blocks));
    }
    cluster.blocks.push_back(std::move(block));
  }
}

void set_back(Cluster& cluster, int64_t first_block,
              const std::vector<std::unique_ptr<SharedArena>>& arenas) {
  cluster.waiting.clear();
  for (const auto& block : cluster.blocks) {
    block->shared = arenas[static_cast<size_t>(block->rank)]->fresh();
    block->exited = 0;
    block->async_view.clear();
    block->meetings.clear();
    block->extras.clear();
    for (Thread& thread : block->threads) {
      thread.done = false;
      thread.view.block = {static_cast<unsigned>(first_block + block->rank), 0, 0};
    }
  }
}

}  // namespace

void set_seed(uint64_t seed) { the_seed = seed; }
uint64_t seed() { return the_seed; }

void set_sm_count(int count) { the_sm_count = count; }
int sm_count() { return the_sm_count; }

void start_log() {
  std::lock_guard<std::mutex> lock(log_mutex);
  logging = true;
  the_log.clear();
}

std::vector<LogEntry> stop_log() {
  std::lock_guard<std::mutex> lock(log_mutex);
  logging = false;
  return std::move(the_log);
}

void launch(const LaunchShape& shape, const std::function<void()>& thread) {
  check_shape(shape);
  {
    std::lock_guard<std::mutex> lock(log_mutex);
    if (logging) {
      the_log.push_back(
          {shape.name, shape.blocks, shape.threads, shape.shared_bytes, shape.cluster});
    }
  }
  std::mt19937_64 random(seed());
  std::vector<std::unique_ptr<SharedArena>> arenas;
  for (int rank = 0; rank < shape.cluster; ++rank) {
    arenas.push_back(std::make_unique<SharedArena>(shape.shared_bytes));
  }
  // Blocks must not depend on each other's order.
  std::vector<int32_t> order(static_cast<size_t>(shape.blocks / shape.cluster));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  Cluster cluster;
  cluster.shape = &shape;
  cluster.body = &thread;
  cluster.random = &random;
  build(cluster, shape);
  for (const int32_t number : order) {
    cluster.per_warp = random() % 2 == 0;
    set_back(cluster, int64_t{number} * shape.cluster, arenas);
    run_cluster(cluster);
  }
}

}  // namespace emulator
}  // namespace fastconv
