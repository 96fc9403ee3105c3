// Barriers of a block, and what the lanes of a warp exchange.
#include "emulator/scheduler.h"

namespace fastconv {
namespace emulator {
namespace {

constexpr uint64_t kWholeBlock = 0;  // the group whose meeting no thread may miss by ending

template <class Argument, class Work>
void meet_block(const char* what, Argument& mine, Work&& work) {
  const Thread& me = current();
  if (me.block->exited > 0) {
    fail(std::string(what) + " after " + std::to_string(me.block->exited) +
         " threads of the block have ended");
  }
  meet(kWholeBlock, static_cast<int>(me.block->threads.size()), me.index, what, mine, work);
}

}  // namespace

void sync_threads() {
  char nothing = 0;
  meet_block("__syncthreads", nothing, [](char**) {});
}

int sync_threads_reduce(int predicate, int how) {
  struct Vote {
    int predicate, result;
  } mine = {predicate, 0};
  static const char* const names[] = {"__syncthreads_count", "__syncthreads_and",
                                      "__syncthreads_or"};
  const int threads = static_cast<int>(current_block().threads.size());
  meet_block(names[how], mine, [threads, how](Vote** all) {
    int count = 0;
    for (int i = 0; i < threads; ++i) count += all[i]->predicate != 0;
    const int result = how == 0 ? count : how == 1 ? count == threads : count > 0;
    for (int i = 0; i < threads; ++i) all[i]->result = result;
  });
  return mine.result;
}

void sync_warp(uint32_t mask) {
  char nothing = 0;
  meet_warp(mask, "__syncwarp", nothing, [](char**) {});
}

uint64_t shuffle(uint32_t mask, uint64_t value, int source, const char* what) {
  struct Exchange {
    uint64_t value, result;
    int source;
  } mine = {value, 0, source};
  meet_warp(mask, what, mine, [what](Exchange** lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes[lane] == nullptr) continue;
      const Exchange* from = lanes[lanes[lane]->source & 31];
      if (from == nullptr) fail(std::string(what) + " reads a lane that takes no part");
      lanes[lane]->result = from->value;
    }
  });
  return mine.result;
}

uint32_t ballot(uint32_t mask, int predicate, const char* what) {
  struct Vote {
    int predicate;
    uint32_t result;
  } mine = {predicate, 0};
  meet_warp(mask, what, mine, [](Vote** lanes) {
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes[lane] != nullptr && lanes[lane]->predicate != 0) bits |= 1u << lane;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes[lane] != nullptr) lanes[lane]->result = bits;
    }
  });
  return mine.result;
}

}  // namespace emulator
}  // namespace fastconv
