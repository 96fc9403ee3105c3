// The rows of the depthwise CPU convolutions: what they take and what they cost.
#include "cpu/conv2d_depthwise.h"

#include "cpu/conv2d_rows.h"
#include "cpu/table.h"

namespace fastconv {
namespace {

// A thread keeps one plane, with its padding, in its caches.
constexpr int64_t kMaxDepthwisePlane = 65536;

std::string refuse_groups(const Conv2dProblem& p) {
  if (p.G == p.C && p.K == p.C) return {};
  return "groups " + std::to_string(p.G) + ", not one for each of " + std::to_string(p.C) +
         " input and " + std::to_string(p.K) + " output channels";
}

std::string refuse(const Conv2dProblem& p) {
  if (p.layout == Layout::kNHWC && p.R > kMaxDepthwiseRows) {
    return "filter height " + std::to_string(p.R) + " above 64";
  }
  if (p.layout == Layout::kNCHW && p.H * p.W > kMaxDepthwisePlane) {
    return "plane of " + std::to_string(p.H * p.W) + " pixels above 65536";
  }
  return refuse_groups(p);
}

// A tile's pixels are neighbours in the window. In wgrad they are neighbours in the filter.
std::string refuse_window(const Conv2dProblem& p, Direction direction) {
  if (direction == Direction::kFprop && p.stride_w != 1) {
    return "stride " + std::to_string(p.stride_w) + " along rows";
  }
  if (direction == Direction::kWgrad && p.dil_w != 1) {
    return "dilation " + std::to_string(p.dil_w) + " along rows";
  }
  return refuse_groups(p);
}

// Nanoseconds of one thread, measured with AVX-512 and fitted on filters of 3x3 to 31x31: a
// vector's multiply-add, where the operands come from a first-level cache in practice, and what
// goes into a vector of results besides.
constexpr double kOutputVector = 10;
double multiply_add(CpuIsa isa) { return isa == CpuIsa::kAvx2 ? 0.4 : 0.6; }
double multiply_add_of_window(CpuIsa isa) {
  return isa == CpuIsa::kAvx512 ? 0.33 : isa == CpuIsa::kAvx2 ? 0.25 : 0.5;
}

double microseconds(const Conv2dProblem& p, double nanoseconds, const Device& device) {
  return kStartMicroseconds +
         (nanoseconds / 1e3 + p.bytes() / kBytesPerMicrosecond) / device.threads;
}

// In NHWC a vector holds channels: the last, partial one of a pixel is put together element by
// element and costs about six whole ones. In NCHW it holds pixels, those between the rows of a
// padded plane included, and copying the plane is felt beside few taps.
double cost(const Conv2dProblem& p, CpuIsa isa, const Device& device) {
  const int64_t lanes = lanes_of(isa, p.dtype);
  const auto outputs = static_cast<double>(p.output_elements());
  const auto taps = static_cast<double>(p.R * p.S);
  if (p.layout == Layout::kNHWC) {
    const int64_t tail = p.C % lanes == 0 ? 0 : 6;
    const double vectors =
        outputs / static_cast<double>(p.C) * static_cast<double>(p.C / lanes + tail);
    return microseconds(p, vectors * taps * multiply_add(isa), device);
  }
  const double vectors = outputs / static_cast<double>(lanes);
  const double padded = static_cast<double>(p.Q() + p.S - 1) / static_cast<double>(p.Q());
  return microseconds(p, vectors * (taps * padded * multiply_add(isa) + kOutputVector), device);
}

// A tile of pixels is computed whole, and so is a vector of channels.
double cost_of_window(const Conv2dProblem& p, CpuIsa isa, Direction direction,
                      const Device& device) {
  const int64_t lanes = lanes_of(isa, p.dtype), pixels = isa == CpuIsa::kAvx512 ? 7 : 6;
  const int64_t row = direction == Direction::kFprop   ? p.Q()
                      : direction == Direction::kDgrad ? (p.W + p.stride_w - 1) / p.stride_w
                                                       : p.S;
  const int64_t tiled = (row + pixels - 1) / pixels * pixels;
  const double filled = static_cast<double>(tiled) / static_cast<double>(row);
  const double vectors = static_cast<double>(p.output_elements() / p.C) *
                         static_cast<double>((p.C + lanes - 1) / lanes);
  const auto taps = static_cast<double>(p.R * p.S);
  return microseconds(p, vectors * (taps * filled * multiply_add_of_window(isa) + kOutputVector),
                      device);
}

void add_window_row(KernelTable& table, CpuIsa isa, Direction direction) {
  Conv2dKernel row = cpu_conv2d_row("conv2d_depthwise_window", isa, direction);
  row.supports = [=](const Conv2dProblem& p, const Device&) { return refuse_window(p, direction); };
  row.cost = [=](const Conv2dProblem& p, const Device& device) {
    return cost_of_window(p, isa, direction, device);
  };
  row.workspace = [=](const Conv2dProblem& p, const Device& device) {
    return conv2d_depthwise_window_workspace(p, direction, isa, device.threads);
  };
  row.launch = [=](const Conv2dProblem& p, const Conv2dArgs& args, const Context& context) {
    conv2d_depthwise_window(p, direction, isa, args, context);
  };
  table.conv2d.push_back(std::move(row));
}

void add_row(KernelTable& table, CpuIsa isa, Direction direction) {
  Conv2dKernel row = cpu_conv2d_row("conv2d_depthwise", isa, direction);
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
  for_each_built_isa([&](CpuIsa isa) {
    for (const Direction direction : {Direction::kFprop, Direction::kDgrad, Direction::kWgrad}) {
      add_row(table, isa, direction);
      add_window_row(table, isa, direction);
    }
  });
}

}  // namespace fastconv
