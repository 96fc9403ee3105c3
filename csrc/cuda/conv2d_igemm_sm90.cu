// The rows of the Hopper implicit GEMM: what they take, what they cost, and their launches.
#include "cuda/conv2d_igemm_sm90_plan.h"
#include "cuda/table.h"

namespace fastconv {
namespace cuda {
namespace {

using namespace igemm_sm90;

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
  double apart = 0, launch_us = 3;
  if (v.copy_input) {
    apart +=
        2.0 * static_cast<double>(p.N * v.height * v.width * v.padded * p.G * size_of(p.dtype));
    launch_us += 2;
  }
  if (v.copy_filter) {
    apart += 2.0 * static_cast<double>(p.filter_elements() * size_of(p.dtype));
    launch_us += 2;
  }
  if (p.epilogue.statistics) {
    const int64_t tiles = ceil_div(p.N * p.P() * p.Q(), kStatisticsRows);
    apart += 2.0 * static_cast<double>(statistics_bytes(tiles, p.K));
    launch_us += 4;
  }
  const int64_t partials = partial_bytes(p, v, axes);
  if (partials > 0) {
    apart += 2.0 * static_cast<double>(partials);
    launch_us += 2;
  }
  const double us = gpu_us(launch_us, p.bytes(), cycles * sms, 1, device);
  return (us + gpu_us(0, apart, 0, 1, device)) / row.advantage;
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
