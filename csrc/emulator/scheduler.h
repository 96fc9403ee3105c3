// Runs the threads of a block, or of the blocks of a cluster, as fibers on one OS thread, and gives
// the emulated instructions what they are made of: threads that meet, threads that wait for
// something, asynchronous work that lands as late as the program allows.
//
// What decides whether a missing barrier is found is the order (measured on planted faults: a
// uniformly random one keeps warps in lock-step and misses four of ten):
//   - each warp, or each thread, has a random rank; the ready thread of the lowest runs until it
//     waits; ranks are drawn anew now and then;
//   - asynchronous work completes only when no thread can run, one piece at a time.
#pragma once

#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "emulator/cuda.h"
#include "emulator/fiber.h"

namespace fastconv {
namespace emulator {

// What a detector found. The message begins with the kernel's name.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Block;
struct Cluster;

struct Thread {
  View view;
  Block* block = nullptr;
  int index = 0;  // in the block
  bool done = false;
  int rank = 0;           // among the cluster's threads; the lowest ready one runs
  std::string waits_for;  // waiting: for the deadlock report
  Fiber fiber;

  int warp() const { return index / 32; }
  int lane() const { return index % 32; }
};

// Threads on their way to one meeting; `arguments` by position in the group.
struct Meeting {
  const char* what = nullptr;
  int arrived = 0;
  std::vector<void*> arguments;
  std::vector<Thread*> waiting;
};

struct Block {
  Cluster* cluster = nullptr;
  int rank = 0;  // in the cluster
  std::vector<Thread> threads;
  int exited = 0;
  unsigned char* shared = nullptr;  // shared_bytes, 1024-byte aligned
  int64_t shared_bytes = 0;
  // The asynchronous proxy's view of shared memory: what TMA stores and wgmma read. Ordinary stores
  // reach it at a fence.proxy.async; empty until something looks at it.
  std::vector<unsigned char> async_view;
  // By a group's identity, see meet_raw(). The whole block's, which is by far the most used, apart.
  Meeting whole_block;
  std::unordered_map<uint64_t, Meeting> meetings;
  // Per-block state of emulated instructions (named barriers, mbarriers, register counts ...), each
  // created on first use by the file that owns it.
  std::unordered_map<std::string, std::shared_ptr<void>> extras;

  template <class T>
  T& extra(const char* key) {
    std::shared_ptr<void>& slot = extras[key];
    if (!slot) slot = std::make_shared<T>();
    return *static_cast<T*>(slot.get());
  }
};

// Asynchronous work under way.
struct Pending {
  const void* queue;  // work of one queue completes in order; null: in any order
  std::string what;
  std::function<void()> complete;
};

// Threads that can run, as bits by rank: the lowest is found in a few instructions, where a heap's
// comparisons took most of the emulator's time.
class ReadySet {
 public:
  void resize(size_t threads) { words_.assign((threads + 63) / 64, 0); }
  void add(int rank) {
    words_[static_cast<size_t>(rank) / 64] |= uint64_t{1} << (rank % 64);
    ++count_;
  }
  int take_lowest() {
    size_t i = 0;
    while (words_[i] == 0) ++i;
    const int bit = __builtin_ctzll(words_[i]);
    words_[i] &= words_[i] - 1;
    --count_;
    return static_cast<int>(i) * 64 + bit;
  }
  void clear() {
    for (uint64_t& word : words_) word = 0;
    count_ = 0;
  }
  int64_t count() const { return count_; }

 private:
  std::vector<uint64_t> words_;
  int64_t count_ = 0;
};

struct Cluster {
  const LaunchShape* shape = nullptr;
  const std::function<void()>* body = nullptr;
  std::vector<std::unique_ptr<Block>> blocks;
  std::deque<Pending> pending;
  std::unordered_map<const void*, std::vector<Thread*>> waiting;  // by channel
  std::vector<Thread*> by_rank;
  ReadySet ready;
  int64_t live = 0;  // threads not yet done
  std::mt19937_64* random = nullptr;
  bool per_warp = true;  // how ranks are drawn
  bool cancelled = false;
  std::exception_ptr failure;
};

Thread& current();  // throws where no kernel runs
inline Block& current_block() { return *current().block; }
// Of the running thread, or of the asynchronous work that is being completed.
Cluster& current_cluster();

// Throws Fault, the message preceded by the kernel's name, the block and the thread.
[[noreturn]] void fail(const std::string& message);

// The running thread stops until notify(channel); it must then look again:
//   while (!condition) wait_on(&thing, "mbarrier at shared+64, parity 1");
void wait_on(const void* channel, std::string_view what);
void notify(const void* channel);  // wakes all who wait there

// Runs every thread of `cluster`, whose blocks are set up; throws what one of them threw, or a
// Fault.
void run_cluster(Cluster& cluster);

// `complete` runs when no thread can: as late as a program that waits properly can tell. It runs
// outside any thread (current() throws) and may notify.
void start_async(const void* queue, const std::string& what, std::function<void()> complete);

// `count` threads meet, each with an argument; the last to come runs `work` on all of them, in the
// order of `position`, before any goes on. `group` tells simultaneous meetings of one block apart:
// warp_group() and warpgroup_group() below. All must come for the same `what`.
void meet_raw(uint64_t group, int count, int position, const char* what, void* argument,
              const std::function<void(void**)>& work);
template <class Argument, class Work>
void meet(uint64_t group, int count, int position, const char* what, Argument& mine, Work&& work) {
  meet_raw(group, count, position, what, &mine,
           [&](void** all) { work(reinterpret_cast<Argument**>(all)); });
}
// The lanes of `mask` of the running thread's warp. Fails when it is not in its own mask.
// work(Argument** by_lane): entries of lanes outside the mask are null.
template <class Argument, class Work>
void meet_warp(uint32_t mask, const char* what, Argument& mine, Work&& work);
// All 32 lanes; fails in a block's last warp when that is not full.
template <class Argument, class Work>
void meet_full_warp(const char* what, Argument& mine, Work&& work);
// The 128 threads of the running thread's warpgroup. work(Argument** by_thread).
template <class Argument, class Work>
void meet_warpgroup(const char* what, Argument& mine, Work&& work);

// Shared memory as PTX addresses it: 32 bits, the block's rank in the cluster above bit 24.
constexpr int kRankShift = 24;
uint32_t shared_address(const void* pointer);
// The bytes at `address`, after checking that all of them are shared memory of a block of this
// cluster; `what` names the instruction in the fault.
unsigned char* shared_at(uint32_t address, int64_t bytes, const char* what, int64_t alignment = 1);
Block& shared_owner(uint32_t address, const char* what);

// Global memory that an instruction reads or writes itself: under AddressSanitizer, checked.
void check_global(const void* at, int64_t bytes, const char* what);

// fence.proxy.async: ordinary stores so far become visible to the asynchronous proxy.
void fence_proxy_async();
// What the asynchronous proxy sees of `bytes` at `at` (inside a block's shared memory), and how it
// writes there: both views change.
void async_read(const Block& block, const unsigned char* at, void* to, int64_t bytes);
void async_write(Block& block, unsigned char* at, const void* from, int64_t bytes);

// ---- templates ----

void check_mask(uint32_t mask, const char* what);
// `mask` without lanes beyond the block's last thread.
uint32_t existing_lanes(uint32_t mask);

template <class Argument, class Work>
void meet_warp(uint32_t mask, const char* what, Argument& mine, Work&& work) {
  check_mask(mask, what);
  mask = existing_lanes(mask);
  const Thread& me = current();
  const uint64_t group = (uint64_t{1} << 48) | (static_cast<uint64_t>(me.warp()) << 32) | mask;
  const auto by_lane = [&](void** all) {
    Argument* lanes[32] = {};
    int position = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (mask >> lane & 1u) lanes[lane] = static_cast<Argument*>(all[position++]);
    }
    work(lanes);
  };
  const int position = __builtin_popcount(mask & ((1u << me.lane()) - 1u));
  meet_raw(group, __builtin_popcount(mask), position, what, &mine, by_lane);
}

void check_full_warp(const char* what);

template <class Argument, class Work>
void meet_full_warp(const char* what, Argument& mine, Work&& work) {
  check_full_warp(what);
  meet_warp(0xffffffffu, what, mine, work);
}

void check_full_warpgroup(const char* what);

template <class Argument, class Work>
void meet_warpgroup(const char* what, Argument& mine, Work&& work) {
  check_full_warpgroup(what);
  const Thread& me = current();
  const uint64_t group = (uint64_t{2} << 48) | static_cast<uint64_t>(me.index / 128);
  meet_raw(group, 128, me.index % 128, what, &mine,
           [&](void** all) { work(reinterpret_cast<Argument**>(all)); });
}

}  // namespace emulator
}  // namespace fastconv
