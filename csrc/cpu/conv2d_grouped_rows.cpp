// The rows of the grouped CPU convolutions: what they take and what they cost.
#include "cpu/conv2d_grouped.h"
#include "cpu/conv2d_rows.h"
#include "cpu/table.h"

namespace fastconv {
namespace {

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
  const double multiplies = p.flops() / 2 / rate_of(isa) * (p.dtype == DType::kFloat64 ? 2 : 1);
  return kStartMicroseconds + (multiplies + p.bytes() / kBytesPerMicrosecond) / device.threads;
}

void add_row(KernelTable& table, CpuIsa isa, Direction direction) {
  Conv2dKernel row = cpu_conv2d_row("conv2d_grouped", isa, direction);
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
  for_each_built_isa([&](CpuIsa isa) {
    for (const Direction direction : {Direction::kFprop, Direction::kDgrad, Direction::kWgrad}) {
      add_row(table, isa, direction);
    }
  });
}

}  // namespace fastconv
