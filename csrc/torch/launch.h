// Between torch's tensors and the kernel table: which device, which row, run it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "core/choose.h"
#include "torch/selection.h"

namespace fastconv {

// The machine behind a tensor, and how a launch on it runs: its threads or its stream (cpu.cpp,
// cuda.cpp).
Device machine_of(const at::Tensor& t);
Context context_of(const at::Tensor& t, const Device& machine);

// Starting and joining a team of threads costs 5 to 20 us, more on a busy machine: work that one
// thread is expected to finish within this many microseconds stays on it.
constexpr double kWorthThreads = 30;

template <class K>
Device machine_for(const K& row, const typename K::Problem& problem, const at::Tensor& like) {
  Device machine = machine_of(like);
  if (machine.type == Device::Type::kCpu && machine.threads > 1) {
    Device alone = machine;
    alone.threads = 1;
    if (row.cost(problem, alone) < kWorthThreads) return alone;
  }
  return machine;
}

// Raises where ATen may not stand in: a backend or this kernel is forced, or fallback is forbidden.
// `why` says what no own kernel does here.
void require_fallback_allowed(const std::string& what, const std::string& why, bool kernel_forced);
// For inputs that no kernel of ours takes: complex numbers, integers, quantised tensors, ....
void require_fallback_allowed(const std::string& op, const at::Tensor& input);

std::string describe(const std::vector<Candidate>& candidates);
// Why no row runs: what stands against the whole machine, else what stands against each row.
inline std::string why_none(const std::vector<Candidate>& candidates, const Device& device) {
  const bool whole = !device.unsupported.empty() && device.no_triton != nullptr;
  return whole ? device.unsupported : describe(candidates);
}
bool aten_is_forced();

// The row that runs, or null when ATen is to run.
template <class K>
const K* pick(const std::vector<K>& rows, const std::string& op, Direction direction,
              const typename K::Problem& problem, const at::Tensor& like) {
  if (aten_is_forced()) return nullptr;
  const Selection& selection = current_selection();
  const Device device = machine_of(like);
  const K* row = choose(rows, op, direction, problem, device, selection);
  if (row != nullptr) return row;
  std::vector<Candidate> candidates;
  choose(rows, op, direction, problem, device, selection, &candidates);
  bool kernel_forced = false;
  for (const Candidate& c : candidates) kernel_forced |= c.name == selection.kernel;
  require_fallback_allowed(op + " " + name_of(direction), why_none(candidates, device),
                           kernel_forced);
  return nullptr;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
struct HostMemory {
  std::unique_ptr<void, Free> data;
  size_t bytes = 0;
};

// What a launch works in: fresh memory of torch's allocator (on a GPU, of the current stream), or,
// with `keep`, what the thread's last launch worked in. Fresh memory costs a page fault every 4
// KiB: a quarter of a fused ResNet-18's time, where malloc returned each layer's packed filters to
// the system.
class LaunchMemory {
 public:
  LaunchMemory(size_t bytes, const at::Tensor& like, bool keep);
  ~LaunchMemory();
  LaunchMemory(const LaunchMemory&) = delete;
  LaunchMemory& operator=(const LaunchMemory&) = delete;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
  at::Tensor fresh_;
  HostMemory kept_;
};

// Runs `row`.
template <class K>
void launch(const K& row, const typename K::Problem& problem, typename K::Args args,
            const at::Tensor& like) {
  c10::OptionalDeviceGuard guard(like.device());
  const Device machine = machine_for(row, problem, like);
  // The emulator's sanitizer sees the end of fresh memory only.
  const bool keep = row.backend == Backend::kCpu;
  const LaunchMemory workspace(row.workspace ? row.workspace(problem, machine) : 0, like, keep);
  args.workspace = workspace.data();
  row.launch(problem, args, context_of(like, machine));
}

}  // namespace fastconv
