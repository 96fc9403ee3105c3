// fprop and dgrad as one implicit matrix product: pixels by channels written, summed over taps and
// channels read; conv2d_gather.h says which. A tile holds one phase of dgrad and wastes nothing.
//
// A step is 16 (or 8) deep: four (or two) quads of channels of one tap, or where a tap has fewer
// quads, of several taps. A tap's channels are padded to whole quads with zeros. Taps are walked
// inside a chunk of channels: all of a tap's neighbours then find their lines in L1.
#include <string>

#include "cuda/conv2d_gather.h"
#include "cuda/conv2d_gemm.h"
#include "cuda/table.h"

namespace fastconv {
namespace cuda {
namespace {

struct GatherParams {
  const void *source, *filter;
  void* out;
  EpilogueParams epilogue;
  Strides4 src, dst;
  // Filter strides: a group's filters, channels summed over and written, taps, a phase's taps.
  int64_t flt_group, flt_red, flt_out, flt_h, flt_w, flt_step_h, flt_step_w;
  int64_t N, pixel_tiles, blocks;
  GatherAxis h, w;
  int G, red, outs;    // channels summed over and written, a group
  int out_tiles;       // a group
  int tap_quads_log2;  // quads of one tap in a step
  bool backward;
  bool vector_source, vector_filter;  // a quad of channels summed over is one aligned load
  bool source_lanes_along_red, filter_lanes_along_red;  // what neighbouring threads load
  bool lanes_along_pixels;                              // likewise what they store
};

// The taps and channels that one quad of a step runs through. kOneTap: channels alone. After its
// last tap a quad starts over, `chunk` channels on. Only a tap that fills the step has more chunks
// than one; where a step holds several taps, starting over leads beyond the last channel.
template <bool kOneTap>
struct Walk {
  int h = 0, w = 0, channel;

  __device__ Walk(const GatherParams& t, int quad, const AxisPhase& rows, const AxisPhase& cols)
      : channel((quad & ((1 << t.tap_quads_log2) - 1)) * kQuad) {
    if (!kOneTap && cols.taps > 0) step(t, quad >> t.tap_quads_log2, rows, cols);
  }
  __device__ void step(const GatherParams& t, int taps, const AxisPhase& rows,
                       const AxisPhase& cols) {
    const int chunk = kQuad << t.tap_quads_log2;
    if constexpr (kOneTap) {
      channel += chunk;
      return;
    }
    w += taps;
    while (w >= cols.taps) {
      w -= cols.taps;
      ++h;
    }
    if (h >= rows.taps) {
      h = 0;
      channel += chunk;
    }
  }
};

// One tile of the results.
struct TileAt {
  AxisPhase h, w;
  int phase_h, phase_w, group, first_out;
  int64_t first_pixel, pixels;  // of the phase

  __device__ TileAt(const GatherParams& t, int64_t block, int size) {
    const Division by_out = divide(block, t.out_tiles);
    const Division by_group = divide(by_out.quotient, t.G);
    const int phase = static_cast<int>(by_group.quotient / t.pixel_tiles);
    phase_h = phase / t.w.phases;
    phase_w = phase - phase_h * t.w.phases;
    h = axis_phase(t.h, phase_h, t.backward);
    w = axis_phase(t.w, phase_w, t.backward);
    group = by_group.remainder;
    first_out = by_out.remainder * size;
    first_pixel = (by_group.quotient - phase * t.pixel_tiles) * size;
    pixels = t.N * h.positions * w.positions;
  }
};

// Which quad and which of the tile's pixels or channels a thread loads.
struct LoadAt {
  int quad, index;
};
template <class Gemm>
__device__ inline LoadAt load_at(bool lanes_along_quads) {
  constexpr int kQuads = Gemm::kDepth / kQuad;
  const int thread = static_cast<int>(threadIdx.x);
  if (lanes_along_quads) return {thread % kQuads, thread / kQuads};
  return {thread / Gemm::kSize, thread % Gemm::kSize};
}

template <class Gemm, class T, class A>
__device__ inline void store_quad(A* tile, const LoadAt& at, const Pack<T, kQuad>& quad) {
#pragma unroll
  for (int e = 0; e < kQuad; ++e) {
    tile[(at.quad * kQuad + e) * Gemm::kRow + at.index] = widen(quad.at[e]);
  }
}

// Adds the tile's products up.
template <class T, class Gemm, bool kOneTap>
__device__ inline void multiply_tile(const GatherParams& t, const Gemm& gemm, const TileAt& tile,
                                     accumulator_t<T> (&sum)[Gemm::kSums][Gemm::kSums]) {
  constexpr int kQuads = Gemm::kDepth / kQuad;
  const int taps = kOneTap ? min(tile.h.taps, tile.w.taps) : tile.h.taps * tile.w.taps;
  const int taps_a_step = kOneTap ? 1 : kQuads >> t.tap_quads_log2;
  const int chunk = kQuad << t.tap_quads_log2;
  const int steps = (taps + taps_a_step - 1) / taps_a_step * ((t.red + chunk - 1) / chunk);

  const LoadAt source_at = load_at<Gemm>(t.source_lanes_along_red);
  const int64_t index = tile.first_pixel + source_at.index;
  const bool has_pixel = index < tile.pixels;
  const Pixel j = pixel_at(has_pixel ? index : 0, tile.h.positions, tile.w.positions);
  const int source_h = j.row * t.h.jump + tile.h.start, source_w = j.col * t.w.jump + tile.w.start;
  const T* source =
      static_cast<const T*>(t.source) + (j.n * t.src.n + tile.group * (t.red * t.src.c));
  if (kOneTap) source += source_h * t.src.h + source_w * t.src.w;
  Walk<kOneTap> source_walk(t, source_at.quad, tile.h, tile.w);

  const LoadAt filter_at = load_at<Gemm>(t.filter_lanes_along_red);
  const bool has_out = tile.first_out + filter_at.index < t.outs;
  const T* filter = static_cast<const T*>(t.filter) + tile.group * t.flt_group +
                    (tile.first_out + filter_at.index) * t.flt_out + tile.h.first_tap * t.flt_h +
                    tile.w.first_tap * t.flt_w;
  Walk<kOneTap> filter_walk(t, filter_at.quad, tile.h, tile.w);

  const auto load = [&](Pack<T, kQuad>& left, Pack<T, kQuad>& right) {
    bool inside = has_pixel;
    int64_t tap = 0, filter_tap = 0;
    if constexpr (!kOneTap) {
      const int y = source_h + source_walk.h * t.h.move, x = source_w + source_walk.w * t.w.move;
      inside = inside && within(y, t.h.source) && within(x, t.w.source);
      tap = y * t.src.h + x * t.src.w;
      filter_tap = filter_walk.h * t.flt_step_h + filter_walk.w * t.flt_step_w;
    }
    left = load_quad(source + (tap + source_walk.channel * t.src.c), t.src.c,
                     inside ? t.red - source_walk.channel : 0, t.vector_source);
    right = load_quad(filter + (filter_tap + filter_walk.channel * t.flt_red), t.flt_red,
                      has_out ? t.red - filter_walk.channel : 0, t.vector_filter);
    source_walk.step(t, taps_a_step, tile.h, tile.w);
    filter_walk.step(t, taps_a_step, tile.h, tile.w);
  };
  const auto store = [&](int buffer, const Pack<T, kQuad>& left, const Pack<T, kQuad>& right) {
    store_quad<Gemm>(gemm.left(buffer), source_at, left);
    store_quad<Gemm>(gemm.right(buffer), filter_at, right);
  };
  multiply_steps<Gemm, T>(gemm, steps, sum, load, store);
}

template <class T, int kSize, bool kOneTap>
__global__ void __launch_bounds__(kGemmThreads) conv2d_tiled_kernel(const GatherParams t) {
  using A = accumulator_t<T>;
  using Gemm = GemmTile<A, kSize>;
  SharedCarver carver(shared_memory());
  const Gemm gemm(carver);
  int64_t* offsets = carver.take<int64_t>(kSize);  // of the tile's pixels in `out`; -1: none

  for (int64_t block = blockIdx.x; block < t.blocks; block += gridDim.x) {
    const TileAt tile(t, block, kSize);
    if (tile.first_pixel >= tile.pixels) continue;  // phases differ in size by a row or a column
    if (threadIdx.x < kSize) {
      const int64_t index = tile.first_pixel + threadIdx.x;
      const Pixel j = pixel_at(min(index, tile.pixels - 1), tile.h.positions, tile.w.positions);
      const Pixel to = {j.n, tile.phase_h + j.row * t.h.phases, tile.phase_w + j.col * t.w.phases};
      offsets[threadIdx.x] = index < tile.pixels ? offset_of(t.dst, to) : -1;
    }
    A sum[Gemm::kSums][Gemm::kSums] = {};
    multiply_tile<T, Gemm, kOneTap>(t, gemm, tile, sum);
    for_each_result(gemm, sum, t.lanes_along_pixels, [&](int row, int col, A z) {
      const int64_t offset = offsets[row];
      if (offset < 0 || tile.first_out + col >= t.outs) return;
      const int channel = tile.group * t.outs + tile.first_out + col;
      store_result<T>(t.epilogue, t.out, channel, offset + channel * t.dst.c, z);
    });
    __syncthreads();  // before `offsets` is written again
  }
}

// How a problem is cut into tiles, for the launch and for the estimate.
struct Cut {
  int64_t pixel_tiles, out_tiles, blocks;
  int64_t depth;  // summed over, padding of quads and steps included; of the average phase
  int tap_quads_log2;
};

Cut cut_of(const Conv2dProblem& p, bool backward, int size, bool one_tap) {
  const int64_t red = (backward ? p.K : p.C) / p.G, outs = (backward ? p.C : p.K) / p.G;
  const int64_t phases_h = backward ? phases_of(p.stride_h, p.H) : 1;
  const int64_t phases_w = backward ? phases_of(p.stride_w, p.W) : 1;
  const int64_t positions =
      backward ? ceil_div(p.H, phases_h) * ceil_div(p.W, phases_w) : p.P() * p.Q();
  Cut cut = {};
  cut.pixel_tiles = ceil_div(p.N * positions, size);
  cut.out_tiles = ceil_div(outs, size);
  cut.blocks = cut.pixel_tiles * cut.out_tiles * p.G * phases_h * phases_w;
  const int step_quads_log2 = size == 128 ? 1 : 2;
  cut.tap_quads_log2 =
      one_tap ? step_quads_log2 : std::min(ceil_log2(ceil_div(red, kQuad)), step_quads_log2);
  static_assert(
      GemmTile<float, 128>::kDepth == kQuad << 1 && GemmTile<float, 64>::kDepth == kQuad << 2,
      "quads of a step");
  const int64_t chunk = kQuad << cut.tap_quads_log2;
  cut.depth = ceil_div(p.R * p.S, phases_h * phases_w) * ceil_div(red, chunk) * chunk;
  return cut;
}

GatherParams params_of(const Conv2dProblem& p, const Conv2dArgs& args, bool backward, int size,
                       bool one_tap) {
  const ConvParams conv = conv_params_of(p, args);
  const Cut cut = cut_of(p, backward, size, one_tap);
  GatherParams t = {};
  t.source = backward ? args.grad : args.input;
  t.filter = args.filter;
  t.out = args.out;
  if (!backward) t.epilogue = conv.epilogue;
  t.src = backward ? conv.res : conv.in;
  t.dst = backward ? conv.in : conv.res;
  t.flt_red = backward ? conv.flt.n : conv.flt.c;
  t.flt_out = backward ? conv.flt.c : conv.flt.n;
  t.flt_h = conv.flt.h;
  t.flt_w = conv.flt.w;
  t.h = axis_of(backward, conv.H, conv.P, conv.R, conv.stride_h, conv.pad_h, conv.dil_h);
  t.w = axis_of(backward, conv.W, conv.Q, conv.S, conv.stride_w, conv.pad_w, conv.dil_w);
  t.flt_group = conv.k_per_group * conv.flt.n;
  t.flt_step_h = t.h.tap_step * t.flt_h;
  t.flt_step_w = t.w.tap_step * t.flt_w;
  t.N = p.N;
  t.pixel_tiles = cut.pixel_tiles;
  t.blocks = cut.blocks;
  t.G = conv.G;
  t.red = backward ? conv.k_per_group : conv.c_per_group;
  t.outs = backward ? conv.c_per_group : conv.k_per_group;
  t.out_tiles = to_int(cut.out_tiles);
  t.tap_quads_log2 = cut.tap_quads_log2;
  t.backward = backward;
  const bool quads = t.red % kQuad == 0;
  const auto aligned = [&](const void* pointer) {
    return is_aligned(pointer, std::min<int64_t>(kPackBytes, kQuad * size_of(p.dtype)));
  };
  t.vector_source = quads && t.src.c == 1 && aligned(t.source);
  t.vector_filter = quads && t.flt_red == 1 && aligned(t.filter);
  t.source_lanes_along_red = t.src.c == 1;
  t.filter_lanes_along_red = t.flt_red < t.flt_out;
  t.lanes_along_pixels = t.dst.c != 1;
  return t;
}

template <class T, int kSize>
void launch_tile(const char* name, const GatherParams& t, bool one_tap, void* stream) {
  const auto kernel =
      one_tap ? &conv2d_tiled_kernel<T, kSize, true> : &conv2d_tiled_kernel<T, kSize, false>;
  launch_kernel({name, std::min(t.blocks, kMaxBlocks), kGemmThreads, stream,
                 gemm_shared_bytes<accumulator_t<T>, kSize>()},
                kernel, t);
}

struct TiledRow {
  const char* name;
  Direction direction;
  int size;
  bool one_tap;  // R = S = 1, no padding: nothing is outside, and steps walk channels alone
  double share;  // of the multiply-add peak that the main loop reaches
};

// From special to general; of equal cost the earlier one wins.
constexpr TiledRow kRows[] = {
    {"conv1x1_tiled128_sm80_fprop", Direction::kFprop, 128, true, 0.75},
    {"conv1x1_sm80_fprop", Direction::kFprop, 64, true, 0.55},
    {"conv2d_tiled128_sm80_fprop", Direction::kFprop, 128, false, 0.7},
    {"conv2d_tiled_sm80_fprop", Direction::kFprop, 64, false, 0.5},
    {"conv1x1_tiled128_sm80_dgrad", Direction::kDgrad, 128, true, 0.75},
    {"conv1x1_sm80_dgrad", Direction::kDgrad, 64, true, 0.55},
    {"conv2d_tiled128_sm80_dgrad", Direction::kDgrad, 128, false, 0.7},
    {"conv2d_tiled_sm80_dgrad", Direction::kDgrad, 64, false, 0.5},
};

std::string supports(const TiledRow& row, const Conv2dProblem& p, const Device& device) {
  if (row.one_tap && !p.is_1x1()) {
    return "filter " + std::to_string(p.R) + "x" + std::to_string(p.S) + ", not 1x1";
  }
  if (row.one_tap && (p.pad_h != 0 || p.pad_w != 0)) {
    return "padding " + std::to_string(std::max(p.pad_h, p.pad_w)) + ", not 0";
  }
  const std::string why = refuse_gemm(p, row.size, device);
  return why.empty() ? refuse_conv_beyond_int(p, row.size) : why;
}

double cost(const TiledRow& row, const Conv2dProblem& p, const Device& device) {
  const Cut cut = cut_of(p, row.direction == Direction::kDgrad, row.size, row.one_tap);
  const double flops =
      2.0 * static_cast<double>(cut.blocks * row.size * row.size) * static_cast<double>(cut.depth);
  const double share = p.dtype == DType::kFloat64 ? row.share / 2 : row.share;
  return expected_us(p.bytes(), flops, share,
                     busy_part(device, cut.blocks, row.size == 64 ? 2 : 1));
}

void launch(const TiledRow& row, const Conv2dProblem& p, const Conv2dArgs& args,
            const Context& context) {
  const GatherParams t =
      params_of(p, args, row.direction == Direction::kDgrad, row.size, row.one_tap);
  dispatch_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (row.size == 64) {
      launch_tile<T, 64>(row.name, t, row.one_tap, context.stream);
    } else if constexpr (sizeof(T) < 8) {
      launch_tile<T, 128>(row.name, t, row.one_tap, context.stream);
    }
  });
}

}  // namespace
}  // namespace cuda

void add_cuda_conv2d_tiled_rows(KernelTable& table) {
  for (const cuda::TiledRow& tiled : cuda::kRows) {
    Conv2dKernel row = cuda::conv2d_row(tiled.name, tiled.direction);
    // 64 float64 sums a thread are 128 registers: no room for the rest.
    if (tiled.size == 128) row.dtypes &= ~bit(DType::kFloat64);
    row.supports = [&tiled](const Conv2dProblem& p, const Device& device) {
      return cuda::supports(tiled, p, device);
    };
    row.cost = [&tiled](const Conv2dProblem& p, const Device& device) {
      return cuda::cost(tiled, p, device);
    };
    row.launch = [&tiled](const Conv2dProblem& p, const Conv2dArgs& args, const Context& context) {
      cuda::launch(tiled, p, args, context);
    };
    table.conv2d.push_back(std::move(row));
  }
}

}  // namespace fastconv
