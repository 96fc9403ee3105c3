// TMA: boxes of tensors between global and shared memory. The destination is poisoned when a load
// is issued; global memory is read, and bytes are counted, when it completes. A store reads shared
// memory when it is issued and when its group completes, and what it reads must not have changed.
#include "emulator/tma.h"

#include <algorithm>
#include <cstring>
#include <map>

#include "emulator/barrier.h"
#include "emulator/mbarrier.h"
#include "emulator/mma.h"
#include "emulator/scheduler.h"
#include "emulator/tensor_map.h"

namespace fastconv {
namespace emulator {
namespace {

constexpr int kUnit = 16;  // bytes that a swizzle moves together

TensorMapFields fields_of(const CUtensorMap* map, const char* what) {
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) {
    fail(std::string(what) + ": the tensor map is not aligned to 64 bytes");
  }
  TensorMapFields fields;
  std::memcpy(&fields, map, sizeof(fields));
  if (fields.mark != kTensorMapMark) fail(std::string(what) + ": not a tensor map");
  return fields;
}

void check_kind(const TensorMapFields& map, bool im2col, int rank, const char* what) {
  if (map.im2col != im2col || map.rank != rank) {
    fail(std::string(what) + ": a map of rank " + std::to_string(map.rank) +
         (map.im2col ? ", im2col," : ", tiled,") + " in an instruction of rank " +
         std::to_string(rank) + (im2col ? ", im2col" : ", tiled"));
  }
}

// A box starts where its swizzle's pattern does: this is more than hardware asks, which takes any
// multiple of 128, but then a reader would have to know the offset in the pattern.
void check_box_memory(uint32_t address, const TensorMapFields& map, const char* what) {
  const int64_t alignment = map.swizzle == 0 ? 128 : 128 * map.swizzle_units();
  shared_at(address, map.shared_bytes(), what, alignment);
}

void write_outside(const TensorMapFields& map, unsigned char* to, int64_t elements) {
  std::memset(to, 0, static_cast<size_t>(elements * map.element_bytes));
  if (!map.fill_nan) return;
  // Any NaN: which one hardware writes is not said.
  for (int64_t i = 0; i < elements; ++i) {
    unsigned char* const at = to + i * map.element_bytes;
    std::memset(at, 0xff, map.element_bytes);
    at[map.element_bytes - 1] = 0x7f;
  }
}

// `count` elements that lie side by side in the tensor, from coordinate at[0] on, those of them
// that exist; `exists`: whether the other coordinates do.
void read_row(const TensorMapFields& map, const int64_t* at, int count, bool exists,
              unsigned char* to, const char* what) {
  write_outside(map, to, count);
  const int64_t begin = std::max<int64_t>(at[0], 0), end = std::min(at[0] + count, map.size(0));
  if (!exists || begin >= end) return;
  const unsigned char* from = map.base + begin * map.element_bytes;
  for (int i = 1; i < map.rank; ++i) {
    from += at[i] * static_cast<int64_t>(map.strides[i]);
  }
  unsigned char* const inside = to + (begin - at[0]) * map.element_bytes;
  const int64_t bytes = (end - begin) * map.element_bytes;
  check_global(from, bytes, what);
  std::memcpy(inside, from, static_cast<size_t>(bytes));
  if (map.data_type != CU_TENSOR_MAP_DATA_TYPE_TFLOAT32) return;
  for (int64_t i = 0; i < end - begin; ++i) {
    float x;
    std::memcpy(&x, inside + 4 * i, 4);
    const uint32_t rounded = round_to_tf32(x);
    std::memcpy(inside + 4 * i, &rounded, 4);
  }
}

// Calls visit(coordinates, whether all but the innermost exist) for each row of a tiled box.
template <class Visit>
void for_each_row(const TensorMapFields& map, const int* at, Visit&& visit) {
  int index[kMostDimensions] = {};
  for (;;) {
    int64_t where[kMostDimensions] = {at[0]};
    bool exists = true;
    for (int i = 1; i < map.rank; ++i) {
      where[i] = int64_t{at[i]} + int64_t{index[i]} * map.steps[i];
      exists = exists && where[i] >= 0 && where[i] < map.size(i);
    }
    visit(where, exists);
    int i = 1;
    for (; i < map.rank && ++index[i] == map.loaded(i); ++i) index[i] = 0;
    if (i >= map.rank) return;
  }
}

std::vector<unsigned char> tiled_box(const TensorMapFields& map, const int* at, const char* what) {
  std::vector<unsigned char> box(static_cast<size_t>(map.shared_bytes()));
  unsigned char* to = box.data();
  for_each_row(map, at, [&](const int64_t* where, bool exists) {
    read_row(map, where, map.box[0], exists, to, what);
    to += map.box[0] * map.element_bytes;
  });
  return box;
}

// Pixels from (w, h, n) on, along W, then H, then N, each dimension in its steps and inside the
// bounding box lower .. size - 1 + upper; each read at the distance of `offsets`.
std::vector<unsigned char> im2col_box(const TensorMapFields& map, const int* at,
                                      const uint16_t* offsets, const char* what) {
  std::vector<unsigned char> box(static_cast<size_t>(map.shared_bytes()));
  unsigned char* to = box.data();
  int64_t pixel[3] = {at[1], at[2], at[3]};
  for (int i = 0; i < map.box[1]; ++i) {
    const int64_t where[4] = {at[0], pixel[0] + offsets[0], pixel[1] + offsets[1], pixel[2]};
    bool exists = true;
    for (int d = 1; d < 4; ++d) exists = exists && where[d] >= 0 && where[d] < map.size(d);
    read_row(map, where, map.box[0], exists, to, what);
    to += map.box[0] * map.element_bytes;
    for (int d = 0; d < 3; ++d) {
      pixel[d] += map.steps[d + 1];
      if (d == 2 || pixel[d] <= map.size(d + 1) - 1 + map.upper[d]) break;
      pixel[d] = map.lower[d];
    }
  }
  return box;
}

// The pattern works on the whole address: rows of a box need not be as long as it is wide.
void write_box(uint32_t address, const std::vector<unsigned char>& box, int units,
               const char* what) {
  Block& owner = shared_owner(address, what);
  for (size_t i = 0; i < box.size(); i += kUnit) {
    const uint32_t unit = swizzled(address + static_cast<uint32_t>(i), units);
    async_write(owner, shared_at(unit, kUnit, what), box.data() + i, kUnit);
  }
}

// Where a load goes: which blocks, checked and poisoned.
struct Destination {
  uint32_t to, barrier;
};
std::vector<Destination> destinations(uint32_t to, uint32_t barrier, int blocks, int64_t bytes,
                                      const char* what) {
  std::vector<Destination> all;
  if (blocks < 0) {
    all.push_back({to, barrier});
  } else {
    if (blocks == 0 || blocks >> cluster_size() != 0) {
      fail(std::string(what) + ": a mask of " + std::to_string(blocks) + " for a cluster of " +
           std::to_string(cluster_size()) + " blocks");
    }
    for (uint32_t rank = 0; rank < cluster_size(); ++rank) {
      if (blocks >> rank & 1) all.push_back({mapa(to, rank), mapa(barrier, rank)});
    }
  }
  const std::vector<unsigned char> poison(static_cast<size_t>(bytes), 0xff);
  for (const Destination& d : all) {
    check_reachable(d.to, what);
    Block& owner = shared_owner(d.to, what);
    if (&owner != &shared_owner(d.barrier, what)) {
      fail(std::string(what) + ": the mbarrier is not in the destination's block");
    }
    mbarrier_check_for_copy(d.barrier, what);
    async_write(owner, shared_at(d.to, bytes, what), poison.data(), bytes);
  }
  return all;
}

// `read`: what the box holds, as far as it is known when the load completes.
template <class Read>
void start_load(const char* what, const TensorMapFields& map, uint32_t to, uint32_t barrier,
                int blocks, Read read) {
  check_box_memory(to, map, what);
  const int64_t bytes = map.shared_bytes();
  for (const Destination& d : destinations(to, barrier, blocks, bytes, what)) {
    start_async(nullptr, what, [what, d, bytes, units = map.swizzle_units(), read] {
      check_not_ended(d.to, what);
      write_box(d.to, read(), units, what);
      mbarrier_complete_tx(d.barrier, bytes, what);
    });
  }
}

void load_tiled(const char* what, uint32_t to, const CUtensorMap* map, uint32_t barrier, int blocks,
                int rank, const int* at) {
  const TensorMapFields fields = fields_of(map, what);
  check_kind(fields, false, rank, what);
  const std::vector<int> position(at, at + rank);
  start_load(what, fields, to, barrier, blocks,
             [what, fields, position] { return tiled_box(fields, position.data(), what); });
}

void load_im2col(const char* what, uint32_t to, const CUtensorMap* map, uint32_t barrier,
                 int blocks, const int* at, const uint16_t* offsets) {
  const TensorMapFields fields = fields_of(map, what);
  check_kind(fields, true, 4, what);
  if (offsets[0] > 255 || offsets[1] > 255) {
    fail(std::string(what) + ": offsets of " + std::to_string(offsets[0]) + " and " +
         std::to_string(offsets[1]) + ", beyond 255");
  }
  for (int d = 0; d < 2; ++d) {
    if (at[d + 1] < fields.lower[d] || at[d + 1] > fields.size(d + 1) - 1 + fields.upper[d]) {
      fail(std::string(what) + ": a start of " + std::to_string(at[d + 1]) + " along " +
           (d == 0 ? "W" : "H") + ", outside the bounding box");
    }
  }
  const std::vector<int> position(at, at + 4);
  const std::vector<uint16_t> tap(offsets, offsets + 2);
  start_load(what, fields, to, barrier, blocks, [what, fields, position, tap] {
    return im2col_box(fields, position.data(), tap.data(), what);
  });
}

// ---- stores ----

struct Store {
  TensorMapFields map;
  uint32_t from;
  int at[kMostDimensions];
  std::vector<unsigned char> box;  // as it was at issue
};
struct ThreadStores {
  std::vector<Store> open;
  int64_t committed = 0;          // groups; empty ones take no work
  std::deque<int64_t> under_way;  // of which groups, by number from 1 on
};
using Stores = std::map<int, ThreadStores>;  // by thread
ThreadStores& my_stores() { return current_block().extra<Stores>("bulk")[current().index]; }

constexpr const char* kStore = "cp.async.bulk.tensor (store)";

std::vector<unsigned char> read_box(const TensorMapFields& map, uint32_t from) {
  const Block& owner = shared_owner(from, kStore);
  std::vector<unsigned char> box(static_cast<size_t>(map.shared_bytes()));
  for (size_t i = 0; i < box.size(); i += kUnit) {
    const uint32_t unit = swizzled(from + static_cast<uint32_t>(i), map.swizzle_units());
    async_read(owner, shared_at(unit, kUnit, kStore), box.data() + i, kUnit);
  }
  return box;
}

void carry_out(const Store& store) {
  const TensorMapFields& map = store.map;
  if (read_box(map, store.from) != store.box) {
    fail(std::string(kStore) + ": shared memory changed before the store had read it");
  }
  const unsigned char* from = store.box.data();
  for_each_row(map, store.at, [&](const int64_t* where, bool exists) {
    const int64_t begin = std::max<int64_t>(where[0], 0);
    const int64_t end = std::min(where[0] + map.box[0], map.size(0));
    if (exists && begin < end) {
      unsigned char* to = map.base + begin * map.element_bytes;
      for (int i = 1; i < map.rank; ++i) to += where[i] * static_cast<int64_t>(map.strides[i]);
      const int64_t bytes = (end - begin) * map.element_bytes;
      check_global(to, bytes, kStore);
      std::memcpy(to, from + (begin - where[0]) * map.element_bytes, static_cast<size_t>(bytes));
    }
    from += map.box[0] * map.element_bytes;
  });
}

}  // namespace

void tma_prefetch_map(const CUtensorMap* map) { fields_of(map, "prefetch.tensormap"); }

void tma_load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int rank, const int* at) {
  load_tiled("cp.async.bulk.tensor", to, map, barrier, -1, rank, at);
}
void tma_load_multicast(uint32_t to, const CUtensorMap* map, uint32_t barrier, uint16_t blocks,
                        int rank, const int* at) {
  load_tiled("cp.async.bulk.tensor.multicast", to, map, barrier, blocks, rank, at);
}
void tma_load_im2col(uint32_t to, const CUtensorMap* map, uint32_t barrier, const int* at,
                     const uint16_t* offsets) {
  load_im2col("cp.async.bulk.tensor.im2col", to, map, barrier, -1, at, offsets);
}
void tma_load_im2col_multicast(uint32_t to, const CUtensorMap* map, uint32_t barrier,
                               uint16_t blocks, const int* at, const uint16_t* offsets) {
  load_im2col("cp.async.bulk.tensor.im2col.multicast", to, map, barrier, blocks, at, offsets);
}

void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  const char* const what = "cp.async.bulk";
  if (bytes == 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    fail(std::string(what) + ": " + std::to_string(bytes) +
         " bytes; they and both addresses are multiples of 16");
  }
  shared_at(to, bytes, what, 16);
  check_global(from, bytes, what);
  for (const Destination& d : destinations(to, barrier, -1, bytes, what)) {
    start_async(nullptr, what, [what, d, from, bytes] {
      check_not_ended(d.to, what);
      check_global(from, bytes, what);
      async_write(shared_owner(d.to, what), shared_at(d.to, bytes, what), from, bytes);
      mbarrier_complete_tx(d.barrier, bytes, what);
    });
  }
}

void tma_store(const CUtensorMap* map, uint32_t from, int rank, const int* at) {
  Store store = {fields_of(map, kStore), from, {}, {}};
  check_kind(store.map, false, rank, kStore);
  check_box_memory(from, store.map, kStore);
  if (&shared_owner(from, kStore) != &current_block()) {
    fail(std::string(kStore) + ": the source lies in another block");
  }
  std::memcpy(store.at, at, static_cast<size_t>(rank) * sizeof(int));
  store.box = read_box(store.map, from);
  my_stores().open.push_back(std::move(store));
}

void tma_store_commit() {
  ThreadStores& stores = my_stores();
  ++stores.committed;
  if (stores.open.empty()) return;
  stores.under_way.push_back(stores.committed);
  start_async(&stores, "a group of TMA stores", [&stores, group = std::move(stores.open)] {
    for (const Store& store : group) carry_out(store);
    stores.under_way.pop_front();
    notify(&stores);
  });
  stores.open = {};
}

void tma_store_wait(int pending) {
  ThreadStores& stores = my_stores();
  while (!stores.under_way.empty() && stores.under_way.front() <= stores.committed - pending) {
    wait_on(&stores, "cp.async.bulk.wait_group " + std::to_string(pending));
  }
}

}  // namespace emulator
}  // namespace fastconv
