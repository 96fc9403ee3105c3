// The rows of the dense and grouped CPU convolutions: what they take and what they cost.
#include "cpu/conv2d_rows.h"

#include <algorithm>

#include "cpu/conv2d_igemm.h"
#include "cpu/table.h"

namespace fastconv {
namespace {

constexpr double kUnitMicroseconds = 0.2;  // calls and index arithmetic of one block

double round_to(int64_t n, int64_t unit) {
  return static_cast<double>((n + unit - 1) / unit * unit);
}

// What the register tile really multiplies: lanes beyond the filters (NHWC) are computed for
// nothing, and fewer than four rows of filters (NCHW) do not hide a multiply-add's latency.
double cost_of_gemm(const Conv2dProblem& p, CpuIsa isa, const Device& device) {
  const int64_t lanes = lanes_of(isa, p.dtype);
  const int64_t filters = std::max<int64_t>(1, p.K / p.G);
  const double padded = p.layout == Layout::kNHWC
                            ? round_to(filters, lanes)
                            : static_cast<double>(std::max<int64_t>(filters, 4));
  const double multiplies = p.flops() / 2 * padded / static_cast<double>(filters) /
                            gemm_rate_of(isa) * (p.dtype == DType::kFloat64 ? 2 : 1);
  // Every input element is copied once for each tap.
  const double gathered = p.flops() / 2 / static_cast<double>(p.K) * static_cast<double>(p.G) * 4;
  const double moved = (p.bytes() + gathered) / kBytesPerMicrosecond;
  return kStartMicroseconds +
         (multiplies + moved + kUnitMicroseconds * static_cast<double>(p.G)) / device.threads;
}

double cost_of_sum(const Conv2dProblem& p, const Device& device) {
  return kStartMicroseconds + static_cast<double>(p.output_elements() * size_of(p.dtype)) /
                                  kBytesPerMicrosecond / device.threads;
}

// In NCHW the filter is read as it lies, or nearly: nothing to keep.
void add_packing(Conv2dKernel& row, CpuIsa isa) {
  row.packed_bytes = [=](const Conv2dProblem& p, const Device&) -> size_t {
    return p.layout == Layout::kNHWC ? conv2d_igemm_nhwc_packed(p, isa) : 0;
  };
  row.packing = [=](const Conv2dProblem& p, const Device&) {
    return conv2d_igemm_nhwc_packing(p, isa);
  };
  row.pack = [=](const Conv2dProblem& p, const Conv2dArgs& args, const Context& context) {
    conv2d_igemm_nhwc_pack(p, isa, args, context);
  };
}

void add_row(KernelTable& table, CpuIsa isa, Direction direction) {
  Conv2dKernel row = cpu_conv2d_row("conv2d_igemm", isa, direction);
  row.cost = [=](const Conv2dProblem& p, const Device& device) {
    return direction == Direction::kBgrad ? cost_of_sum(p, device) : cost_of_gemm(p, isa, device);
  };
  row.workspace = [=](const Conv2dProblem& p, const Device& device) {
    return direction == Direction::kWgrad   ? conv2d_wgrad_workspace(p, isa, device)
           : direction == Direction::kBgrad ? conv2d_bgrad_workspace(p)
           : p.layout == Layout::kNHWC
               ? conv2d_igemm_nhwc_workspace(p, direction, isa, device.threads)
               : conv2d_igemm_nchw_workspace(p, direction, isa, device.threads);
  };
  row.launch = [=](const Conv2dProblem& p, const Conv2dArgs& args, const Context& context) {
    direction == Direction::kWgrad   ? conv2d_wgrad(p, isa, args, context)
    : direction == Direction::kBgrad ? conv2d_bgrad(p, isa, args, context)
    : p.layout == Layout::kNHWC      ? conv2d_igemm_nhwc(p, direction, isa, args, context)
                                     : conv2d_igemm_nchw(p, direction, isa, args, context);
  };
  if (direction == Direction::kFprop) add_packing(row, isa);
  table.conv2d.push_back(std::move(row));
}

}  // namespace

void add_cpu_conv2d_rows(KernelTable& table) {
  for_each_built_isa([&](CpuIsa isa) {
    for (const Direction direction :
         {Direction::kFprop, Direction::kDgrad, Direction::kWgrad, Direction::kBgrad}) {
      add_row(table, isa, direction);
    }
  });
}

}  // namespace fastconv
