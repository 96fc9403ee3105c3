// cp.async: copies of one thread, in groups that complete in order.
#include "emulator/cp_async.h"

#include <cstring>
#include <map>

#include "emulator/mbarrier.h"
#include "emulator/scheduler.h"

namespace fastconv {
namespace emulator {
namespace {

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes, source_bytes;
};

struct ThreadCopies {
  std::vector<Copy> open;         // since the last commit
  int64_t committed = 0;          // groups; empty ones take no work
  std::deque<int64_t> under_way;  // of which groups, by number from 1 on, pieces are
};
using Copies = std::map<int, ThreadCopies>;  // by thread; a map keeps its nodes where they are

ThreadCopies& mine() { return current_block().extra<Copies>("cp.async")[current().index]; }

// An ordinary write: the asynchronous proxy does not see it before a fence.
void carry_out(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    if (copy.source_bytes > 0) {
      check_global(copy.from, copy.source_bytes, "cp.async");
      std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.source_bytes));
    }
    std::memset(copy.to + copy.source_bytes, 0,
                static_cast<size_t>(copy.bytes - copy.source_bytes));
  }
}

}  // namespace

void cp_async(uint32_t to, const void* from, int bytes, int source_bytes) {
  if (source_bytes < 0 || source_bytes > bytes) {
    fail("cp.async: " + std::to_string(source_bytes) + " source bytes of " + std::to_string(bytes));
  }
  if (reinterpret_cast<uintptr_t>(from) % static_cast<uintptr_t>(bytes) != 0) {
    fail("cp.async: the global address is not a multiple of " + std::to_string(bytes));
  }
  if (&shared_owner(to, "cp.async") != &current_block()) {
    fail("cp.async: the destination lies in another block");
  }
  unsigned char* const at = shared_at(to, bytes, "cp.async", bytes);
  if (source_bytes > 0) check_global(from, source_bytes, "cp.async");
  std::memset(at, 0xff, static_cast<size_t>(bytes));
  mine().open.push_back({at, static_cast<const unsigned char*>(from), bytes, source_bytes});
}

void cp_async_commit() {
  ThreadCopies& copies = mine();
  ++copies.committed;
  if (copies.open.empty()) return;
  copies.under_way.push_back(copies.committed);
  start_async(&copies, "a group of cp.async", [&copies, group = std::move(copies.open)] {
    carry_out(group);
    copies.under_way.pop_front();
    notify(&copies);
  });
  copies.open = {};
}

void cp_async_wait(int pending) {
  ThreadCopies& copies = mine();
  while (!copies.under_way.empty() && copies.under_way.front() <= copies.committed - pending) {
    wait_on(&copies, "cp.async.wait_group " + std::to_string(pending));
  }
}

void cp_async_wait_all() {
  cp_async_commit();
  cp_async_wait(0);
}

void cp_async_mbarrier_arrive_noinc(uint32_t barrier) {
  if (&shared_owner(barrier, "cp.async.mbarrier.arrive") != &current_block()) {
    fail("cp.async.mbarrier.arrive: the mbarrier lies in another block");
  }
  ThreadCopies& copies = mine();
  copies.under_way.push_back(copies.committed + 1);  // the copies belong to the next group too
  start_async(&copies, "cp.async.mbarrier.arrive",
              [&copies, barrier, group = std::move(copies.open)] {
                carry_out(group);
                copies.under_way.pop_front();
                notify(&copies);
                mbarrier_arrive_after_copies(barrier);
              });
  copies.open = {};
}

}  // namespace emulator
}  // namespace fastconv
