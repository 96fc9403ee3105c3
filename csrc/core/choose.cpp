#include "core/choose.h"

namespace fastconv {
namespace {

// Empty when rows of `backend` take tensors of such a device, otherwise where they run.
std::string refuse_device(Backend backend, const Device& device) {
  if (backend == Backend::kTriton) return device.no_triton != nullptr ? device.no_triton : "";
  const bool gpu = device.type == Device::Type::kCuda;
  if ((backend == Backend::kCuda) == gpu) return {};
  return gpu ? "runs on CPU tensors" : "runs on CUDA tensors";
}

// On a CPU a GPU's rows run in an emulator or an interpreter: to judge kernels, for they are never
// the fastest way to a result.
bool runs_unasked(Backend backend, const Device& device) {
  return device.type == Device::Type::kCuda || backend == Backend::kCpu;
}

// "sm_90a" -> 90; anything else -> 0.
int sm_of(const std::string& arch) {
  return arch.compare(0, 3, "sm_") == 0 ? std::stoi(arch.substr(3)) : 0;
}

std::string refuse_machine(const std::string& arch, const Device& device) {
  if (arch == "avx512" && device.isa < CpuIsa::kAvx512) return "needs AVX-512";
  if (arch == "avx2" && device.isa < CpuIsa::kAvx2) return "needs AVX2 and FMA";
  if (device.type == Device::Type::kCpu) return {};  // emulated and interpreted: every sm_ row
  const int sm = sm_of(arch);
  const bool feature_set = !arch.empty() && arch.back() == 'a';  // sm_90a runs on 9.0 alone
  if (sm > device.sm_arch || (feature_set && sm != device.sm_arch)) return "needs " + arch;
  return {};
}

// Empty when `row` can run `problem` on `device`, otherwise why not.
template <class K>
std::string refusal(const K& row, const typename K::Problem& problem, const Device& device,
                    const Selection& selection) {
  if (std::string why = refuse_device(row.backend, device); !why.empty()) return why;
  if (selection.backend_forced && row.backend != selection.backend) {
    return std::string("backend ") + name_of(selection.backend) + " is forced";
  }
  const bool asked_for = selection.backend_forced || selection.kernel == row.name;
  if (!asked_for && !runs_unasked(row.backend, device)) return "runs only when asked for";
  if (row.backend == Backend::kCuda && !device.unsupported.empty()) return device.unsupported;
  if (std::string why = refuse_machine(row.arch, device); !why.empty()) return why;
  if (!(row.dtypes & bit(problem.dtype))) return std::string("dtype ") + name_of(problem.dtype);
  if (!(row.layouts & bit(problem.layout))) return std::string("layout ") + name_of(problem.layout);
  return row.supports ? row.supports(problem, device) : std::string();
}

}  // namespace

uint8_t largest_winograd_tile(const Selection& selection, bool fused_inference) {
  if (selection.kernel.find("winograd") != std::string::npos) return 4;
  if (selection.winograd == WinogradMode::kOff) return 0;
  return selection.winograd == WinogradMode::kFast && fused_inference ? 4 : 2;
}

template <class K>
const K* choose(const std::vector<K>& rows, const std::string& op, Direction direction,
                const typename K::Problem& problem, const Device& device,
                const Selection& selection, std::vector<Candidate>* why) {
  const auto concerns = [&](const K& row) { return row.op == op && row.direction == direction; };
  bool one_row = false;
  for (const K& row : rows) one_row |= concerns(row) && row.name == selection.kernel;

  const K* best = nullptr;
  double best_cost = 0;
  for (const K& row : rows) {
    if (!concerns(row)) continue;
    std::string reason = one_row && row.name != selection.kernel
                             ? "kernel " + selection.kernel + " is forced"
                             : refusal(row, problem, device, selection);
    double cost = 0;
    if (reason.empty()) {
      cost = row.cost(problem, device);
      if (best == nullptr || cost < best_cost) {
        best = &row;
        best_cost = cost;
      }
    }
    if (why != nullptr) why->push_back({row.name, std::move(reason), cost});
  }
  return best;
}

template const Conv2dKernel* choose(const std::vector<Conv2dKernel>&, const std::string&, Direction,
                                    const Conv2dProblem&, const Device&, const Selection&,
                                    std::vector<Candidate>*);
template const Pool2dKernel* choose(const std::vector<Pool2dKernel>&, const std::string&, Direction,
                                    const Pool2dProblem&, const Device&, const Selection&,
                                    std::vector<Candidate>*);
template const BatchNormKernel* choose(const std::vector<BatchNormKernel>&, const std::string&,
                                       Direction, const BatchNormProblem&, const Device&,
                                       const Selection&, std::vector<Candidate>*);

}  // namespace fastconv
