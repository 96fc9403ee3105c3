#include "emulator/scheduler.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <utility>

namespace fastconv {
namespace emulator {
namespace {

// Not derived from std::exception: nothing but a fiber's entry may catch it.
struct Cancelled {};

thread_local Thread* running = nullptr;
thread_local Cluster* active = nullptr;  // also while asynchronous work completes

void make_ready(Cluster& cluster, Thread* thread) { cluster.ready.add(thread->rank); }

// Ranks anew for all threads: warps in random order and their lanes too, or all threads.
void draw_ranks(Cluster& cluster) {
  std::vector<Thread*>& order = cluster.by_rank;
  std::vector<Thread*> ready;
  while (cluster.ready.count() > 0) {
    ready.push_back(order[static_cast<size_t>(cluster.ready.take_lowest())]);
  }
  std::mt19937_64& random = *cluster.random;
  std::shuffle(order.begin(), order.end(), random);
  if (cluster.per_warp) {
    // Each warp's threads gather where the first of them stands.
    std::unordered_map<uint64_t, int> place_of_warp;
    const auto warp_of = [](const Thread* t) {
      return static_cast<uint64_t>(t->block->rank) << 32 | static_cast<uint64_t>(t->warp());
    };
    for (const Thread* t : order) {
      place_of_warp.emplace(warp_of(t), static_cast<int>(place_of_warp.size()));
    }
    std::stable_sort(order.begin(), order.end(), [&](const Thread* a, const Thread* b) {
      return place_of_warp[warp_of(a)] < place_of_warp[warp_of(b)];
    });
  }
  for (size_t i = 0; i < order.size(); ++i) order[i]->rank = static_cast<int>(i);
  for (Thread* thread : ready) make_ready(cluster, thread);
}

std::string place_of(const Thread& thread) {
  return "block " + std::to_string(thread.view.block.x) + ", thread " +
         std::to_string(thread.index);
}

// Back to the scheduler; throws when the cluster has been cancelled in the meantime.
void stop(Thread& thread) {
  thread.fiber.leave();
  if (thread.block->cluster->cancelled) throw Cancelled();
}

void check_nobody_left_behind(Thread& thread) {
  const Meeting& barrier = thread.block->whole_block;
  if (barrier.arrived == 0) return;
  fail("the thread ends while " + std::to_string(barrier.arrived) +
       " others of its block wait at " + barrier.what);
}

void thread_entry(void* argument) {
  Thread& thread = *static_cast<Thread*>(argument);
  Cluster& cluster = *thread.block->cluster;
  try {
    (*cluster.body)();
    check_nobody_left_behind(thread);
  } catch (const Cancelled&) {
  } catch (...) {
    if (!cluster.failure) cluster.failure = std::current_exception();
  }
  thread.done = true;
  ++thread.block->exited;
  --cluster.live;
}

void resume(Thread& thread) {
  running = &thread;
  thread.fiber.enter(&thread_entry, &thread);
  running = nullptr;
}

// Fibers under way hold objects: each is resumed once, to unwind.
void cancel(Cluster& cluster) {
  cluster.cancelled = true;
  for (const auto& block : cluster.blocks) {
    for (Thread& thread : block->threads) {
      if (thread.done) continue;
      if (thread.fiber.under_way()) {
        resume(thread);
      } else {
        thread.done = true;
        --cluster.live;
      }
    }
  }
  cluster.pending.clear();
  cluster.waiting.clear();
  cluster.ready.clear();
}

// One piece of asynchronous work, any whose queue has nothing older. False: there is none.
bool complete_one(Cluster& cluster) {
  if (cluster.pending.empty()) return false;
  std::vector<size_t> eligible;
  std::vector<const void*> seen;
  for (size_t i = 0; i < cluster.pending.size(); ++i) {
    const void* queue = cluster.pending[i].queue;
    if (queue != nullptr) {
      if (std::find(seen.begin(), seen.end(), queue) != seen.end()) continue;
      seen.push_back(queue);
    }
    eligible.push_back(i);
  }
  const size_t chosen = eligible[(*cluster.random)() % eligible.size()];
  const Pending work = std::move(cluster.pending[chosen]);
  cluster.pending.erase(cluster.pending.begin() + static_cast<std::ptrdiff_t>(chosen));
  work.complete();
  return true;
}

// "0-31, 64": of sorted numbers.
std::string ranges(const std::vector<int>& numbers) {
  std::string text;
  for (size_t i = 0; i < numbers.size();) {
    size_t end = i + 1;
    while (end < numbers.size() && numbers[end] == numbers[end - 1] + 1) ++end;
    text += (text.empty() ? "" : ", ") + std::to_string(numbers[i]);
    if (end - i > 1) text += "-" + std::to_string(numbers[end - 1]);
    i = end;
  }
  return text;
}

std::string deadlock_report(const Cluster& cluster) {
  std::string text = std::string(cluster.shape->name) + ": deadlock, no thread can run";
  for (const auto& block : cluster.blocks) {
    std::map<std::string, std::vector<int>> by_reason;
    for (const Thread& t : block->threads) {
      by_reason[t.done ? "have ended" : "wait for " + t.waits_for].push_back(t.index);
    }
    for (const auto& [reason, threads] : by_reason) {
      text += "\n  block " + std::to_string(block->threads[0].view.block.x) + ", threads " +
              ranges(threads) + ": " + reason;
    }
  }
  return text;
}

void run_until_done(Cluster& cluster) {
  const int64_t redraw_after = 64 + 2 * cluster.live;
  int64_t until_redraw = 0;
  while (cluster.live > 0) {
    if (--until_redraw < 0) {
      draw_ranks(cluster);
      until_redraw = redraw_after + static_cast<int64_t>((*cluster.random)() % 64);
    }
    if (cluster.ready.count() == 0) {
      if (complete_one(cluster)) continue;
      throw Fault(deadlock_report(cluster));
    }
    Thread* next = cluster.by_rank[static_cast<size_t>(cluster.ready.take_lowest())];
    resume(*next);
    if (cluster.failure) return;
  }
  if (!cluster.pending.empty()) {
    throw Fault(std::string(cluster.shape->name) + ": the block ended with " +
                std::to_string(cluster.pending.size()) + " asynchronous operations under way, " +
                cluster.pending.front().what + " the oldest");
  }
}

}  // namespace

void run_cluster(Cluster& cluster) {
  struct Activate {
    Cluster* before = std::exchange(active, nullptr);
    ~Activate() { active = before; }
  } activate;
  active = &cluster;
  cluster.by_rank.clear();
  for (const auto& block : cluster.blocks) {
    for (Thread& thread : block->threads) {
      thread.rank = static_cast<int>(cluster.by_rank.size());
      cluster.by_rank.push_back(&thread);
    }
  }
  cluster.live = static_cast<int64_t>(cluster.by_rank.size());
  cluster.ready.resize(cluster.by_rank.size());
  for (Thread* thread : cluster.by_rank) make_ready(cluster, thread);
  try {
    run_until_done(cluster);
  } catch (...) {
    if (!cluster.failure) cluster.failure = std::current_exception();
  }
  if (cluster.failure) {
    cancel(cluster);
    std::rethrow_exception(cluster.failure);
  }
}

Thread& current() {
  if (running == nullptr) throw std::logic_error("no emulated kernel is running on this thread");
  return *running;
}

const View& view() { return current().view; }

Cluster& current_cluster() {
  if (active == nullptr) throw std::logic_error("no emulated kernel is running on this thread");
  return *active;
}

void fail(const std::string& message) {
  if (active == nullptr) throw Fault(message);
  const std::string where = running != nullptr ? ", " + place_of(*running) : std::string();
  throw Fault(active->shape->name + where + ": " + message);
}

void wait_on(const void* channel, std::string_view what) {
  Thread& thread = current();
  thread.waits_for.assign(what);
  thread.block->cluster->waiting[channel].push_back(&thread);
  stop(thread);
}

void notify(const void* channel) {
  Cluster& cluster = *active;
  const auto found = cluster.waiting.find(channel);
  if (found == cluster.waiting.end()) return;
  const std::vector<Thread*> woken = std::move(found->second);
  cluster.waiting.erase(found);
  for (Thread* thread : woken) make_ready(cluster, thread);
}

void start_async(const void* queue, const std::string& what, std::function<void()> complete) {
  active->pending.push_back({queue, what, std::move(complete)});
}

void meet_raw(uint64_t group, int count, int position, const char* what, void* argument,
              const std::function<void(void**)>& work) {
  Thread& me = current();
  Block& block = *me.block;
  Meeting& meeting = group == 0 ? block.whole_block : block.meetings[group];
  if (meeting.arrived == 0) {
    meeting.what = what;
    meeting.arguments.assign(static_cast<size_t>(count), nullptr);
  } else if (meeting.what != what && std::strcmp(meeting.what, what) != 0) {
    fail(std::string("the thread comes to ") + what + " while others of its group are at " +
         meeting.what);
  }
  void*& mine = meeting.arguments[static_cast<size_t>(position)];
  if (mine != nullptr) fail(std::string("the thread comes twice to one ") + what);
  mine = argument;
  if (++meeting.arrived < count) {
    meeting.waiting.push_back(&me);
    me.waits_for.assign(what);
    stop(me);
    return;
  }
  work(meeting.arguments.data());
  meeting.arrived = 0;
  Cluster& cluster = *block.cluster;
  for (Thread* thread : meeting.waiting) make_ready(cluster, thread);
  meeting.waiting.clear();
}

void check_mask(uint32_t mask, const char* what) {
  const Thread& me = current();
  const int lanes = std::min<int>(32, static_cast<int>(me.block->threads.size()) - me.warp() * 32);
  if ((mask >> me.lane() & 1u) == 0) {
    fail(std::string(what) + ": the thread is not in the mask it names, " + std::to_string(mask));
  }
  // Bits of lanes that do not exist would never arrive; hardware ignores them.
  if (lanes < 32 && mask >> lanes != 0 && mask != 0xffffffffu) {
    fail(std::string(what) + ": the mask names lanes beyond the block's last thread");
  }
}

void check_full_warp(const char* what) {
  if (existing_lanes(0xffffffffu) != 0xffffffffu) {
    fail(std::string(what) + " in a warp of fewer than 32 threads");
  }
}

void check_full_warpgroup(const char* what) {
  const Thread& me = current();
  if ((me.index / 128 + 1) * 128 > static_cast<int>(me.block->threads.size())) {
    fail(std::string(what) + " in a warpgroup of fewer than 128 threads");
  }
}

uint32_t existing_lanes(uint32_t mask) {
  const Thread& me = current();
  const int lanes = static_cast<int>(me.block->threads.size()) - me.warp() * 32;
  return lanes >= 32 ? mask : mask & ((1u << lanes) - 1u);
}

}  // namespace emulator
}  // namespace fastconv
