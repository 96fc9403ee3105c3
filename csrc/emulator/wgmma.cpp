// wgmma: a warpgroup's asynchronous products. At issue the accumulators are put aside and the
// registers poisoned; shared memory is read then and again when the work completes, and must not
// have changed; the registers get their values when nothing under way writes them any more. Groups
// are counted by warp, as the instructions that commit and wait are a warp's: waiting does not
// bring the warps of a warpgroup together.
#include "emulator/wgmma.h"

#include <algorithm>
#include <cstring>
#include <map>

#include "emulator/scheduler.h"
#include "emulator/tensor_map.h"

namespace fastconv {
namespace emulator {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = 4;
constexpr int kRows = 64;
constexpr uint32_t kPoison = 0xffbfffffu;  // a signalling NaN: arithmetic on it makes another one
constexpr const char* kWhat = "wgmma.mma_async";

int row_of(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + 8 * (i / 2 % 2); }
int column_of(int thread, int i) { return 8 * (i / 4) + 2 * (thread % 4) + i % 2; }

// Registers of D while products are under way.
struct Accumulators {
  int n = 0;
  float* registers[kThreads];
  std::vector<float> values;  // [64 x n]
  int under_way = 0;
  std::vector<float> returned;  // what the registers were given last

  template <class Visit>
  void each(Visit&& visit) {
    for (int thread = 0; thread < kThreads; ++thread) {
      for (int i = 0; i < n / 2; ++i) {
        visit(registers[thread][i],
              static_cast<size_t>(row_of(thread, i) * n + column_of(thread, i)));
      }
    }
  }
};

struct Product {
  WgmmaShape shape;
  uint64_t a_matrix = 0, b_matrix = 0;
  bool accumulate = false;
  bool a_in_registers = false;
  std::vector<float> a, b;  // [64 x k], [k x n], as they were at issue
  Accumulators* to = nullptr;
  int commits = 0;  // warps that have
  bool done = false;
};
using Group = std::vector<std::shared_ptr<Product>>;

struct Warpgroup {
  bool fenced[kWarps] = {};  // since the registers may have been used
  Group open[kWarps];
  std::deque<Group> committed[kWarps];
  std::map<const float*, Accumulators> accumulators;  // by thread 0's registers
};
using Warpgroups = std::map<int, Warpgroup>;

Warpgroup& mine() {
  const Thread& me = current();
  if ((me.index / kThreads + 1) * kThreads > static_cast<int>(me.block->threads.size())) {
    fail("wgmma: the block ends within this warpgroup");
  }
  return me.block->extra<Warpgroups>("wgmma")[me.index / kThreads];
}
int warp_in_group() { return current().warp() % kWarps; }

int k_of(MmaType type) { return type == MmaType::kTf32 ? 8 : 16; }

// One 16-byte unit of a matrix in shared memory.
struct Matrix {
  uint32_t start, leading, stride;
  int units;  // of a swizzled row, 1 without swizzle
  bool mn_major;

  Matrix(uint64_t bits, bool mn_major_) : mn_major(mn_major_) {
    const auto field = [bits](int shift) {
      return static_cast<uint32_t>(bits >> shift & 0x3fffu) << 4;
    };
    start = field(0);
    leading = field(16);
    stride = field(32);
    const int mode = static_cast<int>(bits >> 62);  // 0 none, 1 128, 2 64, 3 32 bytes
    units = mode == 0 ? 1 : 16 >> mode;
    if ((bits >> 49 & 7u) != 0) fail(std::string(kWhat) + ": a base offset, which is not emulated");
    if (units > 1 && (start >> 7 & static_cast<uint32_t>(units - 1)) != 0) {
      fail(std::string(kWhat) + ": a matrix at shared+" + std::to_string(start) +
           ", inside its swizzle's pattern of " + std::to_string(128 * units) +
           " bytes, needs a base offset");
    }
  }

  // K-major: unit `unit` (along K) of row `line`. MN-major: unit `unit` (along M or N) of `line`.
  uint32_t address(int line, int unit) const {
    const uint32_t l = static_cast<uint32_t>(line), u = static_cast<uint32_t>(unit);
    const uint32_t width = static_cast<uint32_t>(units);
    const uint32_t inside = l % 8 * width * 16;
    if (units == 1) {
      return start + inside +
             (mn_major ? u * stride + l / 8 * leading : l / 8 * stride + u * leading);
    }
    const uint32_t at = mn_major ? u / width * leading + u % width * 16 + inside + l / 8 * stride
                                 : l / 8 * stride + inside + u * 16;
    return swizzled(start + at, units);
  }
};

// Calls put(index along M or N, index along K, value) for every element.
template <class Put>
void read_matrix(const Block& block, const Matrix& matrix, MmaType type, int extent, Put&& put) {
  const int k = k_of(type), in_unit = type == MmaType::kTf32 ? 4 : 8;
  const int lines = matrix.mn_major ? k : extent;
  const int units = (matrix.mn_major ? extent : k) / in_unit;
  const uint32_t rank = static_cast<uint32_t>(block.rank) << kRankShift;
  for (int line = 0; line < lines; ++line) {
    for (int unit = 0; unit < units; ++unit) {
      uint32_t bits[4];
      const uint32_t address = matrix.address(line, unit);
      async_read(block, shared_at(rank | address, 16, kWhat), bits, 16);
      for (int i = 0; i < in_unit; ++i) {
        const float value = element_of(type, bits, i);
        if (matrix.mn_major) {
          put(unit * in_unit + i, line, value);
        } else {
          put(line, unit * in_unit + i, value);
        }
      }
    }
  }
}

bool is_poison(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits == kPoison;
}

void check_untouched(Accumulators& d) {
  d.each([](float& x, size_t) {
    if (!is_poison(x)) fail(std::string(kWhat) + ": D's registers were written while under way");
  });
}

// Registers that are not under way: their values, and whether a fence was needed.
void take(Accumulators& d, bool fenced) {
  d.values.resize(static_cast<size_t>(kRows * d.n));
  d.each([&](float& x, size_t at) { d.values[at] = x; });
  const bool as_returned =
      d.returned.size() == d.values.size() &&
      std::memcmp(d.returned.data(), d.values.data(), d.values.size() * sizeof(float)) == 0;
  if (!as_returned && !fenced) {
    fail(std::string(kWhat) + ": D's registers were written and no wgmma_fence() came after");
  }
  d.each([](float& x, size_t) { std::memcpy(&x, &kPoison, 4); });
}

std::vector<float> read_a(const Block& block, const Product& product) {
  const int k = k_of(product.shape.type);
  std::vector<float> a(static_cast<size_t>(kRows * k));
  read_matrix(block, Matrix(product.a_matrix, product.shape.mn_major_a), product.shape.type, kRows,
              [&](int row, int column, float x) { a[static_cast<size_t>(row * k + column)] = x; });
  return a;
}
std::vector<float> read_b(const Block& block, const Product& product) {
  const int k = k_of(product.shape.type), n = product.shape.n;
  std::vector<float> b(static_cast<size_t>(k * n));
  read_matrix(block, Matrix(product.b_matrix, product.shape.mn_major_b), product.shape.type, n,
              [&](int column, int row, float x) { b[static_cast<size_t>(row * n + column)] = x; });
  return b;
}

void check_unchanged(const std::vector<float>& before, const std::vector<float>& after,
                     const char* which) {
  if (std::memcmp(before.data(), after.data(), before.size() * sizeof(float)) != 0) {
    fail(std::string(kWhat) + ": " + which +
         "'s shared memory changed while the product was under way");
  }
}

void carry_out(const Block& block, int group, Product& product) {
  const int k = k_of(product.shape.type), n = product.shape.n;
  Accumulators& d = *product.to;
  if (!product.a_in_registers) check_unchanged(product.a, read_a(block, product), "A");
  check_unchanged(product.b, read_b(block, product), "B");
  if (!product.accumulate) std::fill(d.values.begin(), d.values.end(), 0.0f);
  multiply_add(kRows, n, k, product.a.data(), product.b.data(), d.values.data());
  product.done = true;
  if (--d.under_way > 0) return;
  for (int thread = 0; thread < kThreads; ++thread) {
    const Thread& owner = block.threads[static_cast<size_t>(group * kThreads + thread)];
    if (owner.done) {
      fail(std::string(kWhat) + ": thread " + std::to_string(owner.index) +
           " ended before the products into its registers");
    }
  }
  check_untouched(d);
  d.each([&](float& x, size_t at) { x = d.values[at]; });
  d.returned = std::move(d.values);
}

struct Operands {
  WgmmaShape shape;
  float* d;
  const uint32_t* a_registers;
  uint64_t a_matrix, b_matrix;
  bool accumulate;
};

void check_alike(Operands** all) {
  const Operands& first = *all[0];
  for (int i = 1; i < kThreads; ++i) {
    const Operands& o = *all[i];
    if (o.shape.type != first.shape.type || o.shape.n != first.shape.n ||
        o.a_matrix != first.a_matrix || o.b_matrix != first.b_matrix ||
        o.accumulate != first.accumulate ||
        (o.a_registers == nullptr) != (first.a_registers == nullptr)) {
      fail(std::string(kWhat) +
           ": the threads of a warpgroup differ in instruction, descriptors "
           "or scale-d");
    }
  }
}

// A's fragments as a matrix: a warp's 16 rows as mma.sync has them.
std::vector<float> from_registers(Operands** all, MmaType type) {
  const int k = k_of(type), pair = type == MmaType::kTf32 ? 1 : 2;
  std::vector<float> a(static_cast<size_t>(kRows * k));
  for (int thread = 0; thread < kThreads; ++thread) {
    for (int i = 0; i < 4 * pair; ++i) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + 8 * (i / pair % 2);
      const int column = pair * (thread % 4) + i % pair + 4 * pair * (i / (2 * pair));
      a[static_cast<size_t>(row * k + column)] = element_of(type, all[thread]->a_registers, i);
    }
  }
  return a;
}

void issue(Operands operands) {
  Warpgroup& group = mine();
  meet_warpgroup(kWhat, operands, [&group](Operands** all) {
    check_alike(all);
    const Operands& first = *all[0];
    auto product = std::make_shared<Product>();
    product->shape = first.shape;
    product->a_matrix = first.a_matrix;
    product->b_matrix = first.b_matrix;
    product->accumulate = first.accumulate;
    product->a_in_registers = first.a_registers != nullptr;
    product->a = product->a_in_registers ? from_registers(all, first.shape.type)
                                         : read_a(current_block(), *product);
    product->b = read_b(current_block(), *product);
    bool fenced = true;
    for (const bool of_warp : group.fenced) fenced = fenced && of_warp;
    Accumulators& d = group.accumulators[first.d];
    if (d.under_way > 0) {
      if (d.n != first.shape.n) fail(std::string(kWhat) + ": D is under way in another shape");
      check_untouched(d);
    } else {
      d.n = first.shape.n;
      for (int i = 0; i < kThreads; ++i) d.registers[i] = all[i]->d;
      take(d, fenced);
    }
    ++d.under_way;
    product->to = &d;
    for (Group& open : group.open) open.push_back(product);
  });
}

}  // namespace

void wgmma_fence() {
  Warpgroup& group = mine();
  char nothing = 0;
  meet_full_warp("wgmma.fence", nothing, [](char**) {});
  group.fenced[warp_in_group()] = true;
}

void wgmma(const WgmmaShape& shape, float* d, uint64_t a_matrix, uint64_t b_matrix,
           bool accumulate) {
  issue({shape, d, nullptr, a_matrix, b_matrix, accumulate});
}
void wgmma(const WgmmaShape& shape, float* d, const uint32_t* a, uint64_t b_matrix,
           bool accumulate) {
  issue({shape, d, a, 0, b_matrix, accumulate});
}

void wgmma_commit() {
  Warpgroup& group = mine();
  const int warp = warp_in_group(), number = current().index / kThreads;
  const Block& block = current_block();
  char nothing = 0;
  meet_full_warp("wgmma.commit_group", nothing, [&](char**) {
    for (const std::shared_ptr<Product>& product : group.open[warp]) {
      if (++product->commits < kWarps) continue;
      start_async(&group, kWhat, [&block, &group, number, product] {
        carry_out(block, number, *product);
        notify(&group);
      });
    }
    group.committed[warp].push_back(std::move(group.open[warp]));
    group.open[warp] = {};
  });
}

void wgmma_wait(int pending) {
  Warpgroup& group = mine();
  const int warp = warp_in_group();
  char nothing = 0;
  meet_full_warp("wgmma.wait_group", nothing, [](char**) {});
  std::deque<Group>& committed = group.committed[warp];
  for (;;) {
    const auto done = [](const std::shared_ptr<Product>& product) { return product->done; };
    while (!committed.empty() &&
           std::all_of(committed.front().begin(), committed.front().end(), done)) {
      committed.pop_front();
    }
    if (static_cast<int>(committed.size()) <= pending) break;
    wait_on(&group, "wgmma.wait_group " + std::to_string(pending));
  }
  group.fenced[warp] = false;
}

}  // namespace emulator
}  // namespace fastconv
