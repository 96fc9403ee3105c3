// The rows of the grouped CPU convolutions: what they take and what they cost.
#include "cpu/conv2d_grouped.h"
#include "cpu/isa.h"
#include "cpu/table.h"

namespace fastconv {
namespace {

int64_t lanes_of(CpuIsa isa, DType dtype) {
  const int64_t lanes = isa == CpuIsa::kAvx512 ? 16 : isa == CpuIsa::kAvx2 ? 8 : 4;
  return dtype == DType::kFloat64 ? lanes / 2 : lanes;
}

std::string refuse(const Conv2dProblem& p, Direction direction, int64_t lanes) {
  const auto number = [](int64_t n) { return std::to_string(n); };
  if (p.G == 1) return "one group";
  const GroupedLanes groups(p, direction, lanes);
  if (groups.channels % 4 != 0 || groups.channels == 0) {
    return number(groups.channels) + " channels a group, not a multiple of 4";
  }
  if (groups.columns % lanes == 0) return {};
  if (groups.columns != groups.channels || lanes % groups.columns != 0 ||
      p.G * groups.columns % lanes != 0) {
    return number(p.G) + " groups of " + number(groups.channels) + " to " + number(groups.columns) +
           " channels do not fill vectors of " + number(lanes);
  }
  return {};
}

// Multiply-adds a microsecond and thread in float32, the copies of windows included: measured on
// ResNeXt-50's layers with AVX-512. Half of it in float64.
double rate_of(CpuIsa isa) {
  return isa == CpuIsa::kAvx512 ? 45e3 : isa == CpuIsa::kAvx2 ? 35e3 : 8e3;
}

double cost(const Conv2dProblem& p, CpuIsa isa, const Device& device) {
  constexpr double kStartMicroseconds = 5, kBytesPerMicrosecond = 10e3;
  const double multiplies = p.flops() / 2 / rate_of(isa) * (p.dtype == DType::kFloat64 ? 2 : 1);
  return kStartMicroseconds + (multiplies + p.bytes() / kBytesPerMicrosecond) / device.threads;
}

void add_row(KernelTable& table, CpuIsa isa, Direction direction) {
  Conv2dKernel row;
  row.name = std::string("conv2d_grouped_") + name_of(isa) + "_" + name_of(direction);
  row.op = "conv2d";
  row.direction = direction;
  row.backend = Backend::kCpu;
  row.arch = name_of(isa);
  row.dtypes = kAllDTypes;
  row.layouts = bit(Layout::kNHWC);
  row.supports = [=](const Conv2dProblem& p, const Device&) {
    return refuse(p, direction, lanes_of(isa, p.dtype));
  };
  row.cost = [=](const Conv2dProblem& p, const Device& device) { return cost(p, isa, device); };
  row.workspace = [=](const Conv2dProblem& p, const Device& device) {
    return direction == Direction::kWgrad
               ? conv2d_grouped_wgrad_workspace(p, isa, device.threads)
               : conv2d_grouped_workspace(p, direction, isa, device.threads);
  };
  row.launch = [=](const Conv2dProblem& p, const Conv2dArgs& args, const Context& context) {
    direction == Direction::kWgrad ? conv2d_grouped_wgrad(p, isa, args, context)
                                   : conv2d_grouped(p, direction, isa, args, context);
  };
  table.conv2d.push_back(std::move(row));
}

}  // namespace

void add_cpu_conv2d_grouped_rows(KernelTable& table) {
  for (const CpuIsa isa : {CpuIsa::kAvx512, CpuIsa::kAvx2, CpuIsa::kPortable}) {
#if !defined(__x86_64__)
    if (isa != CpuIsa::kPortable) continue;
#endif
    for (const Direction direction : {Direction::kFprop, Direction::kDgrad, Direction::kWgrad}) {
      add_row(table, isa, direction);
    }
  }
}

}  // namespace fastconv
