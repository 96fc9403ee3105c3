// Cutting the workspace into 64-byte aligned pieces, and work into even shares.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/kernel_table.h"

namespace fastconv {

constexpr int64_t kLineBytes = 64;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// A row length, in elements, of at least n and an odd number of cache lines: rows of a matrix then
// fall into different sets of a cache instead of all into one.
template <class Acc>
constexpr int64_t padded_row(int64_t n) {
  constexpr int64_t kPerLine = kLineBytes / static_cast<int64_t>(sizeof(Acc));
  return (divide_up(n, kPerLine) | 1) * kPerLine;
}
static_assert(padded_row<float>(256) == 272 && padded_row<double>(1) == 8,
              "an odd number of lines");

// Counts bytes when made without memory, hands out pointers when made with it: the same sequence
// of take() calls serves Kernel::workspace and Kernel::launch.
class Scratch {
 public:
  explicit Scratch(void* memory = nullptr) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t n) {
    char* at = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += round_up(n * static_cast<int64_t>(sizeof(T)), kLineBytes);
    return reinterpret_cast<T*>(at);
  }
  size_t used() const { return static_cast<size_t>(used_); }

 private:
  char* memory_;
  int64_t used_ = 0;
};

struct Share {
  int64_t begin, end;
};
inline Share share_of(int64_t n, int64_t worker, int64_t workers) {
  return {n * worker / workers, n * (worker + 1) / workers};
}

// Runs body(worker) for each of the context's threads: what has buffers of its own.
template <class Body>
void for_each_worker(const Context& context, const Body& body) {
  context.parallel_for(context.threads, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) body(worker);
  });
}

}  // namespace fastconv
