// The rows of the Hopper implicit GEMM: what they take, what it costs, and how a problem becomes
// phases, tensor maps and tiles.
#include "cuda/conv2d_igemm_sm90.h"

#include <algorithm>
#include <numeric>
#include <string>

#include "cuda/conv2d_layout.h"
#include "cuda/table.h"

namespace fastconv {
namespace cuda {
namespace {

constexpr int kRowBytes = 128;  // of channels, a step of the main loop

// A problem as the main loop sees it.
struct View {
  bool dgrad, tiled;
  int64_t red, outs;      // channels of a group, summed over and written
  int64_t height, width;  // of the activations
  int64_t padded;         // channels of a group in the activations as they are read
  bool copy_input, copy_filter;
};

bool splits(const Conv2dProblem& p) { return p.dtype == DType::kFloat32 && !p.tf32; }
int depth_of(DType dtype) { return kRowBytes / static_cast<int>(size_of(dtype)); }

View view_of(const Conv2dProblem& p, Direction direction, bool one_tap) {
  View v = {};
  v.dgrad = direction == Direction::kDgrad;
  v.tiled = one_tap;
  v.red = (v.dgrad ? p.K : p.C) / p.G;
  v.outs = (v.dgrad ? p.C : p.K) / p.G;
  v.height = v.dgrad ? p.P() : p.H;
  v.width = v.dgrad ? p.Q() : p.W;
  v.padded = padded_channels(v.red, p.dtype);
  // One pixel an image, or one tap a channel: both layouts are the same bytes.
  const bool by_pixel = p.layout == Layout::kNHWC || v.height * v.width == 1;
  const bool by_tap = p.filter_layout == Layout::kNHWC || p.is_1x1();
  v.copy_input = !by_pixel || v.padded != v.red;
  v.copy_filter = v.dgrad || !by_tap || v.padded != v.red || splits(p);
  return v;
}

int64_t result_pixels(const Conv2dProblem& p, const View& v) {
  return p.N * (v.dgrad ? p.H * p.W : p.P() * p.Q());
}

FilterCopy filter_copy_of(const Conv2dProblem& p, const View& v) {
  return {v.dgrad ? FilterOrder::kCRSK : FilterOrder::kKRSC, splits(p)};
}

// ---- phases ----

// Results phase, phase + phases, ... of one axis: result i of them has its window at start + i *
// jump, and meets tap first_tap + j * tap_step at a distance of offset + j * move from there.
struct AxisPhase {
  int count, start, taps, first_tap, offset;
  int lower, upper;  // of the positions that windows begin at, as Im2colMap has them
};
struct Axis {
  int size, out, taps, stride, pad, dil;
  bool dgrad;

  int phases() const { return dgrad ? std::min(stride, size) : 1; }
  int jump() const { return dgrad ? 1 : stride; }
  int tap_step() const { return dgrad ? stride / std::gcd(stride, dil) : 1; }
  int move() const { return dgrad ? -dil / std::gcd(stride, dil) : dil; }
  AxisPhase phase(int number) const;
};

// dgrad: tap r of result h reads activation (h + pad - r * dil) / stride where that is whole, so
// later taps read earlier activations: the window begins at the last, and offsets descend.
AxisPhase Axis::phase(int number) const {
  if (!dgrad) return {out, -pad, taps, 0, 0, -pad, pad - (taps - 1) * dil};
  AxisPhase a = {};
  a.count = (size - 1 - number) / phases() + 1;
  for (int r = 0; r < std::min(tap_step(), taps); ++r) {
    const int from = number + pad - r * dil;
    if (from % stride != 0) continue;
    a.first_tap = r;
    a.taps = (taps - 1 - r) / tap_step() + 1;
    a.offset = (a.taps - 1) * -move();
    a.start = from / stride - a.offset;
    break;
  }
  a.lower = a.start;
  a.upper = a.start + a.count - out;
  return a;
}

struct Axes {
  Axis h, w;
  int phases() const { return h.phases() * w.phases(); }
};
Axes axes_of(const Conv2dProblem& p, const View& v) {
  return {{to_int(p.H), to_int(p.P()), to_int(p.R), to_int(p.stride_h), to_int(p.pad_h),
           to_int(p.dil_h), v.dgrad},
          {to_int(p.W), to_int(p.Q()), to_int(p.S), to_int(p.stride_w), to_int(p.pad_w),
           to_int(p.dil_w), v.dgrad}};
}

// ---- tensor maps ----

CUtensorMapDataType map_type(const Conv2dProblem& p) {
  switch (p.dtype) {
    case DType::kFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case DType::kBFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    default:  // TFLOAT32 rounds as it loads; 3xTF32 splits for itself
      return splits(p) ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;
  }
}

TiledMap pixels_map(const Conv2dProblem& p, const View& v, const void* base, int rows) {
  const int64_t C = v.padded * p.G;
  TiledMap map = {map_type(p), base, 2, {C, p.N * v.height * v.width}, {1, C}};
  map.box[0] = depth_of(p.dtype);
  map.box[1] = rows;
  map.swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  return map;
}

Im2colMap window_map(const Conv2dProblem& p, const View& v, const Axes& axes, const AxisPhase& h,
                     const AxisPhase& w, const void* base, int rows) {
  const int64_t C = v.padded * p.G;
  return {map_type(p),
          base,
          {C, v.width, v.height, p.N},
          {1, C, v.width * C, v.height * v.width * C},
          {w.lower, h.lower},
          {w.upper, h.upper},
          {axes.w.jump(), axes.h.jump()},
          depth_of(p.dtype),
          rows,
          CU_TENSOR_MAP_SWIZZLE_128B};
}

// [rows][taps][channels summed over]; of a split filter the low parts' rows follow the high ones'.
TiledMap filter_map(const Conv2dProblem& p, const View& v, const void* base, int rows) {
  const int64_t taps = p.R * p.S;
  TiledMap map = {map_type(p),
                  base,
                  3,
                  {v.padded, taps, v.outs * p.G * (splits(p) ? 2 : 1)},
                  {1, v.padded, taps * v.padded}};
  map.box[0] = depth_of(p.dtype);
  map.box[1] = 1;
  map.box[2] = rows;
  map.swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  return map;
}

// Whether results can leave as boxes: one line of pixels, one of filters, and little to do on the
// way. Wide activations and a residual take the general way.
bool stores_boxes(const Conv2dProblem& p, const View& v, const Axes& axes) {
  const int64_t pixels = result_pixels(p, v);
  const Epilogue& e = p.epilogue;
  const bool simple =
      v.dgrad || (!e.residual && !e.statistics &&
                  (e.activation == Activation::kNone || e.activation == Activation::kReLU));
  return simple && size_of(p.dtype) == 2 && p.G == 1 && v.outs % 8 == 0 && pixels <= 0x7fffffff &&
         axes.phases() == 1 && (p.layout == Layout::kNHWC || pixels == p.N);
}

TiledMap results_map(const Conv2dProblem& p, const View& v, void* base) {
  const int64_t pixels = result_pixels(p, v);
  TiledMap map = {map_type(p), base, 2, {v.outs, pixels}, {1, v.outs}};
  map.box[0] = map.box[1] = 64;
  map.swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  return map;
}

// ---- tiles ----

// How many blocks share a sum. It follows from the problem alone, as if every GPU had an H200's 132
// SMs, so that the bits do too. Eight steps of a tile's take about as long as filling the ring.
int splits_of(const Conv2dProblem& p, const View& v, const Axes& axes) {
  if (axes.phases() != 1 || p.epilogue.statistics) return 1;
  constexpr int64_t kSms = 132, kLeastSteps = 8, kMost = 16;
  const AxisPhase h = axes.h.phase(0), w = axes.w.phase(0);
  const int64_t steps = ceil_div(v.red, depth_of(p.dtype)) * h.taps * w.taps;
  const int64_t tiles = ceil_div(p.N * h.count * w.count, 128) * ceil_div(v.outs, 128) * p.G;
  return to_int(std::max<int64_t>(
      1, std::min({kSms / std::max<int64_t>(tiles, 1), steps / kLeastSteps, kMost})));
}

struct Cut {
  int64_t first_tile[kMostPhases], pixel_tiles, group_tiles, tiles;
  int splits;    // each with as many tiles
  double steps;  // of the main loop, in all tiles of all splits
};

Cut cut_of(const Conv2dProblem& p, const View& v, const Axes& axes, const IgemmTileShape& shape) {
  Cut cut = {};
  cut.group_tiles = ceil_div(v.outs, shape.columns);
  const int64_t filter_tiles = cut.group_tiles * p.G, chunks = ceil_div(v.red, depth_of(p.dtype));
  for (int i = 0; i < axes.phases(); ++i) {
    const AxisPhase h = axes.h.phase(i / axes.w.phases()), w = axes.w.phase(i % axes.w.phases());
    const int64_t tiles = ceil_div(p.N * h.count * w.count, shape.rows * shape.cluster);
    cut.first_tile[i] = cut.pixel_tiles;
    cut.pixel_tiles += tiles;
    cut.steps += static_cast<double>(tiles * filter_tiles * h.taps * w.taps * chunks);
  }
  cut.tiles = cut.pixel_tiles * filter_tiles;
  cut.splits = splits_of(p, v, axes);
  return cut;
}

// ---- cost ----

// What a tile costs besides its products, and how near to the tensor cores' peak those come. A step
// of 128 x 128 is 512 cycles of products and reads 24 KB from L2 in a cluster of two, 48 bytes a
// cycle; L2 gives about 30. 128 x 256 reads 32 a cycle, 128 x 64 without a cluster 96. Of TF32 a
// step is as many bytes and products take twice as long.
struct TileCost {
  double share_16bit, share_tf32;
  double exposed;  // cycles a tile in which nothing multiplies: filling the ring, storing
};
constexpr TileCost kTileCosts[] = {
    {0.32, 0.55, 400}, {0.6, 0.7, 600}, {0.75, 0.75, 2500}, {0.55, 0.55, 1500}, {0.65, 0.65, 1500}};

// Cycles of an SM's tensor cores, idle SMs of the last wave included.
double busy_cycles(const Conv2dProblem& p, const View& v, const Axes& axes, IgemmTileKind kind,
                   int sms) {
  const IgemmTileShape& shape = shape_of(kind);
  const TileCost& cost = kTileCosts[static_cast<int>(kind)];
  const Cut cut = cut_of(p, v, axes, shape);
  if (cut.tiles == 0) return 0;
  const double share = p.dtype == DType::kFloat32 ? cost.share_tf32 : cost.share_16bit;
  const double step = shape.rows * shape.columns * 64 / 2048.0 * (splits(p) ? 3 : 1);
  const int64_t tiles = cut.tiles * cut.splits;
  const double tile = cut.steps / static_cast<double>(tiles) * step / share + cost.exposed;
  return static_cast<double>(ceil_div(tiles, std::max(1, sms / shape.cluster))) * tile;
}

IgemmTileKind tile_of(const Conv2dProblem& p, const View& v, const Axes& axes, int sms) {
  using Kind = IgemmTileKind;
  constexpr Kind kRounded[] = {Kind::kPing128x64, Kind::kPing128x128, Kind::kWide128x256};
  constexpr Kind kSplit[] = {Kind::kSplit128x64, Kind::kSplit128x128};
  const Kind* const kinds = splits(p) ? kSplit : kRounded;
  Kind best = kinds[0];
  for (int i = 1; i < (splits(p) ? 2 : 3); ++i) {
    if (busy_cycles(p, v, axes, kinds[i], sms) < busy_cycles(p, v, axes, best, sms)) {
      best = kinds[i];
    }
  }
  return best;
}

// ---- the launch ----

int sm_count(int device) {
  int count = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, std::max(device, 0));
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  return std::max(count, 1);
}

struct Row {
  const char *name, *op;
  Direction direction;
  bool one_tap;  // 1x1, stride 1, no padding: a matrix product
  double advantage;
};
constexpr Row kRows[] = {
    {"conv1x1_sm90_fprop", "conv2d", Direction::kFprop, true, 1.05},
    {"conv1x1_sm90_dgrad", "conv2d", Direction::kDgrad, true, 1.05},
    {"conv2d_igemm_sm90_fprop", "conv2d", Direction::kFprop, false, 1},
    {"conv2d_igemm_sm90_dgrad", "conv2d", Direction::kDgrad, false, 1},
    {"conv1x1_sm90_statistics", "conv2d_statistics", Direction::kFprop, true, 1.05},
    {"conv2d_igemm_sm90_statistics", "conv2d_statistics", Direction::kFprop, false, 1},
};

int64_t partial_bytes(const Conv2dProblem& p, const View& v, const Axes& axes) {
  const int splits = splits_of(p, v, axes);
  return splits == 1 ? 0 : splits * result_pixels(p, v) * v.outs * p.G * int64_t{sizeof(float)};
}

// What a launch finds in the workspace.
struct Workspace {
  void *activations, *filter;
  float *partials, *partial_sums;  // of the statistics; of a split reduction
  size_t bytes;

  Workspace(const Conv2dProblem& p, const View& v, void* base) {
    WorkspaceCarver carver(base);
    const int64_t pixels = v.height * v.width, channels = v.red * p.G;
    activations = filter = nullptr;
    partials = partial_sums = nullptr;
    if (v.copy_input) {
      activations = carver.take(activation_copy_bytes(p.dtype, p.N, channels, pixels, p.G));
    }
    if (v.copy_filter) filter = carver.take(filter_copy_bytes(p, filter_copy_of(p, v)));
    if (p.epilogue.statistics) {
      const int64_t tiles = ceil_div(p.N * p.P() * p.Q(), kStatisticsRows);
      partials = static_cast<float*>(carver.take(statistics_bytes(tiles, p.K)));
    }
    partial_sums = static_cast<float*>(carver.take(partial_bytes(p, v, axes_of(p, v))));
    bytes = carver.bytes();
  }
};

void fill_phases(const Conv2dProblem& p, const View& v, const Axes& axes, const Cut& cut,
                 const IgemmTileShape& shape, const void* activations, const Strides4& out,
                 IgemmParams& t) {
  t.phase_count = axes.phases();
  for (int i = 0; i < t.phase_count; ++i) {
    const int number_h = i / axes.w.phases(), number_w = i % axes.w.phases();
    const AxisPhase h = axes.h.phase(number_h), w = axes.w.phase(number_w);
    IgemmPhase& phase = t.phases[i];
    phase.pixels = p.N * h.count * w.count;
    phase.origin = number_h * out.h + number_w * out.w;
    phase.rows = h.count;
    phase.cols = w.count;
    phase.first_tile = to_int(cut.first_tile[i]);
    phase.start_h = h.start;
    phase.start_w = w.start;
    phase.taps_h = h.taps;
    phase.taps_w = w.taps;
    phase.first_r = h.first_tap;
    phase.first_s = w.first_tap;
    phase.offset_h = h.offset;
    phase.offset_w = w.offset;
    if (h.taps * w.taps == 0) continue;  // nothing is loaded
    t.activations[i] = v.tiled ? encode(pixels_map(p, v, activations, shape.rows))
                               : encode(window_map(p, v, axes, h, w, activations, shape.rows));
  }
}

IgemmParams params_of(const Conv2dProblem& p, const View& v, const IgemmTileShape& shape,
                      const Conv2dArgs& args, const Workspace& workspace) {
  const Axes axes = axes_of(p, v);
  const Cut cut = cut_of(p, v, axes, shape);
  IgemmParams t = {};
  t.target = v.dgrad ? dgrad_target(p, args) : fprop_target(p, args, workspace.partials);
  const Strides4 out =
      v.dgrad ? dense_strides(p.layout, p.C, p.H, p.W) : dense_strides(p.layout, p.K, p.P(), p.Q());
  const void* activations = v.dgrad ? args.grad : args.input;
  if (v.copy_input) activations = workspace.activations;
  fill_phases(p, v, axes, cut, shape, activations, out, t);
  t.filter = encode(filter_map(p, v, v.copy_filter ? workspace.filter : args.filter,
                               shape.columns / shape.cluster));
  t.boxes = cut.splits == 1 && stores_boxes(p, v, axes);
  if (t.boxes) t.results = encode(results_map(p, v, args.out));
  t.dst = {out.n, out.c, out.h * axes.h.phases(), out.w * axes.w.phases()};
  t.tiles = to_int(cut.tiles * cut.splits);
  t.splits = cut.splits;
  t.split_tiles = to_int(cut.tiles);
  t.partial_sums = workspace.partial_sums;
  t.group_tiles = to_int(cut.group_tiles);
  t.G = to_int(p.G);
  t.red = to_int(v.padded);
  t.outs = to_int(v.outs);
  t.jump_h = axes.h.jump();
  t.jump_w = axes.w.jump();
  t.move_h = axes.h.move();
  t.move_w = axes.w.move();
  t.tap_step_h = axes.h.tap_step();
  t.tap_step_w = axes.w.tap_step();
  t.S = to_int(p.S);
  t.low_row = to_int(v.outs * p.G);
  t.tiled = v.tiled;
  return t;
}

void launch(const Row& row, const Conv2dProblem& p, const Conv2dArgs& args,
            const Context& context) {
  const View v = view_of(p, row.direction, row.one_tap);
  const Workspace workspace(p, v, args.workspace);
  if (v.copy_input) {
    copy_activations(row.name, p.dtype, p.layout, v.dgrad ? args.grad : args.input,
                     workspace.activations, p.N, v.red * p.G, v.height * v.width, context.stream,
                     p.G);
  }
  if (v.copy_filter) {
    copy_filter(row.name, p, filter_copy_of(p, v), args.filter, workspace.filter, context.stream);
  }
  // The number of SMs decides who computes a result, not how.
  const int sms = sm_count(context.device);
  const IgemmTileKind kind = tile_of(p, v, axes_of(p, v), sms);
  const IgemmTileShape& shape = shape_of(kind);
  const IgemmParams t = params_of(p, v, shape, args, workspace);
  Launch launch = {row.name, 0, 0, context.stream};
  launch.blocks = int64_t{std::min(t.tiles, std::max(1, sms / shape.cluster))} * shape.cluster;
  if (p.dtype == DType::kFloat16) {
    launch_igemm_float16(launch, kind, t);
  } else if (p.dtype == DType::kBFloat16) {
    launch_igemm_bfloat16(launch, kind, t);
  } else {
    launch_igemm_float32(launch, kind, t);
  }
  if (t.splits > 1) {
    reduce_igemm(row.name, p.dtype,
                 {t.partial_sums, result_pixels(p, v), to_int(v.outs * p.G), t.splits,
                  t.phases[0].rows, t.phases[0].cols, t.dst, t.target.epilogue, args.out},
                 context.stream);
  }
  if (p.epilogue.statistics) {
    const int64_t pixels = p.N * p.P() * p.Q();
    merge_statistics(row.name, workspace.partials, ceil_div(pixels, kStatisticsRows),
                     kStatisticsRows, pixels, p.K, static_cast<float*>(args.mean_out),
                     static_cast<float*>(args.var_out), context.stream);
  }
}

// ---- what the rows take ----

std::string refuse_not_one_tap(const Conv2dProblem& p) {
  if (!p.is_1x1()) return "filter " + std::to_string(p.R) + "x" + std::to_string(p.S) + ", not 1x1";
  if (p.pad_h != 0 || p.pad_w != 0) {
    return "padding " + std::to_string(std::max(p.pad_h, p.pad_w)) + ", not 0";
  }
  if (p.stride_h != 1 || p.stride_w != 1) {
    return "stride " + std::to_string(std::max(p.stride_h, p.stride_w)) + ", not 1";
  }
  return {};
}

// TMA's limits, asked of maps over memory that need not exist.
std::string refuse_maps(const Conv2dProblem& p, const View& v, const Axes& axes) {
  const void* const anywhere = reinterpret_cast<const void*>(uintptr_t{1024});
  std::string why = refuse(filter_map(p, v, anywhere, 256));
  if (why.empty() && v.tiled) why = refuse(pixels_map(p, v, anywhere, 128));
  if (!why.empty() || v.tiled) return why;
  const int offsets[] = {std::abs(axes.h.move()) * (axes.h.taps - 1),
                         std::abs(axes.w.move()) * (axes.w.taps - 1)};
  for (const int offset : offsets) {
    if (offset > 255) return "window of " + std::to_string(offset + 1) + " pixels, more than 256";
  }
  for (int i = 0; i < axes.phases() && why.empty(); ++i) {
    const AxisPhase h = axes.h.phase(i / axes.w.phases()), w = axes.w.phase(i % axes.w.phases());
    if (h.taps * w.taps == 0) continue;
    why = refuse(window_map(p, v, axes, h, w, anywhere, 128));
  }
  return why;
}

std::string supports(const Row& row, const Conv2dProblem& p, const Device&) {
  if (p.C == 0 || p.K == 0) return "no channels";
  if (row.one_tap) {
    const std::string why = refuse_not_one_tap(p);
    if (!why.empty()) return why;
  }
  const View v = view_of(p, row.direction, row.one_tap);
  if (p.G > 1 && v.red % depth_of(p.dtype) != 0) {  // a step would read the next group's channels
    return (v.dgrad ? "K / groups " : "C / groups ") + std::to_string(v.red) + ", no multiple of " +
           std::to_string(depth_of(p.dtype));
  }
  std::string why = refuse_conv_beyond_int(p, 256);
  if (why.empty()) {
    why = refuse_beyond_int(
        {{"batch", p.N},
         {"pixels", v.tiled ? p.N * p.H * p.W : 0},
         {"tiles", (result_pixels(p, v) / 128 + 8) * ceil_div(v.outs, 64) * p.G * 16},
         {"filter rows", 2 * v.outs * p.G + 512}});
  }
  if (!why.empty()) return why;
  const Axes axes = axes_of(p, v);
  if (axes.phases() > kMostPhases) {
    return "stride " + std::to_string(p.stride_h) + " by " + std::to_string(p.stride_w) + ", " +
           std::to_string(axes.phases()) + " phases, more than " + std::to_string(kMostPhases);
  }
  return refuse_maps(p, v, axes);
}

double cost(const Row& row, const Conv2dProblem& p, const Device& device) {
  const View v = view_of(p, row.direction, row.one_tap);
  const Axes axes = axes_of(p, v);
  const int sms = std::max(device.sm_count, 1);
  const double cycles = busy_cycles(p, v, axes, tile_of(p, v, axes, sms), sms);
  // Copies are written and read once more, by kernels of their own.
  double bytes = p.bytes(), launch_us = 3;
  if (v.copy_input) {
    bytes +=
        2.0 * static_cast<double>(p.N * v.height * v.width * v.padded * p.G * size_of(p.dtype));
    launch_us += 2;
  }
  if (v.copy_filter) {
    bytes += 2.0 * static_cast<double>(p.filter_elements() * size_of(p.dtype));
    launch_us += 2;
  }
  if (p.epilogue.statistics) {
    const int64_t tiles = ceil_div(p.N * p.P() * p.Q(), kStatisticsRows);
    bytes += 2.0 * static_cast<double>(statistics_bytes(tiles, p.K));
    launch_us += 4;
  }
  const int64_t partials = partial_bytes(p, v, axes);
  if (partials > 0) {
    bytes += 2.0 * static_cast<double>(partials);
    launch_us += 2;
  }
  return gpu_us(launch_us, bytes, cycles * sms, 1, device) / row.advantage;
}

}  // namespace
}  // namespace cuda

void add_cuda_conv2d_igemm_sm90_rows(KernelTable& table) {
  for (const cuda::Row& igemm : cuda::kRows) {
    Conv2dKernel row = cuda::conv2d_row(igemm.name, igemm.direction);
    row.op = igemm.op;
    row.arch = "sm_90a";
    row.dtypes &= ~bit(DType::kFloat64);
    row.aligned = true;
    row.supports = [&igemm](const Conv2dProblem& p, const Device& device) {
      return cuda::supports(igemm, p, device);
    };
    row.cost = [&igemm](const Conv2dProblem& p, const Device& device) {
      return cuda::cost(igemm, p, device);
    };
    row.workspace = [&igemm](const Conv2dProblem& p, const Device&) {
      return cuda::Workspace(p, cuda::view_of(p, igemm.direction, igemm.one_tap), nullptr).bytes;
    };
    row.launch = [&igemm](const Conv2dProblem& p, const Conv2dArgs& args, const Context& context) {
      cuda::launch(igemm, p, args, context);
    };
    table.conv2d.push_back(std::move(row));
  }
}

}  // namespace fastconv
