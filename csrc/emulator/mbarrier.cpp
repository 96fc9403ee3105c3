// mbarriers. What they count is kept beside the block; the 8 bytes in shared memory hold a mark, by
// which a barrier that was overwritten, or never initialised, is told.
#include "emulator/mbarrier.h"

#include <cstring>
#include <unordered_map>

#include "emulator/barrier.h"
#include "emulator/scheduler.h"

namespace fastconv {
namespace emulator {
namespace {

constexpr int64_t kBytes = 8;
constexpr int64_t kMostArrivals = (1 << 20) - 1;
constexpr int64_t kMostBytes = (1 << 20) - 1;  // of tx-count, either sign
constexpr uint64_t kMark = 0x6d62617272696572u;

struct Mbarrier {
  int64_t arrivals = 0;  // that complete a phase
  int64_t pending = 0;   // still to come
  int64_t bytes = 0;     // announced and not landed; negative when they landed first
  uint64_t phase = 0;    // completed ones
  const Thread* initialiser = nullptr;
  bool published = false;
};
using Mbarriers = std::unordered_map<uint32_t, Mbarrier>;  // by address

Mbarriers& mbarriers_of(Block& block) { return block.extra<Mbarriers>("mbarriers"); }

std::string place(uint32_t address) {
  return "the mbarrier at shared+" + std::to_string(address & ((1u << kRankShift) - 1u)) +
         (current_cluster().blocks.size() > 1 ? " of rank " + std::to_string(address >> kRankShift)
                                              : std::string());
}

std::string state_of(const Mbarrier& b) {
  return "its phase " + std::to_string(b.phase) + " lacks " + std::to_string(b.pending) + " of " +
         std::to_string(b.arrivals) + " arrivals and " + std::to_string(b.bytes) + " bytes";
}

Mbarrier& find(uint32_t address, const char* what) {
  Block& block = shared_owner(address, what);
  const unsigned char* at = shared_at(address, kBytes, what, kBytes);
  Mbarriers& all = mbarriers_of(block);
  const auto found = all.find(address);
  if (found == all.end()) {
    fail(std::string(what) + ": " + place(address) + " has not been initialised");
  }
  uint64_t mark;
  std::memcpy(&mark, at, kBytes);
  if (mark != (kMark ^ address)) {
    fail(std::string(what) + ": " + place(address) + " has been overwritten");
  }
  return found->second;
}

void check_own(uint32_t address, const char* what) {
  if (&shared_owner(address, what) != &current_block()) {
    fail(std::string(what) + ": " + place(address) + " is not the running block's");
  }
}

std::string wait_text(uint32_t address, uint32_t parity, const Mbarrier& b) {
  return place(address) + ", parity " + std::to_string(parity) + ": " + state_of(b);
}

void complete_if_due(Mbarrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  ++b.phase;
  b.pending = b.arrivals;
  notify(&b);
}

// Those who wait show the present state in the deadlock report.
void refresh_waiters(uint32_t address, const Mbarrier& b) {
  const auto& waiting = current_cluster().waiting;
  const auto found = waiting.find(&b);
  if (found == waiting.end()) return;
  const uint32_t parity = b.phase % 2;  // who waits, waits for the phase under way
  const std::string text = wait_text(address, parity, b);
  for (Thread* thread : found->second) thread->waits_for = text;
}

void arrive(uint32_t address, const char* what) {
  Mbarrier& b = find(address, what);
  if (b.pending == 0) {
    fail(std::string(what) + ": an arrival too many at " + place(address) + ", " + state_of(b));
  }
  --b.pending;
  complete_if_due(b);
  refresh_waiters(address, b);
}

void expect(uint32_t address, uint32_t bytes, const char* what) {
  Mbarrier& b = find(address, what);
  b.bytes += bytes;
  if (bytes > kMostBytes || b.bytes > kMostBytes) {
    fail(std::string(what) + ": more than 2^20 - 1 bytes at " + place(address));
  }
}

}  // namespace

void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  const char* const what = "mbarrier.init";
  check_own(barrier, what);
  if (arrivals < 1 || arrivals > kMostArrivals) {
    fail(std::string(what) + ": a count of " + std::to_string(arrivals));
  }
  unsigned char* at = shared_at(barrier, kBytes, what, kBytes);
  Mbarriers& all = mbarriers_of(current_block());
  if (all.count(barrier) != 0) {
    fail(std::string(what) + ": " + place(barrier) + " is initialised twice");
  }
  Mbarrier& b = all[barrier];
  b.arrivals = b.pending = arrivals;
  b.initialiser = &current();
  const uint64_t mark = kMark ^ barrier;
  std::memcpy(at, &mark, kBytes);
}

void mbarrier_inval(uint32_t barrier) {
  const char* const what = "mbarrier.inval";
  check_own(barrier, what);
  const Mbarrier& b = find(barrier, what);
  if (current_cluster().waiting.count(&b) != 0) {
    fail(std::string(what) + ": threads wait at " + place(barrier));
  }
  if (b.bytes != 0) fail(std::string(what) + ": " + place(barrier) + ", " + state_of(b));
  mbarriers_of(current_block()).erase(barrier);
  std::memset(shared_at(barrier, kBytes, what), 0xff, kBytes);
}

void mbarrier_arrive(uint32_t barrier) {
  check_own(barrier, "mbarrier.arrive");
  arrive(barrier, "mbarrier.arrive");
}

void mbarrier_arrive_after_copies(uint32_t barrier) { arrive(barrier, "cp.async.mbarrier.arrive"); }

void mbarrier_arrive_remote(uint32_t barrier) {
  const char* const what = "mbarrier.arrive.shared::cluster";
  check_reachable(barrier, what);
  if (&shared_owner(barrier, what) != &current_block() && !find(barrier, what).published) {
    fail(std::string(what) + ": " + place(barrier) +
         " was not made visible by fence_mbarrier_init() after its initialisation");
  }
  arrive(barrier, what);
}

void mbarrier_expect_tx(uint32_t barrier, uint32_t bytes) {
  check_own(barrier, "mbarrier.expect_tx");
  expect(barrier, bytes, "mbarrier.expect_tx");
}

void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  check_own(barrier, "mbarrier.arrive.expect_tx");
  expect(barrier, bytes, "mbarrier.arrive.expect_tx");
  arrive(barrier, "mbarrier.arrive.expect_tx");
}

void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  const char* const what = "mbarrier.try_wait";
  check_own(barrier, what);
  if (parity > 1) fail(std::string(what) + ": a parity of " + std::to_string(parity));
  for (;;) {
    const Mbarrier& b = find(barrier, what);
    if (b.phase % 2 != parity) return;
    wait_on(&b, wait_text(barrier, parity, b));
  }
}

void publish_mbarriers() {
  for (auto& [address, b] : mbarriers_of(current_block())) {
    if (b.initialiser == &current()) b.published = true;
  }
}

void mbarrier_check_for_copy(uint32_t barrier, const char* what) {
  if (!find(barrier, what).published) {
    fail(std::string(what) + ": " + place(barrier) +
         " was not made visible to copies by fence_mbarrier_init() after its initialisation");
  }
}

void mbarrier_complete_tx(uint32_t barrier, int64_t bytes, const char* what) {
  Mbarrier& b = find(barrier, what);
  b.bytes -= bytes;
  if (b.bytes < -kMostBytes) {
    fail(std::string(what) + ": more than 2^20 - 1 bytes landed unannounced at " + place(barrier));
  }
  complete_if_due(b);
  refresh_waiters(barrier, b);
}

}  // namespace emulator
}  // namespace fastconv
