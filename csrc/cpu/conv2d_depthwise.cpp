// The rows of the depthwise CPU convolutions: what they take and what they cost.
#include "cpu/conv2d_depthwise.h"

#include "cpu/table.h"

namespace fastconv {
namespace {

// A thread keeps one plane, with its padding, in its caches.
constexpr int64_t kMaxDepthwisePlane = 65536;

std::string refuse(const Conv2dProblem& p) {
  if (p.G != p.C || p.K != p.C) {
    return "groups " + std::to_string(p.G) + ", not one for each of " + std::to_string(p.C) +
           " input and " + std::to_string(p.K) + " output channels";
  }
  if (p.layout == Layout::kNHWC && p.R > kMaxDepthwiseRows) {
    return "filter height " + std::to_string(p.R) + " above 64";
  }
  if (p.layout == Layout::kNCHW && p.H * p.W > kMaxDepthwisePlane) {
    return "plane of " + std::to_string(p.H * p.W) + " pixels above 65536";
  }
  return {};
}

// In NHWC a vector holds channels: the last, partial one of a pixel is put together element by
// element and costs about six whole ones. In NCHW it holds pixels, and copying the plane is felt
// beside few taps. Measured: 3 vectors of multiply-adds a nanosecond and thread where the operands
// come from the first-level cache, half of that in practice.
double cost(const Conv2dProblem& p, CpuIsa isa, const Device& device) {
  const int64_t lanes = (isa == CpuIsa::kAvx512 ? 16
                         : isa == CpuIsa::kAvx2 ? 8
                                                : 4) /
                        (p.dtype == DType::kFloat64 ? 2 : 1);
  const auto outputs = static_cast<double>(p.output_elements());
  double vectors = outputs / static_cast<double>(lanes);
  if (p.layout == Layout::kNHWC) {
    const int64_t tail = p.C % lanes == 0 ? 0 : 6;
    vectors = outputs / static_cast<double>(p.C) * static_cast<double>(p.C / lanes + tail);
  }
  const double multiplies = vectors * static_cast<double>(p.R * p.S);
  const double nanoseconds = isa == CpuIsa::kAvx2 ? 0.4 : 0.6;
  constexpr double kBytesPerMicrosecond = 10e3;
  return 5 + (multiplies * nanoseconds / 1e3 + p.bytes() / kBytesPerMicrosecond) / device.threads;
}

void add_row(KernelTable& table, CpuIsa isa, Direction direction) {
  Conv2dKernel row;
  row.name = std::string("conv2d_depthwise_") + name_of(isa) + "_" + name_of(direction);
  row.op = "conv2d";
  row.direction = direction;
  row.backend = Backend::kCpu;
  row.arch = name_of(isa);
  row.dtypes = kAllDTypes;
  row.layouts = kAllLayouts;
  row.supports = [](const Conv2dProblem& p, const Device&) { return refuse(p); };
  row.cost = [=](const Conv2dProblem& p, const Device& device) { return cost(p, isa, device); };
  row.workspace = [=](const Conv2dProblem& p, const Device& device) {
    return p.layout == Layout::kNHWC
               ? conv2d_depthwise_nhwc_workspace(p, direction, isa)
               : conv2d_depthwise_nchw_workspace(p, direction, isa, device.threads);
  };
  row.launch = [=](const Conv2dProblem& p, const Conv2dArgs& args, const Context& context) {
    p.layout == Layout::kNHWC ? conv2d_depthwise_nhwc(p, direction, isa, args, context)
                              : conv2d_depthwise_nchw(p, direction, isa, args, context);
  };
  table.conv2d.push_back(std::move(row));
}

}  // namespace

void add_cpu_conv2d_depthwise_rows(KernelTable& table) {
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
