// What a program that loads the emulator as a library calls: fastconv's extension for the rows,
// fastconv/emulator.py through ctypes for the rest.
#include <cstring>
#include <utility>

#include "core/kernel_table.h"
#include "emulator/launch.h"
#include "emulator/mma.h"

namespace fastconv {
namespace {

Device emulated_device() {
  Device device;
  device.type = Device::Type::kCuda;
  device.sm_arch = emulator::kSmArch;
  device.sm_count = emulator::sm_count();
  device.shared_memory_per_block = emulator::kSharedMemoryPerBlock;
  return device;
}

// A CUDA row as a row on CPU tensors: the same decisions as on the emulated GPU.
template <class K>
void append_emulated(std::vector<K>& to, std::vector<K> rows) {
  for (K& row : rows) {
    row.name += "_emulated";
    row.backend = Backend::kEmulator;
    const auto on_device = [](auto function) {
      using Result = decltype(function(std::declval<typename K::Problem>(), Device()));
      return std::function<Result(const typename K::Problem&, const Device&)>(
          [function](const typename K::Problem& problem, const Device&) {
            return function(problem, emulated_device());
          });
    };
    if (row.supports) row.supports = on_device(row.supports);
    if (row.cost) row.cost = on_device(row.cost);
    if (row.workspace) row.workspace = on_device(row.workspace);
    to.push_back(std::move(row));
  }
}

void append_all(KernelTable& table) {
  KernelTable cuda;
  add_cuda_kernels(cuda);
  append_emulated(table.conv2d, std::move(cuda.conv2d));
  append_emulated(table.pool2d, std::move(cuda.pool2d));
  append_emulated(table.batch_norm, std::move(cuda.batch_norm));
}

}  // namespace
}  // namespace fastconv

#define FASTCONV_EXPORT extern "C" __attribute__((visibility("default")))

FASTCONV_EXPORT void fastconv_emulator_add_kernels(fastconv::KernelTable& table) {
  fastconv::append_all(table);
}

FASTCONV_EXPORT void fastconv_emulator_set_seed(uint64_t seed) {
  fastconv::emulator::set_seed(seed);
}

FASTCONV_EXPORT uint64_t fastconv_emulator_seed() { return fastconv::emulator::seed(); }

FASTCONV_EXPORT bool fastconv_emulator_set_truncation(bool on) {
  return fastconv::emulator::set_truncation(on);
}

FASTCONV_EXPORT void fastconv_emulator_set_sm_count(int count) {
  fastconv::emulator::set_sm_count(count);
}

FASTCONV_EXPORT int fastconv_emulator_sm_count() { return fastconv::emulator::sm_count(); }

FASTCONV_EXPORT void fastconv_emulator_start_log() { fastconv::emulator::start_log(); }

// Calls `row` for each launch since start_log(), and stops logging.
FASTCONV_EXPORT void fastconv_emulator_stop_log(void (*row)(const char* name, int64_t blocks,
                                                            int threads, int64_t shared_bytes,
                                                            int cluster)) {
  for (const auto& entry : fastconv::emulator::stop_log()) {
    row(entry.name.c_str(), entry.blocks, entry.threads, entry.shared_bytes, entry.cluster);
  }
}
