// Filter gradient on the tensor cores of sm_80 and later: filters by filter positions (r, s, c),
// summed over pixels (n, p, q):
//   dw[k, (r,s,c)] = sum over pixels of dy[pixel, k] * x[pixel at tap (r,s), c]
//
// A 16-byte unit of a pixel's row of columns is channels of one tap, so the tap a thread loads is
// fixed and only the pixel walks on, without a division. Tensors that are not NHWC, or whose groups
// are no whole units, are copied first. Few channels (a stem's three) would waste most of a unit:
// there columns count the channels that exist, and a thread gathers them one by one.
//
// The pixels are split over blocks; their partial sums are added up in order by a second kernel.
#include <string>

#include "cuda/conv2d.h"
#include "cuda/conv2d_igemm_sm80_wgrad.h"
#include "cuda/conv2d_layout.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/table.h"

namespace fastconv {
namespace cuda {
namespace {

// How a thread steps from output pixel to output pixel, as positions and offsets in the input: an
// offset needs a multiplication for each of n, h, w, a step one addition and two where a row or an
// image ends.
struct WalkStep {
  int h, w;
  int64_t offset, next_row, next_image;
};

struct WgradParams {
  ConvParams conv;              // `in` and `res` are the copies' strides where there are copies
  float* partials;              // [split][K][pitch], or null: a block has whole sums
  int64_t in_group, res_group;  // from a group to the next
  int64_t pixels_per_split;
  WalkStep step;
  int row_span, image_span;          // Q * stride_w, P * stride_h
  int k_tiles, column_tiles;         // a group
  int columns, tap_channels, pitch;  // columns a group = R * S * tap_channels; pitch: in fours
};

// One tile of the results and a share of the pixels.
struct TileAt {
  int group, first_k, first_column, split, pixels;
  int64_t begin;  // the first pixel

  __device__ TileAt(const WgradParams& t, int block, int size) {
    first_column = block % t.column_tiles * size;
    block /= t.column_tiles;
    first_k = block % t.k_tiles * size;
    block /= t.k_tiles;
    group = block % t.conv.G;
    split = block / t.conv.G;
    begin = split * t.pixels_per_split;
    pixels = static_cast<int>(min(t.pixels_per_split, t.conv.pixels - begin));
  }
};

struct Tap {
  int r, s, c;
};
__device__ inline Tap tap_at(const WgradParams& t, int column) {
  const int tap = column / t.tap_channels, r = tap / t.conv.S;
  return {r, tap - r * t.conv.S, column - tap * t.tap_channels};
}

// A column's place in the input, relative to tap (0, 0) of a window that no padding shifts.
struct alignas(16) Reach {
  int h, w;
  int64_t offset;

  __device__ Reach(const WgradParams& t, int column) {
    constexpr int kNowhere = -(1 << 30);  // outside whatever the pixel: h + kNowhere < 0
    const ConvParams& conv = t.conv;
    const Tap tap = tap_at(t, column);
    h = tap.r * conv.dil_h - conv.pad_h;
    w = tap.s * conv.dil_w - conv.pad_w;
    offset = h * conv.in.h + w * conv.in.w + tap.c * conv.in.c;
    if (column >= t.columns) h = kNowhere;
  }
};

// The window of an output pixel as a thread walks over them, WalkStep by WalkStep.
struct Window {
  int h, w;
  int64_t offset;

  __device__ Window(const WgradParams& t, int64_t index) {
    const Pixel pixel = pixel_at(index, t.conv.P, t.conv.Q);
    h = pixel.row * t.conv.stride_h;
    w = pixel.col * t.conv.stride_w;
    offset = cuda::offset_of(t.conv.in, {pixel.n, h, w});
  }
  __device__ void advance(const WgradParams& t) {
    w += t.step.w;
    h += t.step.h;
    offset += t.step.offset;
    if (w >= t.row_span) {
      w -= t.row_span;
      h += t.conv.stride_h;
      offset += t.step.next_row;
    }
    if (h >= t.image_span) {
      h -= t.image_span;
      offset += t.step.next_image;
    }
  }
  __device__ bool holds(const Reach& reach, const ConvParams& conv) const {
    return within(h + reach.h, conv.H) && within(w + reach.w, conv.W);
  }
};

// Both tiles of a stage by cp.async: a thread has one unit of a row of each, and every kRows-th row
// from its first on.
template <class Tile>
struct UnitLoader {
  using T = typename Tile::T;
  static constexpr int kRows = Tile::kThreads / Tile::kUnits;  // threads reach at a time
  static_assert(Tile::kDepth % kRows == 0 && kRows % 8 == 0, "and the swizzle is the same in each");

  const WgradParams& t;
  int row, to, left;  // left: pixels from this thread's on
  bool filters;       // whether the unit's exist

  const T* grad;
  __device__ UnitLoader(const WgradParams& params, const TileAt& at) : t(params) {
    const int unit = static_cast<int>(threadIdx.x) % Tile::kUnits;
    row = static_cast<int>(threadIdx.x) / Tile::kUnits;
    to = Tile::offset_of(row, unit);
    left = at.pixels - row;
    const int k = at.first_k + unit * Tile::kPack;
    filters = k < t.conv.k_per_group;
    grad = static_cast<const T*>(t.conv.grad) + at.group * t.res_group +
           (at.begin + row) * t.conv.res.w + k;
  }
  __device__ void load_grad(const Tile& tile, int stage) {
    const T* from = grad;
#pragma unroll
    for (int pass = 0; pass < Tile::kDepth; pass += kRows) {
      ptx::cp_async<16>(ptx::shared_address(tile.grad(stage) + to + pass * Tile::kRowBytes), from,
                        filters && left > pass ? 16 : 0);
      from += kRows * t.conv.res.w;
    }
  }
  __device__ void next() {
    grad += Tile::kDepth * t.conv.res.w;
    left -= Tile::kDepth;
  }
};

template <class Tile>
struct ColumnUnits {
  using T = typename Tile::T;
  static constexpr int kRows = UnitLoader<Tile>::kRows;
  static constexpr int kStep = kRows;  // pixels a WalkStep

  const WgradParams& t;
  const Reach reach;
  const T* input;
  Window window;

  __device__ ColumnUnits(const WgradParams& params, const TileAt& at, Reach*)
      : t(params),
        reach(t, at.first_column + static_cast<int>(threadIdx.x) % Tile::kUnits * Tile::kPack),
        input(static_cast<const T*>(t.conv.input) + at.group * t.in_group + reach.offset),
        window(t, at.begin + static_cast<int>(threadIdx.x) / Tile::kUnits) {}

  __device__ void load(const Tile& tile, int stage, int to, int left) {
#pragma unroll
    for (int pass = 0; pass < Tile::kDepth; pass += kRows) {
      const bool inside = left > pass && window.holds(reach, t.conv);
      ptx::cp_async<16>(ptx::shared_address(tile.columns(stage) + to + pass * Tile::kRowBytes),
                        input + window.offset, inside ? 16 : 0);
      window.advance(t);
    }
  }
  __device__ void store(const Tile&, int) {}
};

// The columns' tile value by value: a thread has one pixel of a stage and kPacks units of it, which
// wait in registers while the tensor cores work.
template <class Tile>
struct ColumnPatches {
  using T = typename Tile::T;
  static constexpr int kStep = Tile::kDepth;
  static constexpr int kPacks = Tile::kDepth * Tile::kUnits / Tile::kThreads;
  static_assert(kPacks * Tile::kThreads == Tile::kDepth * Tile::kUnits, "whole units a thread");

  const WgradParams& t;
  const Reach* reaches;
  int row, first;  // the pixel and the first column
  int left;
  Window window;
  Pack<T, Tile::kPack> packs[kPacks];

  __device__ ColumnPatches(const WgradParams& params, const TileAt& at, Reach* table)
      : t(params),
        reaches(table),
        row(static_cast<int>(threadIdx.x) % Tile::kDepth),
        first(static_cast<int>(threadIdx.x) / Tile::kDepth * kPacks * Tile::kPack),
        left(at.pixels - row),
        window(t, at.begin + row) {
    if (threadIdx.x < Tile::kSize) {
      const int column = static_cast<int>(threadIdx.x);
      table[column] = Reach(t, at.first_column + column);
    }
    __syncthreads();
  }
  __device__ void load(const Tile&, int, int, int) {
    const T* input = static_cast<const T*>(t.conv.input) + window.offset;
#pragma unroll
    for (int e = 0; e < kPacks * Tile::kPack; ++e) {
      const Reach reach = reaches[first + e];
      T value = narrow<T>(0);
      if (left > 0 && window.holds(reach, t.conv)) value = input[reach.offset];
      packs[e / Tile::kPack].at[e % Tile::kPack] = value;
    }
    window.advance(t);
    left -= Tile::kDepth;
  }
  __device__ void store(const Tile& tile, int stage) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int at = Tile::offset_of(row, first / Tile::kPack + i);
      store_pack(reinterpret_cast<T*>(tile.columns(stage) + at), packs[i]);
    }
  }
};

template <class Tile>
__device__ inline void fold(typename Tile::Sums& total, typename Tile::Sums& sum) {
#pragma unroll
  for (int i = 0; i < Tile::kMmaM; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kMmaN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        total[i][j][e] += sum[i][j][e];
        sum[i][j][e] = 0;
      }
    }
  }
}

// A thread's results: into the split's partial sums, or rounded into the filter.
template <class Tile>
__device__ inline void store_results(const WgradParams& t, const TileAt& at, const WgradWarp& warp,
                                     const typename Tile::Sums& sum) {
  using T = typename Tile::T;
  const ConvParams& conv = t.conv;
  for_each_neighbours<Tile>(sum, warp, [&](int row, int col, const auto& neighbours) {
    constexpr int kCount = sizeof(neighbours) / sizeof(float);
    const int k = at.first_k + row, column = at.first_column + col;
    if (k >= conv.k_per_group || column >= t.pitch) return;
    const int filter = at.group * conv.k_per_group + k;
    if (t.partials != nullptr) {
      const int64_t plane = int64_t{conv.G} * conv.k_per_group;
      store_pack(t.partials + (at.split * plane + filter) * t.pitch + column, neighbours);
      return;
    }
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      const Tap tap = tap_at(t, column + e);
      if (column + e >= t.columns || tap.c >= conv.c_per_group) continue;
      static_cast<T*>(conv.out)[filter * conv.flt.n + tap.c * conv.flt.c + tap.r * conv.flt.h +
                                tap.s * conv.flt.w] = narrow<T>(neighbours.at[e]);
    }
  });
}

// 128 x 128: two blocks share an SM where threads may have 255 registers (16-bit: 128 threads);
// with 256 threads one has it alone.
template <class Tile>
constexpr int kBlocks = Tile::kSize == 64 ? 3
                        : Tile::kIs16Bit  ? 2
                                          : 1;

template <class Tile, template <class> class Columns>
__global__ void __launch_bounds__(Tile::kThreads, kBlocks<Tile>)
    conv2d_igemm_sm80_wgrad_kernel(const WgradParams t) {
  SharedCarver carve(shared_memory());
  const Tile tile(carve);
  Reach* reaches = carve.take<Reach>(Tile::kSize);
  const TileAt at(t, static_cast<int>(blockIdx.x), Tile::kSize);
  const WgradWarp warp = WgradWarp::of_thread<Tile>();
  UnitLoader<Tile> units(t, at);
  Columns<Tile> columns(t, at, reaches);
  const int steps = (at.pixels + Tile::kDepth - 1) / Tile::kDepth;

  const auto load = [&](int step) {
    if (step < steps) {
      units.load_grad(tile, step % Tile::kStages);
      columns.load(tile, step % Tile::kStages, units.to, units.left);
      units.next();
    }
    ptx::cp_async_commit();  // empty at the end, so that the wait's count stays right
  };
  for (int step = 0; step < Tile::kStages - 1; ++step) {
    load(step);
    if (step < steps) columns.store(tile, step);
  }
  typename Tile::Sums sum = {}, total = {};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // the stage has landed for all, and the next one to be filled has been read
    const int further = step + Tile::kStages - 1;
    load(further);
    multiply_stage(tile, step % Tile::kStages, warp, sum);
    if (further < steps) columns.store(tile, further % Tile::kStages);
    if constexpr (Tile::kFold > 0) {
      if (step % Tile::kFold == Tile::kFold - 1 || step + 1 == steps) fold<Tile>(total, sum);
    }
  }
  ptx::cp_async_wait<0>();
  if constexpr (Tile::kFold > 0) {
    store_results<Tile>(t, at, warp, total);
  } else {
    store_results<Tile>(t, at, warp, sum);
  }
}

// Partial sums of each filter position, added up in ascending order. They lie column by column, the
// filter in its own layout: the one scattered access is here, once, and not in each split.
constexpr int kReduceThreads = 128;

template <class T>
__global__ void __launch_bounds__(kReduceThreads)
    conv2d_igemm_sm80_wgrad_reduce_kernel(const WgradParams t, int splits) {
  const ConvParams& conv = t.conv;
  const int64_t plane = int64_t{conv.G} * conv.k_per_group * t.pitch;
  for (int64_t i = blockIdx.x * int64_t{kReduceThreads} + threadIdx.x; i < plane;
       i += gridDim.x * int64_t{kReduceThreads}) {
    const Division filter = divide(i, t.pitch);
    const Tap tap = tap_at(t, filter.remainder);
    if (filter.remainder >= t.columns || tap.c >= conv.c_per_group) continue;
    float sum = 0;
#pragma unroll 8  // eight loads in flight; the additions stay in order
    for (int s = 0; s < splits; ++s) sum += t.partials[s * plane + i];
    static_cast<T*>(conv.out)[filter.quotient * conv.flt.n + tap.c * conv.flt.c +
                              tap.r * conv.flt.h + tap.s * conv.flt.w] = narrow<T>(sum);
  }
}

// ---- host ----

constexpr const char* kName = "conv2d_igemm_sm80_wgrad";
constexpr int64_t kLeastGroup = 8;  // channels and filters: of fewer most of a tile is empty

// An operand where the kernel reads it: the tensor, or a copy with each group's channels padded to
// whole units.
struct Operand {
  bool copied;
  int64_t channels, pixels;  // of all groups; of an image

  Operand(const Conv2dProblem& p, int64_t all_channels, int64_t image)
      : copied(p.layout == Layout::kNCHW ||
               padded_channels(all_channels / p.G, p.dtype) * p.G != all_channels),
        channels(all_channels),
        pixels(image) {}

  int64_t copy_bytes(const Conv2dProblem& p) const {
    return copied ? activation_copy_bytes(p.dtype, p.N, channels, pixels, p.G) : 0;
  }
  const void* place(const Conv2dProblem& p, const void* from, void* to, void* stream) const {
    if (!copied) return from;
    copy_activations(kName, p.dtype, p.layout, from, to, p.N, channels, pixels, stream, p.G);
    return to;
  }
  Strides4 strides(const Conv2dProblem& p, int64_t rows, int64_t cols) const {
    return dense_strides(Layout::kNHWC, padded_channels(channels / p.G, p.dtype) * p.G, rows, cols);
  }
};

// How a problem is cut into tiles, for the launch and for the estimate.
struct Plan {
  int size;
  bool patches;
  int64_t tap_channels, columns, pitch, k_tiles, column_tiles;
  int64_t tiles;  // of all groups
  Split split;
  Operand input, grad;
  size_t partial_bytes;

  int64_t blocks() const { return tiles * split.splits; }
};

bool takes_patches(const Conv2dProblem& p) {
  return 2 * padded_channels(p.C / p.G, p.dtype) > 3 * (p.C / p.G);
}

// Blocks fill 132 SMs with two each about twice; a block's partial tile is not to cost more than
// reading its operands. Chains bound float32's error, and what a tensor core truncates: 2^-24 for
// each of 1024 additions of 16 products is 1/8 of float16's rounding.
Split split_of(const Conv2dProblem& p, int size, int64_t tiles, int64_t results) {
  constexpr int64_t kFill = 512, kBudget = 64 << 20;
  const int64_t least = 2 * size, chain = size_of(p.dtype) == 2 ? 16384 : 8192;
  const int64_t pixels = p.N * p.P() * p.Q();
  const int64_t fill = ceil_div(kFill, std::max<int64_t>(tiles, 1));
  const int64_t affordable = std::max(fill, kBudget / std::max<int64_t>(results * 4, 1));
  int64_t splits = std::min(std::max(fill, ceil_div(pixels, chain)), affordable);
  splits = std::max<int64_t>(1, std::min(splits, pixels / least));
  const int64_t each = ceil_div(pixels, splits);
  return {to_int(std::max<int64_t>(1, ceil_div(pixels, each))), each};
}

Plan plan_with(const Conv2dProblem& p, int size, bool patches) {
  Plan plan = {size, patches, 0, 0, 0, 0, 0, 0, {}, {p, p.C, p.H * p.W}, {p, p.K, p.P() * p.Q()},
               0};
  if (patches) plan.input.copied = false;
  plan.tap_channels = patches ? p.C / p.G : padded_channels(p.C / p.G, p.dtype);
  plan.columns = p.R * p.S * plan.tap_channels;
  plan.pitch = ceil_div(plan.columns, 4) * 4;
  plan.k_tiles = ceil_div(p.K / p.G, size);
  plan.column_tiles = ceil_div(plan.columns, size);
  plan.tiles = plan.k_tiles * plan.column_tiles * p.G;
  plan.split = split_of(p, size, plan.tiles, p.K * plan.pitch);
  if (plan.split.splits > 1) {
    plan.partial_bytes = static_cast<size_t>(plan.split.splits * p.K * plan.pitch * 4);
  }
  return plan;
}

// Microseconds of a plan. mma.sync reaches 1024 16-bit multiply-adds a cycle and SM on sm_80, and
// about 60 % of wgmma's 2048 on sm_90; TF32 half of that, 3xTF32 a third of TF32 and its sums.
double cost_of(const Plan& plan, const Conv2dProblem& p, const Device& device) {
  const bool is_16bit = size_of(p.dtype) == 2;
  const double peak = device.sm_arch >= 90 ? 1228 : 1024;
  const double rate = peak * (is_16bit ? 1 : p.tf32 ? 0.5 : 0.15);
  // What the main loop reaches: the small tile is bound by shared memory and L2 (32 flops a byte,
  // half of the large tile's), patches by the instructions that gather them.
  const double share = plan.patches ? 0.25 : plan.size == 64 ? 0.4 : 0.65;
  const double flops = 2.0 * static_cast<double>(plan.tiles * plan.size * plan.size) *
                       static_cast<double>(p.N * p.P() * p.Q());
  const int64_t copies = plan.input.copy_bytes(p) + plan.grad.copy_bytes(p);
  const int launches =
      1 + (plan.split.splits > 1) + (plan.input.copied ? 1 : 0) + (plan.grad.copied ? 1 : 0);
  // Partial sums and copies are written once and read once.
  const double bytes =
      p.bytes() + 2.0 * static_cast<double>(plan.partial_bytes) + 2.0 * static_cast<double>(copies);
  return gpu_us(3.0 * launches, bytes, flops, 2 * rate * share,
                busy_part(device, plan.blocks(), plan.size == 128 && !is_16bit ? 1 : 2));
}

// The cheaper tile on a card of 108 SMs, so that the problem alone decides.
Plan plan_of(const Conv2dProblem& p) {
  if (takes_patches(p)) return plan_with(p, 64, true);
  Device a100;
  a100.sm_arch = 80;
  a100.sm_count = 108;
  const Plan small = plan_with(p, 64, false), large = plan_with(p, 128, false);
  return cost_of(large, p, a100) <= cost_of(small, p, a100) ? large : small;
}

template <class Tile>
int64_t shared_bytes() {
  SharedCarver carve;
  Tile{carve};
  carve.take<Reach>(Tile::kSize);
  return carve.bytes();
}

WalkStep walk_step(const Conv2dProblem& p, const ConvParams& conv, int64_t pixels) {
  const PixelStep by = pixel_step(pixels, conv.P, conv.Q);
  WalkStep step = {};
  step.h = by.row * conv.stride_h;
  step.w = by.col * conv.stride_w;
  step.offset = by.n * conv.in.n + step.h * conv.in.h + step.w * conv.in.w;
  step.next_row = p.stride_h * conv.in.h - p.Q() * p.stride_w * conv.in.w;
  step.next_image = conv.in.n - p.P() * p.stride_h * conv.in.h;
  return step;
}

template <class Tile, template <class> class Columns>
void launch_tile(const Conv2dProblem& p, WgradParams t, int64_t blocks, void* stream) {
  t.step = walk_step(p, t.conv, Columns<Tile>::kStep);
  launch_kernel({kName, blocks, Tile::kThreads, stream, shared_bytes<Tile>()},
                &conv2d_igemm_sm80_wgrad_kernel<Tile, Columns>, t);
}

template <class T, int kTerms>
void launch_mode(const Plan& plan, const Conv2dProblem& p, const WgradParams& t, void* stream) {
  if (plan.patches) {
    launch_tile<WgradTile<T, 64, kTerms>, ColumnPatches>(p, t, plan.blocks(), stream);
  } else if (plan.size == 64) {
    launch_tile<WgradTile<T, 64, kTerms>, ColumnUnits>(p, t, plan.blocks(), stream);
  } else {
    launch_tile<WgradTile<T, 128, kTerms>, ColumnUnits>(p, t, plan.blocks(), stream);
  }
}

template <class T>
void launch_type(const Plan& plan, const Conv2dProblem& p, const WgradParams& t, void* stream) {
  if constexpr (sizeof(T) == 2) {
    launch_mode<T, 1>(plan, p, t, stream);
  } else if (p.tf32) {
    launch_mode<T, 1>(plan, p, t, stream);
  } else {
    launch_mode<T, 3>(plan, p, t, stream);
  }
  if (t.partials != nullptr) {
    launch_kernel({kName, blocks_for(p.K * t.pitch, kReduceThreads), kReduceThreads, stream},
                  &conv2d_igemm_sm80_wgrad_reduce_kernel<T>, t, plan.split.splits);
  }
}

// The workspace: partial sums, the input's copy, the gradient's.
struct Workspace {
  void *partials, *input, *grad;
  size_t bytes;

  Workspace(const Plan& plan, const Conv2dProblem& p, void* base) {
    WorkspaceCarver carve(base);
    partials = carve.take(static_cast<int64_t>(plan.partial_bytes));
    input = carve.take(plan.input.copy_bytes(p));
    grad = carve.take(plan.grad.copy_bytes(p));
    bytes = carve.bytes();
  }
};

void launch(const Conv2dProblem& p, const Conv2dArgs& args, const Context& context) {
  const Plan plan = plan_of(p);
  const Workspace workspace(plan, p, args.workspace);
  WgradParams t = {};
  t.conv = conv_params_of(p, args);
  t.conv.input = plan.input.place(p, args.input, workspace.input, context.stream);
  t.conv.grad = plan.grad.place(p, args.grad, workspace.grad, context.stream);
  if (!plan.patches) t.conv.in = plan.input.strides(p, p.H, p.W);
  t.conv.res = plan.grad.strides(p, p.P(), p.Q());
  t.in_group = plan.tap_channels * t.conv.in.c;
  t.res_group = padded_channels(p.K / p.G, p.dtype);
  t.partials = plan.split.splits > 1 ? static_cast<float*>(workspace.partials) : nullptr;
  t.pixels_per_split = plan.split.items_per_split;
  t.row_span = to_int(p.Q() * p.stride_w);
  t.image_span = to_int(p.P() * p.stride_h);
  t.k_tiles = to_int(plan.k_tiles);
  t.column_tiles = to_int(plan.column_tiles);
  t.columns = to_int(plan.columns);
  t.tap_channels = to_int(plan.tap_channels);
  t.pitch = to_int(plan.pitch);
  switch (p.dtype) {
    case DType::kFloat16:
      return launch_type<__half>(plan, p, t, context.stream);
    case DType::kBFloat16:
      return launch_type<__nv_bfloat16>(plan, p, t, context.stream);
    default:
      return launch_type<float>(plan, p, t, context.stream);
  }
}

std::string refuse(const Conv2dProblem& p, const Device& device) {
  const int64_t channels = p.C / p.G, filters = p.K / p.G;
  if (p.G > 1 && channels < kLeastGroup) return std::to_string(channels) + " channels a group";
  if (p.G > 1 && filters < kLeastGroup) return std::to_string(filters) + " filters a group";
  const int64_t bytes = shared_bytes<WgradTile<float, 128>>();
  if (bytes > device.shared_memory_per_block) {
    return std::to_string(bytes) + " bytes of shared memory";
  }
  const std::string why = refuse_conv_beyond_int(p, 128);
  if (!why.empty()) return why;
  const Plan plan = plan_of(p);
  return refuse_beyond_int({{"blocks", plan.blocks()},
                            {"windows' height", p.P() * p.stride_h * 2 + p.R * p.dil_h},
                            {"windows' width", p.Q() * p.stride_w * 2 + p.S * p.dil_w},
                            {"pixels a block", plan.split.items_per_split + 128}});
}

}  // namespace
}  // namespace cuda

void add_cuda_conv2d_igemm_sm80_wgrad_rows(KernelTable& table) {
  Conv2dKernel row = cuda::conv2d_row(cuda::kName, Direction::kWgrad);
  row.dtypes = bit(DType::kFloat32) | bit(DType::kFloat16) | bit(DType::kBFloat16);
  row.aligned = true;
  row.supports = cuda::refuse;
  row.cost = [](const Conv2dProblem& p, const Device& device) {
    return cuda::cost_of(cuda::plan_of(p), p, device);
  };
  row.workspace = [](const Conv2dProblem& p, const Device&) {
    return cuda::Workspace(cuda::plan_of(p), p, nullptr).bytes;
  };
  row.launch = cuda::launch;
  table.conv2d.push_back(std::move(row));
}

}  // namespace fastconv
