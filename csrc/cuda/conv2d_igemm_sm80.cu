// The rows of conv2d_igemm_sm80_kernel.h: what they take, how a problem is cut, what it costs.
//
// Tensors are read in place where channels lie innermost in whole 16-byte units; otherwise a copy
// in the workspace is. Filters of dgrad are always copied, to have the summed K innermost.
#include <string>
#include <vector>

#include "cuda/conv2d_igemm_sm80_kernel.h"
#include "cuda/table.h"

namespace fastconv {
namespace cuda {
namespace {

// Shares of the tensor cores' rate are argued, not measured: shared memory has 128 bytes a cycle,
// of which copies and warps ask for 96 in the large tile, 144 in the tall one, 192 in the small one
// at sm_80's full rate. Barriers, addresses and the epilogue take the rest.
struct TileRow {
  int m, n, blocks;
  double share;
  bool patches;
  int64_t shared_bytes;
};
template <class Tile>
TileRow tile_row(double share) {
  return {Tile::kM, Tile::kN, Tile::kBlocks, share, Tile::kPatches, igemm_shared_bytes<Tile>()};
}
const TileRow kLarge = tile_row<IgemmLarge>(0.6), kTall = tile_row<IgemmTall>(0.5),
              kSmall = tile_row<IgemmSmall>(0.4);

struct IgemmRow {
  const char* name;
  const char* op;
  Direction direction;
  const TileRow& widest;
  bool backward() const { return direction == Direction::kDgrad; }
  // 3xTF32 has no registers for the large tile, nor a use: with three products for each operand it
  // brings, shared memory feeds the tall one as well.
  const TileRow& tile(const Conv2dProblem& p) const {
    return p.dtype == DType::kFloat32 && !p.tf32 && &widest == &kLarge ? kTall : widest;
  }
};
constexpr IgemmRow kRows[] = {
    {"conv2d_igemm_sm80_fprop", "conv2d", Direction::kFprop, kLarge},
    {"conv2d_igemm_sm80_tall_fprop", "conv2d", Direction::kFprop, kTall},
    {"conv2d_igemm_sm80_small_fprop", "conv2d", Direction::kFprop, kSmall},
    {"conv2d_igemm_sm80_dgrad", "conv2d", Direction::kDgrad, kLarge},
    {"conv2d_igemm_sm80_tall_dgrad", "conv2d", Direction::kDgrad, kTall},
    {"conv2d_igemm_sm80_small_dgrad", "conv2d", Direction::kDgrad, kSmall},
    {"conv2d_igemm_sm80_statistics", "conv2d_statistics", Direction::kFprop, kLarge},
    {"conv2d_igemm_sm80_tall_statistics", "conv2d_statistics", Direction::kFprop, kTall},
    {"conv2d_igemm_sm80_small_statistics", "conv2d_statistics", Direction::kFprop, kSmall},
};

// How a problem is cut, for the launch, the workspace and the estimate. Of the problem alone.
struct Cut {
  int64_t red, outs;  // channels summed over and written, a group
  bool patches, copy_source, copy_filter;
  int tap_units_log2;
  int64_t pixel_tiles, out_tiles, tiles;
  int64_t steps;      // of a phase
  double step_share;  // of them, in the average phase: 1x1 at stride 2 has taps in one of four
  int splits;
};

// A step of patches takes about half as long again: 48 single loads a thread, not 8 copies.
constexpr double kPatchPrice = 1.5;

// Splits a sum where the tiles are too few for the GPU: `kFill` blocks are two on each of 128 SMs;
// a block's start and the sums' way through memory want `kLeast` steps.
int splits_of(int64_t tiles, int64_t steps) {
  constexpr int64_t kFill = 256, kLeast = 8;
  return to_int(
      std::max<int64_t>(1, std::min(kFill / std::max<int64_t>(tiles, 1), steps / kLeast)));
}

Cut cut_of(const IgemmRow& row, const Conv2dProblem& p) {
  const bool backward = row.backward();
  const int64_t unit = kPackBytes / size_of(p.dtype);
  const int64_t phases_h = backward ? phases_of(p.stride_h, p.H) : 1;
  const int64_t phases_w = backward ? phases_of(p.stride_w, p.W) : 1;
  const int64_t taps = ceil_div(p.R * p.S, phases_h * phases_w);
  Cut cut = {};
  cut.step_share = static_cast<double>(p.R * p.S) / static_cast<double>(phases_h * phases_w * taps);
  cut.red = (backward ? p.K : p.C) / p.G;
  cut.outs = (backward ? p.C : p.K) / p.G;
  const int64_t units = ceil_div(cut.red, unit);
  cut.tap_units_log2 = std::min(ceil_log2(units), 2);
  cut.steps = ceil_div(taps, kIgemmUnits >> cut.tap_units_log2) *
              ceil_div(units, int64_t{1} << cut.tap_units_log2);
  const int64_t patch_steps = ceil_div(taps * cut.red, unit * kIgemmUnits);
  cut.patches = kPatchPrice * static_cast<double>(patch_steps) < static_cast<double>(cut.steps);
  if (cut.patches) {
    cut.steps = patch_steps;
  } else {
    const bool whole = cut.red % unit == 0;
    const int64_t source_pixels = backward ? p.P() * p.Q() : p.H * p.W;
    cut.copy_source = !whole || (p.layout == Layout::kNCHW && source_pixels != 1);
    cut.copy_filter = !whole || backward || (p.filter_layout == Layout::kNCHW && !p.is_1x1());
    cut.red = padded_channels(cut.red, p.dtype);
  }
  const int64_t positions =
      backward ? ceil_div(p.H, phases_h) * ceil_div(p.W, phases_w) : p.P() * p.Q();
  cut.pixel_tiles = ceil_div(p.N * positions, row.tile(p).m);
  cut.out_tiles = ceil_div(cut.outs, row.tile(p).n);
  cut.tiles = cut.pixel_tiles * cut.out_tiles * p.G * phases_h * phases_w;
  cut.splits = splits_of(cut.tiles, cut.steps);
  return cut;
}

FilterOrder filter_order(const IgemmRow& row) {
  return row.backward() ? FilterOrder::kCRSK : FilterOrder::kKRSC;
}

// What of the workspace is whose.
struct Workspace {
  void *source = nullptr, *filter = nullptr, *split_sums = nullptr, *partials = nullptr;
  size_t bytes;

  Workspace(const IgemmRow& row, const Conv2dProblem& p, const Cut& cut, void* base) {
    WorkspaceCarver carver(base);
    const bool backward = row.backward();
    if (cut.copy_source) {
      source = carver.take(activation_copy_bytes(p.dtype, p.N, backward ? p.K : p.C,
                                                 backward ? p.P() * p.Q() : p.H * p.W, p.G));
    }
    if (cut.copy_filter) filter = carver.take(filter_copy_bytes(p, {filter_order(row)}));
    if (cut.splits > 1) {
      split_sums = carver.take(cut.splits * cut.tiles * row.tile(p).m * row.tile(p).n *
                               static_cast<int64_t>(sizeof(float)));
    }
    if (p.epilogue.statistics) partials = carver.take(statistics_bytes(cut.pixel_tiles, p.K));
    bytes = carver.bytes();
  }
};

std::string supports(const IgemmRow& row, const Conv2dProblem& p, const Device& device) {
  // Tiles of many channels waste nearly all of their work where a group has one.
  if (p.G > 1 && p.C == p.G) return "1 channel a group";
  if (p.G > 1 && p.K == p.G) return "1 filter a group";
  const Cut cut = cut_of(row, p);
  if (cut.patches && !row.tile(p).patches) {
    return std::to_string(cut.red) + (row.backward() ? " filters" : " channels") +
           " a group, which a smaller tile gathers one by one";
  }
  if (row.tile(p).shared_bytes > device.shared_memory_per_block) {
    return std::to_string(row.tile(p).shared_bytes) + " bytes of shared memory";
  }
  constexpr int64_t kPadded = kIgemmUnits * kPackBytes;
  const std::string why = refuse_conv_beyond_int(p, std::max<int64_t>(row.tile(p).m, kPadded));
  if (!why.empty()) return why;
  // An image's and a filter's offsets are int in the main loop; a block is a tile.
  return refuse_beyond_int(
      {{"tiles", cut.tiles * cut.splits},
       {"image elements", (p.H + 2 * p.pad_h) * (p.W + 2 * p.pad_w) * (p.C + p.G * kPadded)},
       {"gradient elements", ((p.R - 1) * p.dil_h / p.stride_h + p.P() + 1) *
                                 ((p.S - 1) * p.dil_w / p.stride_w + p.Q() + 1) *
                                 (p.K + p.G * kPadded)},
       {"copied filter elements", p.C * p.R * p.S * (p.K / p.G + kPadded)},
       {"filter elements", p.R * p.S * (p.C / p.G + kPadded) * (p.K + row.tile(p).n)}});
}

double cost(const IgemmRow& row, const Conv2dProblem& p, const Device& device) {
  constexpr double kLaunch = 3, kNextLaunch = 2;
  const Cut cut = cut_of(row, p);
  const int64_t blocks = cut.tiles * cut.splits;
  const double depth =
      static_cast<double>(ceil_div(cut.steps, cut.splits) * kIgemmRowBytes / size_of(p.dtype));
  const double flops = 2.0 * depth * static_cast<double>(blocks * row.tile(p).m * row.tile(p).n) *
                       whole_waves(device, blocks, row.tile(p).blocks) *
                       (cut.patches ? kPatchPrice : 1) * cut.step_share;
  // Copies and partial sums are written and read.
  const auto moved = static_cast<double>(Workspace(row, p, cut, nullptr).bytes);
  const int more = cut.copy_source + cut.copy_filter + (cut.splits > 1) + p.epilogue.statistics;
  return gpu_us(kLaunch + kNextLaunch * more, p.bytes() + 2 * moved, flops,
                mma_flops(p, device) * row.tile(p).share,
                busy_part(device, blocks, row.tile(p).blocks));
}

IgemmParams params_of(const IgemmRow& row, const Conv2dProblem& p, const Conv2dArgs& args,
                      const Cut& cut, const Workspace& workspace) {
  const bool backward = row.backward();
  const ConvParams conv = conv_params_of(p, args);
  IgemmParams t = {};
  t.source = cut.copy_source ? workspace.source : backward ? args.grad : args.input;
  t.filter = cut.copy_filter ? workspace.filter : args.filter;
  t.target = backward ? dgrad_target(p, args)
                      : fprop_target(p, args, static_cast<float*>(workspace.partials));
  t.split_sums = static_cast<float*>(workspace.split_sums);
  t.dst = backward ? conv.in : conv.res;
  Strides4 src = backward ? conv.res : conv.in, flt = conv.flt;
  if (!cut.patches) {
    src = dense_strides(Layout::kNHWC, p.G * cut.red, backward ? conv.P : conv.H,
                        backward ? conv.Q : conv.W);
    flt = dense_strides(Layout::kNHWC, cut.red, p.R, p.S);
  }
  const bool swapped = backward && cut.patches;  // a copy has the summed channels innermost
  t.src_n = src.n;
  t.src_c = to_int(src.c);
  t.src_h = to_int(src.h);
  t.src_w = to_int(src.w);
  t.flt_red = to_int(swapped ? flt.n : flt.c);
  t.flt_out = to_int(swapped ? flt.c : flt.n);
  t.flt_h = to_int(flt.h);
  t.flt_w = to_int(flt.w);
  t.h = axis_of(backward, conv.H, conv.P, conv.R, conv.stride_h, conv.pad_h, conv.dil_h);
  t.w = axis_of(backward, conv.W, conv.Q, conv.S, conv.stride_w, conv.pad_w, conv.dil_w);
  t.flt_step_h = t.h.tap_step * t.flt_h;
  t.flt_step_w = t.w.tap_step * t.flt_w;
  t.N = p.N;
  t.pixel_tiles = to_int(cut.pixel_tiles);
  t.tiles = to_int(cut.tiles);
  t.G = conv.G;
  t.red = to_int(cut.red);
  t.outs = to_int(cut.outs);
  t.out_tiles = to_int(cut.out_tiles);
  t.tap_units_log2 = cut.tap_units_log2;
  t.splits = cut.splits;
  t.backward = backward;
  return t;
}

void launch(const IgemmRow& row, const Conv2dProblem& p, const Conv2dArgs& args,
            const Context& context) {
  const Cut cut = cut_of(row, p);
  const Workspace workspace(row, p, cut, args.workspace);
  const bool backward = row.backward();
  if (cut.copy_source) {
    copy_activations(row.name, p.dtype, p.layout, backward ? args.grad : args.input,
                     workspace.source, p.N, backward ? p.K : p.C,
                     backward ? p.P() * p.Q() : p.H * p.W, context.stream, p.G);
  }
  if (cut.copy_filter) {
    copy_filter(row.name, p, {filter_order(row)}, args.filter, workspace.filter, context.stream);
  }
  const IgemmParams t = params_of(row, p, args, cut, workspace);
  const IgemmLaunch how = {row.name, row.tile(p).m, row.tile(p).n, cut.patches, context.stream};
  if (p.dtype == DType::kFloat16) {
    launch_igemm<__half>(how, t);
  } else if (p.dtype == DType::kBFloat16) {
    launch_igemm<__nv_bfloat16>(how, t);
  } else if (p.tf32) {
    launch_igemm<ptx::Tf32>(how, t);
  } else {
    launch_igemm<Tf32x3>(how, t);
  }
  if (workspace.partials != nullptr) {
    merge_statistics(row.name, static_cast<const float*>(workspace.partials), cut.pixel_tiles,
                     row.tile(p).m, p.N * p.P() * p.Q(), p.K, static_cast<float*>(args.mean_out),
                     static_cast<float*>(args.var_out), context.stream);
  }
}

}  // namespace
}  // namespace cuda

void add_cuda_conv2d_igemm_sm80_rows(KernelTable& table) {
  for (const cuda::IgemmRow& igemm : cuda::kRows) {
    Conv2dKernel row = cuda::conv2d_row(igemm.name, igemm.direction);
    row.op = igemm.op;
    row.dtypes &= ~bit(DType::kFloat64);
    row.aligned = true;
    row.supports = [&igemm](const Conv2dProblem& p, const Device& device) {
      return cuda::supports(igemm, p, device);
    };
    row.cost = [&igemm](const Conv2dProblem& p, const Device& device) {
      return cuda::cost(igemm, p, device);
    };
    row.workspace = [&igemm](const Conv2dProblem& p, const Device&) {
      return cuda::Workspace(igemm, p, cuda::cut_of(igemm, p), nullptr).bytes;
    };
    row.launch = [&igemm](const Conv2dProblem& p, const Conv2dArgs& args, const Context& context) {
      cuda::launch(igemm, p, args, context);
    };
    table.conv2d.push_back(std::move(row));
  }
}

}  // namespace fastconv
