// Filter gradient as an implicit matrix product: filters by filter positions (r, s, c), summed over
// pixels (n, p, q):
//   dw[k, (r,s,c)] = sum over pixels of dy[pixel, k] * x[pixel at tap (r,s), c]
//
// A thread's quads are four filters of a pixel and four channels of a tap at the same pixel, so its
// tap is fixed and one position walks on for both. The channels of a tap are padded to whole quads.
// The pixels are split over blocks, whose partial sums conv2d_reduce.cu adds up in order.
#include <string>

#include "cuda/conv2d.h"
#include "cuda/conv2d_gemm.h"
#include "cuda/table.h"

namespace fastconv {
namespace cuda {
namespace {

struct WgradParams {
  ConvParams conv;
  void* partials;  // null: a block has whole sums
  int64_t pixels_per_split, results, blocks;
  int k_tiles, column_tiles;       // a group
  int columns;                     // R * S * tap_quads * kQuad
  int tap_quads;                   // quads of channels of one tap
  PixelStep step;                  // what kDepth pixels on means
  bool vector_grad, vector_input;  // a quad of channels is one aligned load
  bool lanes_along_pixels;         // what neighbouring threads load
};

// A filter position of a group.
struct Column {
  int r, s, c;  // c of a quad's first channel, or of the column itself
};
__device__ inline Column column_at(const WgradParams& t, int column) {
  const int tap_channels = t.tap_quads * kQuad;
  const int tap = column / tap_channels, r = tap / t.conv.S;
  return {r, tap - r * t.conv.S, column - tap * tap_channels};
}

// Which pixel of a step and which quad of the tiles a thread loads.
struct LoadAt {
  int pixel, quad;
};
template <class Gemm>
__device__ inline LoadAt load_at(bool lanes_along_pixels) {
  constexpr int kQuads = Gemm::kSize / kQuad;
  const int thread = static_cast<int>(threadIdx.x);
  if (lanes_along_pixels) return {thread % Gemm::kDepth, thread / Gemm::kDepth};
  return {thread / kQuads, thread % kQuads};
}

// One tile of the results and a share of the pixels.
struct TileAt {
  int group, first_k, first_column, split;
  int64_t begin, end;  // pixels

  __device__ TileAt(const WgradParams& t, int64_t block, int size) {
    const Division by_column = divide(block, t.column_tiles);
    const Division by_k = divide(by_column.quotient, t.k_tiles);
    const Division by_group = divide(by_k.quotient, t.conv.G);
    first_column = by_column.remainder * size;
    first_k = by_k.remainder * size;
    group = by_group.remainder;
    split = static_cast<int>(by_group.quotient);
    begin = split * t.pixels_per_split;
    end = min(begin + t.pixels_per_split, t.conv.pixels);
  }
};

template <class T, class A>
__device__ inline void store_quad(A* to, const Pack<T, kQuad>& quad) {
  Pack<A, kQuad> wide;
#pragma unroll
  for (int e = 0; e < kQuad; ++e) wide.at[e] = widen(quad.at[e]);
  store_pack(to, wide);
}

template <class T, class Gemm>
__device__ inline void multiply_tile(const WgradParams& t, const Gemm& gemm, const TileAt& tile,
                                     accumulator_t<T> (&sum)[Gemm::kSums][Gemm::kSums]) {
  const ConvParams& conv = t.conv;
  const LoadAt at = load_at<Gemm>(t.lanes_along_pixels);
  const int k = tile.first_k + at.quad * kQuad;
  const T* grad =
      static_cast<const T*>(conv.grad) + (tile.group * conv.k_per_group + k) * conv.res.c;
  const int column = tile.first_column + at.quad * kQuad;
  const Column tap = column_at(t, min(column, t.columns - kQuad));
  const T* input =
      static_cast<const T*>(conv.input) + (tile.group * conv.c_per_group + tap.c) * conv.in.c;
  const int filters = conv.k_per_group - k;
  const int channels = column < t.columns ? conv.c_per_group - tap.c : 0;
  const int tap_h = tap.r * conv.dil_h - conv.pad_h, tap_w = tap.s * conv.dil_w - conv.pad_w;

  int64_t index = tile.begin + at.pixel;
  Pixel pixel = pixel_at(index, conv.P, conv.Q);
  const auto load = [&](Pack<T, kQuad>& left, Pack<T, kQuad>& right) {
    const bool exists = index < tile.end;
    const int h = pixel.row * conv.stride_h + tap_h, w = pixel.col * conv.stride_w + tap_w;
    const bool inside = exists && within(h, conv.H) && within(w, conv.W);
    left = load_quad(grad + offset_of(conv.res, pixel), conv.res.c, exists ? filters : 0,
                     t.vector_grad);
    right = load_quad(input + offset_of(conv.in, {pixel.n, h, w}), conv.in.c, inside ? channels : 0,
                      t.vector_input);
    index += Gemm::kDepth;
    advance(pixel, t.step, conv.P, conv.Q);
  };
  const auto store = [&](int buffer, const Pack<T, kQuad>& left, const Pack<T, kQuad>& right) {
    const int to = at.pixel * Gemm::kRow + at.quad * kQuad;
    store_quad<T>(gemm.left(buffer) + to, left);
    store_quad<T>(gemm.right(buffer) + to, right);
  };
  const int steps = static_cast<int>((tile.end - tile.begin + Gemm::kDepth - 1) / Gemm::kDepth);
  multiply_steps<Gemm, T>(gemm, steps, sum, load, store);
}

// Blocks an SM that registers are to leave room for. Unasked, ptxas spills two to fit three.
template <class T, int kSize>
constexpr int kBlocks = kSize == 64 && sizeof(T) < 8 ? 2 : 1;

template <class T, int kSize>
__global__ void __launch_bounds__(kGemmThreads, kBlocks<T, kSize>)
    conv2d_tiled_wgrad_kernel(const WgradParams t) {
  using A = accumulator_t<T>;
  using Gemm = GemmTile<A, kSize>;
  SharedCarver carver(shared_memory());
  const Gemm gemm(carver);
  int64_t* offsets = carver.take<int64_t>(kSize);  // of the tile's columns in a filter; -1: none

  for (int64_t block = blockIdx.x; block < t.blocks; block += gridDim.x) {
    const TileAt tile(t, block, kSize);
    if (threadIdx.x < kSize) {
      const int column = tile.first_column + static_cast<int>(threadIdx.x);
      const Column at = column_at(t, column);
      const bool exists = column < t.columns && at.c < t.conv.c_per_group;
      offsets[threadIdx.x] =
          exists ? at.c * t.conv.flt.c + at.r * t.conv.flt.h + at.s * t.conv.flt.w : -1;
    }
    A sum[Gemm::kSums][Gemm::kSums] = {};
    multiply_tile<T, Gemm>(t, gemm, tile, sum);
    for_each_result(gemm, sum, false, [&](int row, int col, A z) {
      const int k = tile.first_k + row;
      if (offsets[col] < 0 || k >= t.conv.k_per_group) return;
      store_partial<T>(t.partials, t.conv.out, t.results, tile.split,
                       (tile.group * t.conv.k_per_group + k) * t.conv.flt.n + offsets[col], z);
    });
    __syncthreads();  // before `offsets` is written again
  }
}

// How a problem is cut into tiles, for the launch and for the estimate.
struct Cut {
  int64_t k_tiles, column_tiles, columns, tap_quads;
  int64_t tiles;  // of all groups
  Split split;
};

Cut cut_of(const Conv2dProblem& p, int size) {
  Cut cut = {};
  cut.tap_quads = ceil_div(p.C / p.G, kQuad);
  cut.columns = p.R * p.S * cut.tap_quads * kQuad;
  cut.k_tiles = ceil_div(p.K / p.G, size);
  cut.column_tiles = ceil_div(cut.columns, size);
  cut.tiles = cut.k_tiles * cut.column_tiles * p.G;
  cut.split = split_sum(p.N * p.P() * p.Q(), cut.tiles, p.filter_elements(),
                        size_of(accumulator_of(p.dtype)));
  return cut;
}

template <class T, int kSize>
void launch_tile(const char* name, WgradParams t, void* stream) {
  using Gemm = GemmTile<accumulator_t<T>, kSize>;
  t.step = pixel_step(Gemm::kDepth, t.conv.P, t.conv.Q);
  launch_kernel({name, std::min(t.blocks, kMaxBlocks), kGemmThreads, stream,
                 gemm_shared_bytes<accumulator_t<T>, kSize>()},
                &conv2d_tiled_wgrad_kernel<T, kSize>, t);
}

struct TiledRow {
  const char* name;
  int size;
  double share;  // of the multiply-add peak that the main loop reaches
};

constexpr TiledRow kRows[] = {{"conv2d_tiled128_sm80_wgrad", 128, 0.7},
                              {"conv2d_tiled_sm80_wgrad", 64, 0.5}};

void launch(const TiledRow& row, const Conv2dProblem& p, const Conv2dArgs& args,
            const Context& context) {
  const Cut cut = cut_of(p, row.size);
  WgradParams t = {};
  t.conv = conv_params_of(p, args);
  t.partials = cut.split.splits > 1 ? args.workspace : nullptr;
  t.pixels_per_split = cut.split.items_per_split;
  t.results = p.filter_elements();
  t.blocks = cut.tiles * cut.split.splits;
  t.k_tiles = to_int(cut.k_tiles);
  t.column_tiles = to_int(cut.column_tiles);
  t.columns = to_int(cut.columns);
  t.tap_quads = to_int(cut.tap_quads);
  const auto quads = [&](const void* pointer, int64_t stride, int channels) {
    return stride == 1 && channels % kQuad == 0 &&
           is_aligned(pointer, std::min<int64_t>(kPackBytes, kQuad * size_of(p.dtype)));
  };
  t.vector_grad = quads(args.grad, t.conv.res.c, t.conv.k_per_group);
  t.vector_input = quads(args.input, t.conv.in.c, t.conv.c_per_group);
  t.lanes_along_pixels = p.layout == Layout::kNCHW;
  dispatch_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (row.size == 64) {
      launch_tile<T, 64>(row.name, t, context.stream);
    } else if constexpr (sizeof(T) < 8) {
      launch_tile<T, 128>(row.name, t, context.stream);
    }
  });
  if (cut.split.splits > 1) {
    reduce_partials(row.name, p.dtype, args.workspace, args.out, t.results, cut.split.splits,
                    context.stream);
  }
}

double cost(const TiledRow& row, const Conv2dProblem& p, const Device& device) {
  const Cut cut = cut_of(p, row.size);
  const double flops = 2.0 * static_cast<double>(cut.tiles * row.size * row.size) *
                       static_cast<double>(p.N * p.P() * p.Q());
  const double share = p.dtype == DType::kFloat64 ? row.share / 2 : row.share;
  // Partial sums are written once and read once.
  const double bytes = p.bytes() + 2.0 * static_cast<double>(split_workspace(
                                             cut.split, p.filter_elements(), p.dtype));
  return expected_us(bytes, flops, share,
                     busy_part(device, cut.tiles * cut.split.splits, row.size == 64 ? 2 : 1));
}

}  // namespace
}  // namespace cuda

void add_cuda_conv2d_tiled_wgrad_rows(KernelTable& table) {
  for (const cuda::TiledRow& tiled : cuda::kRows) {
    Conv2dKernel row = cuda::conv2d_row(tiled.name, Direction::kWgrad);
    // 64 float64 sums a thread are 128 registers: no room for the rest.
    if (tiled.size == 128) row.dtypes &= ~bit(DType::kFloat64);
    row.supports = [&tiled](const Conv2dProblem& p, const Device& device) {
      const std::string why = cuda::refuse_gemm(p, tiled.size, device);
      return why.empty() ? cuda::refuse_conv_beyond_int(p, tiled.size) : why;
    };
    row.cost = [&tiled](const Conv2dProblem& p, const Device& device) {
      return cuda::cost(tiled, p, device);
    };
    row.workspace = [&tiled](const Conv2dProblem& p, const Device&) {
      return cuda::split_workspace(cuda::cut_of(p, tiled.size).split, p.filter_elements(), p.dtype);
    };
    row.launch = [&tiled](const Conv2dProblem& p, const Conv2dArgs& args, const Context& context) {
      cuda::launch(tiled, p, args, context);
    };
    table.conv2d.push_back(std::move(row));
  }
}

}  // namespace fastconv
