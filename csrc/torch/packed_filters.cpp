#include "torch/packed_filters.h"

#include <ATen/ops/empty.h>
#include <c10/util/hash.h>

#include <cstring>
#include <mutex>
#include <tuple>
#include <unordered_map>

#include "torch/arguments.h"
#include "torch/launch.h"

namespace fastconv {
namespace {

// Which packed form: of which memory, read as which filter, by which row.
struct Key {
  const void* data;
  const Conv2dKernel* row;
  uint64_t packing;
  int64_t K, C, R, S, G;
  DType dtype;
  Layout layout;

  auto fields() const { return std::tie(data, row, packing, K, C, R, S, G, dtype, layout); }
  bool operator==(const Key& other) const { return fields() == other.fields(); }
};
struct KeyHash {
  size_t operator()(const Key& k) const {
    return c10::get_hash(k.data, static_cast<const void*>(k.row), k.packing, k.K, k.C, k.R, k.S);
  }
};

struct Entry {
  c10::weak_intrusive_ptr<c10::StorageImpl> owner;  // other memory at the same address is no match
  uint32_t version;
  uint64_t samples;
  at::Tensor packed;
};

struct Cache {
  std::mutex mutex;
  std::unordered_map<Key, Entry, KeyHash> entries;
};
Cache& cache() {
  static Cache* const instance = new Cache;  // tensors must not outlive torch's own statics
  return *instance;
}

// A hash of 32 elements, evenly spread. Writes through `.data` or NumPy leave the version as it is;
// those that rescale, average or initialise a filter show here.
uint64_t samples_of(const at::Tensor& weight) {
  constexpr int64_t kSamples = 32;
  const auto size = static_cast<int64_t>(weight.element_size());
  const int64_t n = weight.numel();
  const char* data = static_cast<const char*>(weight.const_data_ptr());
  uint64_t hash = 0;
  for (int64_t i = 0; i < kSamples; ++i) {
    uint64_t bits = 0;
    std::memcpy(&bits, data + (n - 1) * i / (kSamples - 1) * size, static_cast<size_t>(size));
    hash = (hash ^ bits) * 0x9E3779B97F4A7C15u;
  }
  return hash;
}

Key key_of(const Conv2dKernel& row, const Conv2dProblem& p, const at::Tensor& weight,
           const Device& machine) {
  const uint64_t packing = row.packing ? row.packing(p, machine) : 0;
  return {weight.const_data_ptr(), &row, packing, p.K, p.C, p.R, p.S, p.G, p.dtype,
          p.filter_layout};
}

void forget_dead(std::unordered_map<Key, Entry, KeyHash>& entries) {
  for (auto at = entries.begin(); at != entries.end();) {
    at = at->second.owner.expired() ? entries.erase(at) : std::next(at);
  }
}

}  // namespace

at::Tensor kept_filter(const Conv2dKernel& row, const Conv2dProblem& p, const at::Tensor& weight,
                       const at::Tensor& like) {
  const bool filter_channels_last = p.filter_layout == Layout::kNHWC;
  const bool dense = weight.is_contiguous(memory_format(filter_channels_last));
  if (!row.pack || !weight.is_cpu() || weight.is_inference() || !dense) return {};
  const Device machine = machine_of(like);
  const size_t bytes = row.packed_bytes(p, machine);
  if (bytes == 0) return {};

  const Key key = key_of(row, p, weight, machine);
  const c10::intrusive_ptr<c10::StorageImpl> owner = weight.storage().getWeakStorageImpl().lock();
  const uint32_t version = weight._version();
  const uint64_t samples = samples_of(weight);
  {
    const std::lock_guard<std::mutex> lock(cache().mutex);
    const auto found = cache().entries.find(key);
    if (found != cache().entries.end()) {
      const Entry& e = found->second;
      const bool same = e.owner.lock() == owner;
      if (same && e.version == version && e.samples == samples) return e.packed;
    }
  }
  const auto options = like.options().dtype(at::kByte);
  const at::Tensor packed = at::empty({static_cast<int64_t>(bytes)}, options);
  Conv2dArgs args;
  args.filter = weight.const_data_ptr();
  args.out = packed.mutable_data_ptr();
  row.pack(p, args, context_of(like, machine));
  const std::lock_guard<std::mutex> lock(cache().mutex);
  forget_dead(cache().entries);
  cache().entries.insert_or_assign(
      key, Entry{weight.storage().getWeakStorageImpl(), version, samples, packed});
  return packed;
}

KeptFilters kept_filters() {
  const std::lock_guard<std::mutex> lock(cache().mutex);
  forget_dead(cache().entries);
  KeptFilters kept = {0, 0};
  for (const auto& [key, entry] : cache().entries) {
    ++kept.count;
    kept.bytes += entry.packed.numel();
  }
  return kept;
}

void forget_filters() {
  const std::lock_guard<std::mutex> lock(cache().mutex);
  cache().entries.clear();
}

}  // namespace fastconv
