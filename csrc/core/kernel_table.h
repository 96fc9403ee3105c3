// What a row of the kernel table is. A new kernel is one file and one row: tests, benchmarks,
// fastconv.kernels() and fastconv.explain() loop over the table and pick it up.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/batch_norm_problem.h"
#include "core/conv2d_problem.h"
#include "core/dtype.h"
#include "core/pool2d_problem.h"

namespace fastconv {

enum class Backend : uint8_t { kCuda, kTriton, kCpu, kEmulator, kAten };
constexpr const char* name_of(Backend b) {
  return b == Backend::kCuda       ? "cuda"
         : b == Backend::kTriton   ? "triton"
         : b == Backend::kCpu      ? "cpu"
         : b == Backend::kEmulator ? "emulator"
                                   : "aten";
}

// Instruction sets of a CPU, in rising order: each includes the ones before it.
enum class CpuIsa : uint8_t { kPortable, kAvx2, kAvx512 };

// What the choice knows of the machine. Filled from the device once; tests make their own.
struct Device {
  enum class Type : uint8_t { kCpu, kCuda } type = Type::kCpu;
  int threads = 1;                      // CPU: how many a launch may use
  CpuIsa isa = CpuIsa::kPortable;       // CPU
  int sm_arch = 0;                      // GPU: 80, 90, ...
  int sm_count = 0;                     // GPU
  int64_t shared_memory_per_block = 0;  // GPU: bytes, opt-in maximum
  std::string unsupported;          // GPU: why no CUDA row of this build runs on it; empty: they do
  const char* no_triton = nullptr;  // why no Triton row runs on it; null: they do
};

// How a launch runs: on a CPU, which threads; on a GPU, which one and which stream.
struct Context {
  using RangeBody = std::function<void(int64_t begin, int64_t end)>;
  int threads = 1;
  // Splits [0, n) into at most `threads` contiguous ranges and runs body on each; returns when all
  // are done and rethrows what a body threw. Ranges depend on n and `threads` alone.
  std::function<void(int64_t n, const RangeBody& body)> parallel_for;
  void* stream = nullptr;  // a cudaStream_t
  int device = -1;         // the GPU's index; -1: a CPU
};

template <class ProblemT, class ArgsT>
struct Kernel {
  using Problem = ProblemT;
  using Args = ArgsT;

  std::string name;  // unique in the whole table: operation_algorithm_isa_direction
  std::string op;    // "conv2d", "max_pool2d", ...
  Direction direction;
  Backend backend;
  std::string arch;  // least it runs on: "portable", "avx2", "avx512", "sm_80", "sm_90a"
  DTypeSet dtypes;
  LayoutSet layouts;
  bool aligned = false;  // it reads 16 bytes at a time: the caller copies what begins off them
  // Empty: it can. Otherwise one clause a user can read, with the value that stands in the way.
  // Dtype, layout and machine are checked before by the table's own columns.
  std::function<std::string(const Problem&, const Device&)> supports;
  // Expected microseconds; only the order between rows matters.
  std::function<double(const Problem&, const Device&)> cost;
  std::function<size_t(const Problem&, const Device&)> workspace;  // bytes; empty function: none
  std::function<void(const Problem&, const Args&, const Context&)> launch;
  // Bytes of a filter packed ahead; empty function: it packs none.
  std::function<size_t(const Problem&, const Device&)> packed_bytes;
  // args.filter into args.out, as `launch` reads args.packed.
  std::function<void(const Problem&, const Args&, const Context&)> pack;
};

using Conv2dKernel = Kernel<Conv2dProblem, Conv2dArgs>;
using Pool2dKernel = Kernel<Pool2dProblem, Pool2dArgs>;
using BatchNormKernel = Kernel<BatchNormProblem, BatchNormArgs>;

// Ordered: where two rows cost the same the earlier one wins, and the last of a direction is its
// slow, general reference.
struct KernelTable {
  std::vector<Conv2dKernel> conv2d;
  std::vector<Pool2dKernel> pool2d;
  std::vector<BatchNormKernel> batch_norm;
};

// Each backend appends its rows (csrc/cpu/table.cpp, csrc/cuda/table.cpp, csrc/triton/table.cpp).
void add_cpu_kernels(KernelTable& table);
void add_cuda_kernels(KernelTable& table);
void add_triton_kernels(KernelTable& table);

// The one table, built on first use.
const KernelTable& kernel_table();
// Publishes a copy with more rows, once for each `add`. Tables are never freed: rows that somebody
// has chosen stay.
void extend_kernel_table(void (*add)(KernelTable&));

}  // namespace fastconv
