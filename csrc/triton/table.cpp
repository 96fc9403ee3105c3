#include "triton/table.h"

#include <algorithm>
#include <string>
#include <utility>

#include "core/estimate.h"
#include "core/integers.h"

namespace fastconv {
namespace {

// ---- costs: estimates, of which only the order between rows matters ----

// From torch's call to the GPU a launch passes through Python: 5 us more than a CUDA row's.
constexpr double kLaunch = 8;
// And a further kernel of the same call.
constexpr double kSecondLaunch = 3;

// Of the bandwidth, for kernels that gather: masked loads of blocks seldom use whole cache lines.
constexpr double kGatheredBandwidth = 0.6;

double memory_us(double bytes, const Device& device) {
  return gpu_us(kLaunch, bytes / kGatheredBandwidth, 0, 1, device);
}

// What an SM's tensor cores do in a cycle, in flops: those of sm_90 twice as much as sm_80's.
double tensor_core_flops(const Conv2dProblem& p, const Device& device) {
  const double generation = device.sm_arch >= 90 ? 2 : 1;
  // Shares of the peak that Triton's generated loops are known to reach. float32 without TF32 is
  // three TF32 products, and splitting the operands takes time of its own.
  switch (p.dtype) {
    case DType::kFloat64:
      return 0.5 * 128 * generation;
    case DType::kFloat32:
      return p.tf32 ? 0.45 * 1024 * generation : 0.4 * 1024 / 3 * generation;
    case DType::kFloat16:
    case DType::kBFloat16:
      break;
  }
  return 0.5 * 2048 * generation;
}

// One direction of a convolution: `count` products of rows x depth and depth x columns.
struct Gemm {
  int64_t count, rows, columns, depth;
};

// tl.dot takes no less than 16 of a dimension; a filter tap's channels are padded to that.
constexpr int64_t kLeast = 16;
int64_t padded(int64_t extent) { return ceil_div(extent, kLeast) * kLeast; }
// The depth of a product: up to 8 channels are taken with their taps as one.
int64_t depth_of(int64_t taps, int64_t channels) {
  return channels <= 8 ? padded(taps * channels) : taps * padded(channels);
}

Gemm gemm_of(const Conv2dProblem& p, Direction direction) {
  const int64_t C = p.C / p.G, K = p.K / p.G, taps = p.R * p.S;
  if (direction == Direction::kFprop) return {p.G, p.N * p.P() * p.Q(), K, depth_of(taps, C)};
  if (direction == Direction::kWgrad) return {p.G * taps, K, C, p.N * p.P() * p.Q()};
  // Input positions of one phase of the strides meet the same taps: each phase that meets any is a
  // product.
  const int64_t phases = std::min(p.stride_h, p.R) * std::min(p.stride_w, p.S);
  const int64_t met = ceil_div(p.R, p.stride_h) * ceil_div(p.S, p.stride_w);
  const int64_t positions = ceil_div(p.H, p.stride_h) * ceil_div(p.W, p.stride_w);
  return {p.G * phases, p.N * positions, C, depth_of(met, K)};
}

int64_t tile_of(int64_t extent) {
  int64_t tile = kLeast;
  while (tile < 128 && tile < extent) tile *= 2;
  return tile;
}

// Of the share above, what a tile reaches: a small one reads more operands for each product, and
// channels that do not fill 16 bytes are loaded one by one.
double tile_share(const Conv2dProblem& p, Direction direction, int64_t rows, int64_t columns) {
  const auto fills = [&p](int64_t channels) { return channels / p.G * size_of(p.dtype) % 16 == 0; };
  const bool scattered = (direction != Direction::kDgrad && !fills(p.C)) ||
                         (direction != Direction::kFprop && !fills(p.K));
  const int64_t least = std::min(rows, columns), most = std::max(rows, columns);
  const double share = least >= 128                 ? 1
                       : least >= 64 && most >= 128 ? 0.6
                       : least >= 32                ? 0.5
                                                    : 0.3;
  return scattered ? 0.4 * share : share;
}

double gemm_us(const Conv2dProblem& p, Direction direction, const Device& device,
               double advantage) {
  const Gemm g = gemm_of(p, direction);
  const int64_t tile_rows = tile_of(g.rows), tile_columns = tile_of(g.columns);
  const int64_t tiles = g.count * ceil_div(g.rows, tile_rows) * ceil_div(g.columns, tile_columns);
  // A filter gradient has few results and a long sum: that is split between the blocks of about two
  // waves, whose partial sums are written, read and added.
  const int64_t sms = std::max(device.sm_count, 1);
  const int64_t most_splits =
      direction == Direction::kWgrad ? std::max<int64_t>(1, g.depth / 512) : 1;
  const int64_t splits =
      std::min(most_splits, std::max<int64_t>(1, 2 * sms / std::max<int64_t>(1, tiles)));
  const int64_t partials = splits > 1 ? 2 * 4 * splits * p.filter_elements() : 0;
  // The last wave of blocks takes as long as a full one.
  const int64_t blocks = tiles * splits;
  const int64_t whole = blocks > sms ? ceil_div(blocks, sms) * sms : blocks;
  const double flops = 2.0 * static_cast<double>(whole * tile_rows * tile_columns) *
                       static_cast<double>(ceil_div(g.depth, splits));
  // NCHW is copied into NHWC first: written once and read once more, by a kernel of its own.
  const bool copies = p.layout == Layout::kNCHW && !p.is_1x1();
  const int64_t copied = direction == Direction::kFprop ? p.input_elements()
                         : direction == Direction::kDgrad
                             ? p.output_elements()
                             : p.input_elements() + p.output_elements();
  const double bytes =
      p.bytes() + static_cast<double>((copies ? 2 * copied * size_of(p.dtype) : 0) + partials);
  const double launches = kLaunch + kSecondLaunch * ((copies ? 1 : 0) + (splits > 1 ? 1 : 0));
  return gpu_us(
      launches, bytes, flops,
      advantage * tensor_core_flops(p, device) * tile_share(p, direction, tile_rows, tile_columns),
      busy_part(device, blocks, /*a_sm=*/1));
}

// The merge of the tiles' statistics walks 64 of them at a time, twice, at half a microsecond's
// latency; few blocks share the filters.
double merge_us(const Conv2dProblem& p) {
  const int64_t tiles = ceil_div(p.N * p.P() * p.Q(), 128);
  return kSecondLaunch + 2 * 0.5 * static_cast<double>(ceil_div(tiles, 64));
}

double depthwise_us(const Conv2dProblem& p, const Device& device) {
  // Large windows are bound by arithmetic: 128 multiply-adds a cycle, addresses and masks between.
  return gpu_us(kLaunch, p.bytes() / kGatheredBandwidth, p.flops(), 0.2 * 128 * 2, device);
}

// ---- what the rows take ----

std::string refuse_zero_filters(const Conv2dProblem& p) { return p.K == 0 ? "K 0" : ""; }

// The sums bound every position that a kernel computes; 128 is the widest tile.
std::string refuse_conv_beyond_int(const Conv2dProblem& p) {
  return refuse_beyond_int({{"C", p.C + 128 * p.G},
                            {"K", p.K + 128 * p.G},
                            {"batch", p.N},
                            {"filter positions", p.R * p.S * (p.C / p.G + 128)},
                            {"padded height", p.H + 2 * p.pad_h + p.R * p.dil_h + p.stride_h},
                            {"padded width", p.W + 2 * p.pad_w + p.S * p.dil_w + p.stride_w}});
}

std::string supports_any(const Conv2dProblem& p, const Device&) {
  const std::string why = refuse_zero_filters(p);
  return why.empty() ? refuse_conv_beyond_int(p) : why;
}

std::string supports_depthwise(const Conv2dProblem& p, const Device& device) {
  if (p.C != p.G) return "C / groups " + std::to_string(p.C / p.G) + ", not 1";
  return supports_any(p, device);
}

// A group of one channel would fill a sixteenth of what tl.dot takes.
std::string supports_igemm(const Conv2dProblem& p, const Device& device) {
  if (p.is_depthwise()) return "C / groups 1, which the depthwise rows take";
  return supports_any(p, device);
}

// A matrix product of [N * H * W, C] and [C, K].
std::string supports_1x1(const Conv2dProblem& p, const Device& device) {
  if (!p.is_1x1()) return "filter " + std::to_string(p.R) + "x" + std::to_string(p.S) + ", not 1x1";
  if (p.pad_h != 0 || p.pad_w != 0) {
    return "padding " + std::to_string(std::max(p.pad_h, p.pad_w)) + ", not 0";
  }
  if (p.G != 1) return "groups " + std::to_string(p.G) + ", not 1";
  return supports_igemm(p, device);
}

std::string supports_dense_1x1(const Conv2dProblem& p, const Device& device) {
  if (p.is_1x1() && (p.stride_h != 1 || p.stride_w != 1)) {
    return "stride " + std::to_string(std::max(p.stride_h, p.stride_w)) + ", not 1";
  }
  return supports_1x1(p, device);
}

// The TMA's strides are multiples of 16 bytes.
std::string supports_tma_1x1(const Conv2dProblem& p, const Device& device) {
  for (const auto& [name, channels] : {std::pair("C ", p.C), std::pair("K ", p.K)}) {
    const int64_t bytes = channels * size_of(p.dtype);
    if (bytes % 16 != 0) return name + std::to_string(channels) + ", not of 16 bytes' multiple";
  }
  // Its coordinates have 32 bits; 128 is the highest tile.
  if (std::string why = refuse_beyond_int({{"pixels", p.N * p.H * p.W + 128}}); !why.empty()) {
    return why;
  }
  return supports_dense_1x1(p, device);
}

// ---- rows ----

template <class K>
K row_of(const char* name, const char* op, Direction direction) {
  K row;
  row.name = name;
  row.op = op;
  row.direction = direction;
  row.backend = Backend::kTriton;
  row.arch = "sm_80";
  row.dtypes = kAllDTypes;
  row.layouts = kAllLayouts;
  row.launch = [name](const typename K::Problem& problem, const typename K::Args& args,
                      const Context& context) { launch_triton(name, problem, args, context); };
  return row;
}

struct ConvRow {
  const char* name;
  Direction direction;
  std::string (*supports)(const Conv2dProblem&, const Device&);
  double advantage = 1;  // by which its products are expected to be faster than the general row's
};

// From special to general; of equal cost the earlier one wins.
constexpr ConvRow kConvRows[] = {
    // Copies by the TMA: no address arithmetic, and deeper pipelines.
    {"conv1x1_tma_triton_sm90_fprop", Direction::kFprop, supports_tma_1x1, 1.3},
    {"conv1x1_tma_triton_sm90_dgrad", Direction::kDgrad, supports_tma_1x1, 1.3},
    // Nothing is outside, and a step walks channels alone.
    {"conv1x1_triton_fprop", Direction::kFprop, supports_1x1, 1.1},
    {"conv1x1_triton_dgrad", Direction::kDgrad, supports_dense_1x1, 1.1},
    {"conv2d_igemm_triton_fprop", Direction::kFprop, supports_igemm},
    {"conv2d_igemm_triton_dgrad", Direction::kDgrad, supports_igemm},
    {"conv2d_igemm_triton_wgrad", Direction::kWgrad, supports_igemm},
};

Conv2dKernel conv_row(const ConvRow& r, const char* op) {
  Conv2dKernel row = row_of<Conv2dKernel>(r.name, op, r.direction);
  row.supports = r.supports;
  const bool statistics = row.op == "conv2d_statistics";
  row.cost = [direction = r.direction, advantage = r.advantage, statistics](const Conv2dProblem& p,
                                                                            const Device& device) {
    const double merge = statistics ? merge_us(p) : 0;
    return merge + gemm_us(p, direction, device, advantage);
  };
  if (r.supports == supports_tma_1x1) {
    row.arch = "sm_90";
    row.dtypes &= ~bit(DType::kFloat64);
    row.layouts = bit(Layout::kNHWC);
  }
  return row;
}

void add_depthwise(KernelTable& table, const char* name, Direction direction) {
  Conv2dKernel row = row_of<Conv2dKernel>(name, "conv2d", direction);
  row.supports = supports_depthwise;
  row.cost = depthwise_us;
  table.conv2d.push_back(std::move(row));
}

void add_bgrad(KernelTable& table) {
  auto row = row_of<Conv2dKernel>("conv2d_triton_bgrad", "conv2d", Direction::kBgrad);
  row.supports = supports_any;
  row.cost = [](const Conv2dProblem& p, const Device& device) {
    return memory_us(static_cast<double>(p.output_elements() * size_of(p.dtype)), device);
  };
  table.conv2d.push_back(std::move(row));
}

void add_pool2d(KernelTable& table, const char* name, const char* op, Direction direction) {
  Pool2dKernel row = row_of<Pool2dKernel>(name, op, direction);
  row.supports = [](const Pool2dProblem& p, const Device&) {
    return refuse_beyond_int({{"C", p.C},
                              {"batch", p.N},
                              {"output height", p.P},
                              {"output width", p.Q},
                              {"window", p.R * p.S},
                              {"padded height", p.H + 2 * p.pad_h + p.R * p.dil_h + p.stride_h},
                              {"padded width", p.W + 2 * p.pad_w + p.S * p.dil_w + p.stride_w}});
  };
  row.cost = [](const Pool2dProblem& p, const Device& device) {
    return memory_us(p.bytes(), device);
  };
  table.pool2d.push_back(std::move(row));
}

void add_batch_norm(KernelTable& table, const char* name, Direction direction) {
  BatchNormKernel row = row_of<BatchNormKernel>(name, "batch_norm", direction);
  row.supports = [](const BatchNormProblem& p, const Device&) {
    // Four coefficients a channel lie behind each other.
    return refuse_beyond_int(
        {{"C", 4 * p.C + 128}, {"batch", p.N}, {"height", p.H}, {"width", p.W}});
  };
  row.cost = [direction](const BatchNormProblem& p, const Device& device) {
    // Sums first: what they read is read again, and a second kernel is launched.
    const bool sums = direction == Direction::kDgrad || p.training;
    return memory_us(p.bytes() * (sums ? 1.5 : 1), device) + (sums ? kLaunch : 0);
  };
  table.batch_norm.push_back(std::move(row));
}

}  // namespace

void add_triton_kernels(KernelTable& table) {
  add_depthwise(table, "conv2d_depthwise_triton_fprop", Direction::kFprop);
  add_depthwise(table, "conv2d_depthwise_triton_dgrad", Direction::kDgrad);
  add_depthwise(table, "conv2d_depthwise_triton_wgrad", Direction::kWgrad);
  for (const ConvRow& r : kConvRows) table.conv2d.push_back(conv_row(r, "conv2d"));
  add_bgrad(table);
  // The result with each filter's mean and variance, for the BatchNorm behind it.
  table.conv2d.push_back(conv_row(
      {"conv1x1_triton_statistics", Direction::kFprop, supports_1x1, 1.1}, "conv2d_statistics"));
  table.conv2d.push_back(conv_row(
      {"conv2d_igemm_triton_statistics", Direction::kFprop, supports_igemm}, "conv2d_statistics"));
  add_pool2d(table, "max_pool2d_triton_fprop", "max_pool2d", Direction::kFprop);
  add_pool2d(table, "max_pool2d_triton_dgrad", "max_pool2d", Direction::kDgrad);
  add_pool2d(table, "avg_pool2d_triton_fprop", "avg_pool2d", Direction::kFprop);
  add_pool2d(table, "avg_pool2d_triton_dgrad", "avg_pool2d", Direction::kDgrad);
  add_pool2d(table, "adaptive_avg_pool2d_triton_fprop", "adaptive_avg_pool2d", Direction::kFprop);
  add_pool2d(table, "adaptive_avg_pool2d_triton_dgrad", "adaptive_avg_pool2d", Direction::kDgrad);
  add_batch_norm(table, "batch_norm_triton_fprop", Direction::kFprop);
  add_batch_norm(table, "batch_norm_triton_dgrad", Direction::kDgrad);
}

}  // namespace fastconv
