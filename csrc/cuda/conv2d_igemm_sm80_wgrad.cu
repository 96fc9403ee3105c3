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

#include "cuda/conv2d_igemm_sm80_wgrad.h"
#include "cuda/conv2d_igemm_sm80_wgrad_load.h"
#include "cuda/conv2d_layout.h"
#include "cuda/table.h"

namespace fastconv {
namespace cuda {
namespace {

using namespace sm80_wgrad;

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

template <class Tile>
__device__ inline const typename Tile::Sums& choose_sums(const typename Tile::Sums& sum,
                                                         const typename Tile::Sums& total) {
  if constexpr (Tile::kFold > 0) return total;
  return sum;
}

// Offsets of the tile's columns in a filter, for results that are stored at once; -1: no such
// column.
template <class Tile>
__device__ inline void find_offsets(const WgradParams& t, const TileAt& at, int64_t* offsets) {
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kN; i += Tile::kThreads) {
    const Tap tap = tap_at(t, at.first_column + i);
    const bool exists = at.first_column + i < t.columns && tap.c < t.conv.c_per_group;
    offsets[i] = exists ? tap.c * t.conv.flt.c + tap.r * t.conv.flt.h + tap.s * t.conv.flt.w : -1;
  }
}

// A thread's results: into the split's partial sums, or rounded into the filter.
template <class Tile>
__device__ inline void store_results(const WgradParams& t, const TileAt& at, const WgradWarp& warp,
                                     const int64_t* offsets, const typename Tile::Sums& sum) {
  using T = typename Tile::T;
  const int filters = t.conv.G * t.conv.k_per_group;
  const int first_k = at.group * t.conv.k_per_group + at.first_k;
  const int rows = t.conv.k_per_group - at.first_k, cols = t.pitch - at.first_column;
  float* partials =
      t.partials + (int64_t{at.split} * filters + first_k) * t.pitch + at.first_column;
  T* out = static_cast<T*>(t.conv.out) + first_k * t.conv.flt.n;
  for_each_four<Tile>(sum, warp, [&](int row, int col, const Pack<float, 4>& four) {
    if (row >= rows || col >= cols) return;
    if (t.partials != nullptr) {
      store_pack(partials + int64_t{row} * t.pitch + col, four);
      return;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t offset = offsets[col + e];
      if (offset >= 0) out[row * t.conv.flt.n + offset] = narrow<T>(four.at[e]);
    }
  });
}

// A block's shared memory.
template <class Tile, class Columns>
struct WgradShared {
  Tile tile;
  int64_t* offsets;
  Reach* reaches;

  FASTCONV_HOST_DEVICE explicit WgradShared(SharedCarver& carve)
      : tile(carve),
        offsets(carve.take<int64_t>(Tile::kN)),
        reaches(carve.take<Reach>(Columns::kReaches)) {}
};

// Two blocks share an SM where 128 threads may have 255 registers each, three of the smallest tile;
// with 256 threads one has it alone.
template <class Tile>
constexpr int kBlocks = Tile::kM + Tile::kN == 128 ? 3
                        : Tile::kThreads == 128    ? 2
                                                   : 1;

template <class Tile, template <class> class ColumnsOf>
__global__ void __launch_bounds__(Tile::kThreads, kBlocks<Tile>)
    conv2d_igemm_sm80_wgrad_kernel(const WgradParams t) {
  using Columns = ColumnsOf<Tile>;
  SharedCarver carve(shared_memory());
  const WgradShared<Tile, Columns> shared(carve);
  const Tile& tile = shared.tile;
  const TileAt at(t, static_cast<int>(blockIdx.x), Tile::kM, Tile::kN);
  const WgradWarp warp = WgradWarp::of_thread<Tile>();
  GradUnits<Tile> grad(t, at);
  Columns columns(t, at, shared.reaches);
  find_offsets<Tile>(t, at, shared.offsets);
  __syncthreads();
  const int steps = (at.pixels + Tile::kDepth - 1) / Tile::kDepth;

  // Past the last step they fill stages that nobody reads with zeros: a branch would keep their
  // arithmetic apart from the tensor cores'.
  const auto load = [&](int step) {
    grad.load(tile.grad(step % Tile::kStages));
    columns.load(tile.columns(step % Tile::kStages));
    ptx::cp_async_commit();
  };
  const auto store = [&](int step) { columns.store(tile.columns(step % Tile::kStages)); };
  for (int step = 0; step < Tile::kStages - 1; ++step) {
    load(step);
    store(step);
  }
  typename Tile::Sums sum = {}, total = {};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // the stage has landed for all, and the next one to be filled has been read
    // Gathers need all the time they can get; addresses are found while the tensor cores work.
    if constexpr (Columns::kGathers) load(step + Tile::kStages - 1);
    multiply_stage(tile, step % Tile::kStages, warp, sum, [&] {
      if constexpr (!Columns::kGathers) load(step + Tile::kStages - 1);
    });
    store(step + Tile::kStages - 1);
    if constexpr (Tile::kFold > 0) {
      if (step % Tile::kFold == Tile::kFold - 1 || step + 1 == steps) fold<Tile>(total, sum);
    }
  }
  ptx::cp_async_wait<0>();
  store_results<Tile>(t, at, warp, shared.offsets, choose_sums<Tile>(sum, total));
}

// Partial sums of each filter position, added up in an order that the number of splits decides.
// They lie column by column, the filter in its own layout: the one scattered access is here, once,
// and not in each split. Many splits are divided into kParts, since one thread would wait for
// memory splits / 8 times in a row: 64 filters by 64 channels may have 500 of them.
constexpr int kReduceThreads = 256, kParts = 8;
FASTCONV_HOST_DEVICE constexpr int parts_of(int splits) {
  return splits >= 4 * kParts ? kParts : 1;
}

template <class T>
__global__ void __launch_bounds__(kReduceThreads)
    conv2d_reduce_columns_kernel(const WgradParams t, int splits) {
  SharedCarver carve(shared_memory());
  float* sums = carve.take<float>(kReduceThreads);
  const ConvParams& conv = t.conv;
  const int64_t plane = int64_t{conv.G} * conv.k_per_group * t.pitch;
  const int parts = parts_of(splits), lanes = kReduceThreads / parts;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % lanes, part = thread / lanes;
  const int each = (splits + parts - 1) / parts;
  const int begin = part * each, end = min(begin + each, splits);
  for (int64_t first = blockIdx.x * int64_t{lanes}; first < plane;
       first += gridDim.x * int64_t{lanes}) {
    const int64_t i = first + lane;
    float sum = 0;
    if (i < plane) {
#pragma unroll 8  // eight loads in flight; the additions stay in order
      for (int s = begin; s < end; ++s) sum += t.partials[s * plane + i];
    }
    sums[thread] = sum;
    __syncthreads();
    if (part == 0 && i < plane) {
      for (int other = 1; other < parts; ++other) sum += sums[other * lanes + lane];
      const Division filter = divide(i, t.pitch);
      const Tap tap = tap_at(t, filter.remainder);
      if (filter.remainder < t.columns && tap.c < conv.c_per_group) {
        static_cast<T*>(conv.out)[filter.quotient * conv.flt.n + tap.c * conv.flt.c +
                                  tap.r * conv.flt.h + tap.s * conv.flt.w] = narrow<T>(sum);
      }
    }
    __syncthreads();
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

// What there are kernels for. share: of the tensor cores' rate that the main loop reaches; a tile
// takes kM * kN / (kM + kN) 16-bit multiply-adds for a byte from L2, 32, 43 or 64 of them.
struct TileSize {
  int m, n;
  double share;
};
constexpr TileSize kTiles[] = {{64, 64, 0.4}, {64, 128, 0.52}, {128, 64, 0.52}, {128, 128, 0.65}};
constexpr TileSize kPatches = {64, 64, 0.25};  // bound by the instructions that gather

// How a problem is cut into tiles, for the launch and for the estimate.
struct Plan {
  TileSize tile;
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

// Blocks fill 132 SMs with two each about twice. Writing and reading a block's partial tile is not
// to cost more than reading its operands. Chains bound float32's error, and what a tensor core
// truncates: 2^-24 for each of 1024 additions of 16 products is 1/8 of float16's rounding.
Split split_of(const Conv2dProblem& p, const TileSize& tile, int64_t tiles, int64_t results) {
  constexpr int64_t kFill = 512, kBudget = 64 << 20;
  const int64_t least = 4 * tile.m * tile.n / (tile.m + tile.n);
  const int64_t chain = size_of(p.dtype) == 2 ? 16384 : 8192;
  const int64_t pixels = p.N * p.P() * p.Q();
  const int64_t fill = ceil_div(kFill, std::max<int64_t>(tiles, 1));
  const int64_t affordable = std::max(fill, kBudget / std::max<int64_t>(results * 4, 1));
  int64_t splits = std::min(std::max(fill, ceil_div(pixels, chain)), affordable);
  splits = std::max<int64_t>(1, std::min(splits, pixels / least));
  const int64_t each = std::max<int64_t>(1, ceil_div(pixels, splits));
  return {to_int(std::max<int64_t>(1, ceil_div(pixels, each))), each};
}

Plan plan_with(const Conv2dProblem& p, const TileSize& tile, bool patches) {
  Plan plan = {tile, patches, 0, 0, 0, 0, 0, 0, {}, {p, p.C, p.H * p.W}, {p, p.K, p.P() * p.Q()},
               0};
  if (patches) plan.input.copied = false;
  plan.tap_channels = patches ? p.C / p.G : padded_channels(p.C / p.G, p.dtype);
  plan.columns = p.R * p.S * plan.tap_channels;
  plan.pitch = ceil_div(plan.columns, 4) * 4;
  plan.k_tiles = ceil_div(p.K / p.G, tile.m);
  plan.column_tiles = ceil_div(plan.columns, tile.n);
  plan.tiles = plan.k_tiles * plan.column_tiles * p.G;
  plan.split = split_of(p, tile, plan.tiles, p.K * plan.pitch);
  if (plan.split.splits > 1) {
    plan.partial_bytes = static_cast<size_t>(plan.split.splits * p.K * plan.pitch * 4);
  }
  return plan;
}

// Microseconds of a plan.
double cost_of(const Plan& plan, const Conv2dProblem& p, const Device& device) {
  const bool alone = size_of(p.dtype) == 4 && plan.tile.m + plan.tile.n == 256;  // kBlocks
  const int a_sm = alone ? 1 : 2;
  const double flops = 2.0 * static_cast<double>(plan.tiles * plan.tile.m * plan.tile.n) *
                       static_cast<double>(p.N * p.P() * p.Q()) *
                       whole_waves(device, plan.blocks(), a_sm);
  // Partial sums and copies are written once and read once.
  const int64_t copies = plan.input.copy_bytes(p) + plan.grad.copy_bytes(p);
  const double bytes =
      p.bytes() + 2.0 * static_cast<double>(plan.partial_bytes) + 2.0 * static_cast<double>(copies);
  const int more =
      (plan.split.splits > 1 ? 1 : 0) + (plan.input.copied ? 1 : 0) + (plan.grad.copied ? 1 : 0);
  return gpu_us(3 + 1.5 * more, bytes, flops, mma_flops(p, device) * plan.tile.share,
                busy_part(device, plan.blocks(), a_sm));
}

// The cheapest tile on a card of 108 SMs, so that the problem alone decides.
Plan plan_of(const Conv2dProblem& p) {
  if (takes_patches(p)) return plan_with(p, kPatches, true);
  Device a100;
  a100.sm_arch = 80;
  a100.sm_count = 108;
  Plan best = plan_with(p, kTiles[0], false);
  for (const TileSize& tile : kTiles) {
    const Plan plan = plan_with(p, tile, false);
    if (cost_of(plan, p, a100) < cost_of(best, p, a100)) best = plan;
  }
  return best;
}

template <class Tile, template <class> class Columns>
int64_t shared_bytes() {
  SharedCarver carve;
  WgradShared<Tile, Columns<Tile>>{carve};
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
  t.step = walk_step(p, t.conv, Columns<Tile>::kPixels);
  launch_kernel({kName, blocks, Tile::kThreads, stream, shared_bytes<Tile, Columns>()},
                &conv2d_igemm_sm80_wgrad_kernel<Tile, Columns>, t);
}

template <class T, int kTerms>
void launch_mode(const Plan& plan, const Conv2dProblem& p, const WgradParams& t, void* stream) {
  if (plan.patches) {
    launch_tile<WgradTile<T, 64, 64, kTerms>, ColumnPatches>(p, t, plan.blocks(), stream);
  } else if (plan.tile.m == 64 && plan.tile.n == 64) {
    launch_tile<WgradTile<T, 64, 64, kTerms>, ColumnUnits>(p, t, plan.blocks(), stream);
  } else if (plan.tile.m == 64) {
    launch_tile<WgradTile<T, 64, 128, kTerms>, ColumnUnits>(p, t, plan.blocks(), stream);
  } else if (plan.tile.n == 64) {
    launch_tile<WgradTile<T, 128, 64, kTerms>, ColumnUnits>(p, t, plan.blocks(), stream);
  } else {
    launch_tile<WgradTile<T, 128, 128, kTerms>, ColumnUnits>(p, t, plan.blocks(), stream);
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
    SharedCarver carve;
    carve.take<float>(kReduceThreads);
    const int lanes = kReduceThreads / parts_of(plan.split.splits);
    launch_kernel({kName, blocks_for(p.K * t.pitch, lanes), kReduceThreads, stream, carve.bytes()},
                  &conv2d_reduce_columns_kernel<T>, t, plan.split.splits);
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

void launch_plan(const Plan& plan, const Conv2dProblem& p, const Conv2dArgs& args,
                 const Context& context) {
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
  const int64_t bytes = shared_bytes<WgradTile<float, 128, 128>, ColumnUnits>();
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
  row.launch = [](const Conv2dProblem& p, const Conv2dArgs& args, const Context& context) {
    cuda::launch_plan(cuda::plan_of(p), p, args, context);
  };
  table.conv2d.push_back(std::move(row));
}

}  // namespace fastconv
