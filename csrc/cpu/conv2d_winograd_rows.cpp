// The rows of Winograd's convolution: what they take and what they cost.
#include <algorithm>

#include "cpu/conv2d_rows.h"
#include "cpu/conv2d_scratch.h"
#include "cpu/conv2d_winograd.h"
#include "cpu/table.h"

namespace fastconv {
namespace {

std::string by(int64_t a, int64_t b) { return std::to_string(a) + " by " + std::to_string(b); }

std::string refuse(const Conv2dProblem& p, int64_t tile) {
  if (p.R != 3 || p.S != 3) return "filter of " + by(p.R, p.S) + ", not 3 by 3";
  if (p.stride_h != 1 || p.stride_w != 1) return "stride " + by(p.stride_h, p.stride_w);
  if (p.dil_h != 1 || p.dil_w != 1) return "dilation " + by(p.dil_h, p.dil_w);
  if (p.G != 1) return "groups " + std::to_string(p.G);
  if (tile > p.winograd) {
    return "tiles of " + by(tile, tile) + ", where winograd(...) allows at most " +
           by(p.winograd, p.winograd);
  }
  return {};
}

constexpr int64_t kLeastTiles = 6;     // fewer rows do not hide a multiply-add's latency
constexpr int64_t kTileDepth = 8;      // a register tile's start and end cost as much as this depth
constexpr double kFilterBytes = 30e3;  // a microsecond, from a third-level cache
constexpr int64_t kBlockTiles = 28;

// Nanoseconds a thread takes for the transforms, measured and nearly the same on all instruction
// sets: for each tile and channel or filter, and for each channel of each filter.
double transform_ns(int64_t tile) { return tile == 4 ? 15 : 3; }
double filter_ns(int64_t tile) { return tile == 4 ? 20 : 9; }

// Microseconds of transforming the filter at every call. Memory beyond 32 MiB comes fresh from the
// system each time, at 0.6 ns a byte.
double cost_of_filter(const Conv2dProblem& p, int64_t tile, double bytes) {
  if (p.filter_kept) return 0;
  const double fresh = bytes > 32 << 20 ? 0.6 * bytes : 0;
  return (static_cast<double>(p.C * p.K) * filter_ns(tile) + fresh) / 1e3;
}

double cost(const Conv2dProblem& p, int64_t tile, CpuIsa isa, const Device& device) {
  const int64_t lanes = lanes_of(isa, p.dtype);
  const int64_t tiles = p.N * divide_up(p.P(), tile) * divide_up(p.Q(), tile);
  const int64_t channels = round_up(p.C, lanes), filters = round_up(p.K, lanes);
  const auto products = static_cast<double>((tile + 2) * (tile + 2) * std::max(tiles, kLeastTiles) *
                                            (p.C + kTileDepth) * filters);
  const auto bytes = static_cast<double>(conv2d_winograd_packed_bytes(p, tile, isa));
  const double read = bytes * static_cast<double>(divide_up(tiles, kBlockTiles));
  const double transforms = static_cast<double>(tiles * (channels + filters)) * transform_ns(tile);
  const double residual =
      p.epilogue.residual ? 4 * static_cast<double>(p.output_elements()) : 0;  // bytes
  return kStartMicroseconds +
         (products / gemm_rate_of(isa) + transforms / 1e3 + read / kFilterBytes +
          residual / kBytesPerMicrosecond + cost_of_filter(p, tile, bytes)) /
             device.threads;
}

void add_row(KernelTable& table, int64_t tile, CpuIsa isa) {
  Conv2dKernel row =
      cpu_conv2d_row("conv2d_winograd" + std::to_string(tile), isa, Direction::kFprop);
  row.dtypes = bit(DType::kFloat32);
  row.layouts = bit(Layout::kNHWC);
  row.supports = [=](const Conv2dProblem& p, const Device&) { return refuse(p, tile); };
  row.cost = [=](const Conv2dProblem& p, const Device& device) {
    return cost(p, tile, isa, device);
  };
  row.workspace = [=](const Conv2dProblem& p, const Device& device) {
    return conv2d_winograd_workspace(p, tile, isa, device.threads);
  };
  row.launch = [=](const Conv2dProblem& p, const Conv2dArgs& args, const Context& context) {
    conv2d_winograd(p, tile, isa, args, context);
  };
  row.packed_bytes = [=](const Conv2dProblem& p, const Device&) {
    return conv2d_winograd_packed_bytes(p, tile, isa);
  };
  row.pack = [=](const Conv2dProblem& p, const Conv2dArgs& args, const Context& context) {
    conv2d_winograd_pack(p, tile, isa, args, context);
  };
  table.conv2d.push_back(std::move(row));
}

}  // namespace

void add_cpu_conv2d_winograd_rows(KernelTable& table) {
  for_each_built_isa([&](CpuIsa isa) {
    for (const int64_t tile : {4, 2}) add_row(table, tile, isa);
  });
}

}  // namespace fastconv
