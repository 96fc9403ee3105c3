// Shared memory as PTX addresses it, and what the asynchronous proxy sees of it.
#include <cstring>

#include "emulator/scheduler.h"

extern "C" {
__attribute__((weak)) void* __asan_region_is_poisoned(void* at, size_t bytes);
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* at, size_t bytes);
}

namespace fastconv {
namespace emulator {
namespace {

constexpr uint32_t kOffsetMask = (1u << kRankShift) - 1u;
constexpr unsigned char kPoison = 0xff;  // a NaN in every floating-point format

std::vector<unsigned char>& view_of(Block& block) {
  if (block.async_view.empty()) {
    block.async_view.assign(static_cast<size_t>(block.shared_bytes), kPoison);
  }
  return block.async_view;
}

std::string place(uint32_t address) {
  return "shared+" + std::to_string(address & kOffsetMask) + " of block " +
         std::to_string(address >> kRankShift) + " of the cluster";
}

bool poisoned(const void* at, int64_t bytes) {
  return bytes > 0 && __asan_region_is_poisoned != nullptr &&
         __asan_region_is_poisoned(const_cast<void*>(at), static_cast<size_t>(bytes)) != nullptr;
}

// memcpy is AddressSanitizer's wherever its library is loaded, and would stop at the first gap.
void copy_with_gaps(unsigned char* to, const unsigned char* from, int64_t bytes) {
  using Word = uint64_t __attribute__((vector_size(32), aligned(1), may_alias));
  constexpr int64_t kWord = sizeof(Word);
  int64_t at = 0;
  for (; at + kWord <= bytes; at += kWord) {
    *reinterpret_cast<Word*>(to + at) = *reinterpret_cast<const Word*>(from + at);
  }
  for (; at < bytes; ++at) to[at] = from[at];
}

}  // namespace

unsigned char* shared_memory() { return current_block().shared; }

void poison_gap(unsigned char* at, int64_t bytes) {
  const Block& block = current_block();
  if (at + bytes > block.shared + block.shared_bytes) {
    fail("more shared memory is carved, " + std::to_string(at + bytes - block.shared) +
         " bytes, than the launch asked for, " + std::to_string(block.shared_bytes));
  }
  if (__asan_poison_memory_region != nullptr) {
    __asan_poison_memory_region(at, static_cast<size_t>(bytes));
  }
}

uint32_t shared_address(const void* pointer) {
  const auto* at = static_cast<const unsigned char*>(pointer);
  for (const auto& block : current_cluster().blocks) {
    if (at >= block->shared && at < block->shared + block->shared_bytes) {
      return static_cast<uint32_t>(at - block->shared) | static_cast<uint32_t>(block->rank)
                                                             << kRankShift;
    }
  }
  fail("a pointer into no block's shared memory is taken for a shared address");
}

Block& shared_owner(uint32_t address, const char* what) {
  const auto& blocks = current_cluster().blocks;
  const size_t rank = address >> kRankShift;
  if (rank >= blocks.size()) fail(std::string(what) + ": " + place(address) + " does not exist");
  return *blocks[rank];
}

unsigned char* shared_at(uint32_t address, int64_t bytes, const char* what, int64_t alignment) {
  Block& block = shared_owner(address, what);
  const int64_t offset = address & kOffsetMask;
  if (offset % alignment != 0) {
    fail(std::string(what) + ": " + place(address) + " is not aligned to " +
         std::to_string(alignment) + " bytes");
  }
  if (offset + bytes > block.shared_bytes || poisoned(block.shared + offset, bytes)) {
    fail(std::string(what) + ": " + std::to_string(bytes) + " bytes at " + place(address) +
         " run out of an array or of the " + std::to_string(block.shared_bytes) +
         " bytes that the block has");
  }
  return block.shared + offset;
}

void check_global(const void* at, int64_t bytes, const char* what) {
  if (at == nullptr && bytes > 0) fail(std::string(what) + ": a null pointer");
  if (poisoned(at, bytes)) {
    fail(std::string(what) + ": " + std::to_string(bytes) +
         " bytes of global memory run out of their allocation");
  }
}

void fence_proxy_async() {
  for (const auto& block : current_cluster().blocks) {
    if (block->shared_bytes > 0) {
      copy_with_gaps(view_of(*block).data(), block->shared, block->shared_bytes);
    }
  }
}

void async_read(const Block& block, const unsigned char* at, void* to, int64_t bytes) {
  if (block.async_view.empty()) {
    std::memset(to, kPoison, static_cast<size_t>(bytes));
  } else {
    std::memcpy(to, block.async_view.data() + (at - block.shared), static_cast<size_t>(bytes));
  }
}

void async_write(Block& block, unsigned char* at, const void* from, int64_t bytes) {
  std::memcpy(at, from, static_cast<size_t>(bytes));
  std::memcpy(view_of(block).data() + (at - block.shared), from, static_cast<size_t>(bytes));
}

}  // namespace emulator
}  // namespace fastconv
