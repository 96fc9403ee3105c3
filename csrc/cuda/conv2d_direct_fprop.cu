// Direct convolution on plain float units: any stride, padding, dilation, groups, layout and dtype.
//
// A thread keeps kFilters x kPixels outputs in registers: at 4 x 4 it loads 8 values for 16
// multiply-adds. It walks the taps (r, s) outside and the channels inside, in an order that depends
// on the problem alone, so the same call gives the same bits.
//
// Which outputs a warp holds follows from the layout of the output. NCHW: 32 neighbouring pixels of
// the same filters, so that input loads and stores are contiguous and filter loads are one address.
// NHWC: 8 filter tiles by 4 pixels, so that a warp stores 32 neighbouring filters of a pixel. NHWC
// with one filter a group (depthwise): 32 neighbouring channels of one pixel.
#include <string>

#include "core/epilogue.h"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "cuda/limits.h"
#include "cuda/table.h"

namespace fastconv {
namespace cuda {
namespace {

constexpr const char* kName = "conv2d_direct_sm80_fprop";
constexpr int kThreads = 128;
constexpr int kPixels = 4;
constexpr int kMaxFilters = 4;

struct Strides4 {
  int64_t n, c, h, w;  // of a filter: k, c, r, s
};

Strides4 dense_strides(Layout layout, int64_t C, int64_t H, int64_t W) {
  if (layout == Layout::kNCHW) return {C * H * W, H * W, W, 1};
  return {H * W * C, 1, W * C, C};
}

struct DirectParams {
  const void *input, *filter, *scale, *shift, *residual;
  void* out;
  Strides4 in, flt, res;  // res: of the output and the residual
  int64_t pixels;         // N * P * Q
  int64_t blocks;         // pixel_blocks * filter_blocks, filter_blocks fastest
  int filter_blocks;      // filter tiles / lanes, rounded up
  int lanes_log2;         // neighbouring threads along filter tiles
  int filter_tiles;       // of all groups together
  int tiles_per_group;
  int c_per_group, k_per_group;
  int H, W, R, S, P, Q;
  int stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  Activation activation;
  double slope;
};

// Output position n, p, q of a flat index.
struct Pixel {
  int64_t n;
  int p, q;
};

__device__ inline Pixel pixel_at(const DirectParams& t, int64_t index) {
  const Division row = divide(index, t.Q);
  const Division image = divide(row.quotient, t.P);
  return {image.quotient, image.remainder, row.remainder};
}

// The part of the input under one output position's window.
struct Window {
  int64_t image;  // where n begins
  int h, w;       // the window's corner; far outside for a pixel past the last
};

__device__ inline Window window_at(const DirectParams& t, int64_t index) {
  if (index >= t.pixels) return {0, -0x7fffffff, 0};
  const Pixel pixel = pixel_at(t, index);
  return {pixel.n * t.in.n, pixel.p * t.stride_h - t.pad_h, pixel.q * t.stride_w - t.pad_w};
}

template <class T>
__device__ inline void store_output(const DirectParams& t, int k, int64_t offset,
                                    accumulator_t<T> z) {
  using A = accumulator_t<T>;
  if (t.scale != nullptr) z *= static_cast<const A*>(t.scale)[k];
  if (t.shift != nullptr) z += static_cast<const A*>(t.shift)[k];
  if (t.residual != nullptr) z += widen(static_cast<const T*>(t.residual)[offset]);
  static_cast<T*>(t.out)[offset] = narrow<T>(activate(z, t.activation, static_cast<A>(t.slope)));
}

// kVector > 1: channels are contiguous and 16-byte aligned in input and filter.
template <class T, int kFilters, int kVector>
__global__ void __launch_bounds__(kThreads) conv2d_direct_fprop_kernel(const DirectParams t) {
  using A = accumulator_t<T>;
  const int lanes = 1 << t.lanes_log2;
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int pixel_lane = static_cast<int>(threadIdx.x) >> t.lanes_log2;
  const int pixel_lanes = kThreads >> t.lanes_log2;

  for (int64_t block = blockIdx.x; block < t.blocks; block += gridDim.x) {
    const Division part = divide(block, t.filter_blocks);
    const int tile = part.remainder * lanes + lane;
    if (tile >= t.filter_tiles) continue;
    const int group = tile / t.tiles_per_group;
    const int k_in_group = (tile - group * t.tiles_per_group) * kFilters;
    const int k0 = group * t.k_per_group + k_in_group;
    const int filters = min(kFilters, t.k_per_group - k_in_group);

    const int64_t first = part.quotient * (pixel_lanes * kPixels) + pixel_lane;
    Window windows[kPixels];
#pragma unroll
    for (int i = 0; i < kPixels; ++i) windows[i] = window_at(t, first + i * pixel_lanes);

    const T* input = static_cast<const T*>(t.input) + group * (t.c_per_group * t.in.c);
    // Beyond the group's last filter a thread recomputes that one and does not store it.
    const T* filter[kFilters];
#pragma unroll
    for (int j = 0; j < kFilters; ++j) {
      filter[j] = static_cast<const T*>(t.filter) + (k0 + min(j, filters - 1)) * t.flt.n;
    }

    A sum[kFilters][kPixels] = {};
    for (int r = 0; r < t.R; ++r) {
      for (int s = 0; s < t.S; ++s) {
        const T* x[kPixels];
        bool inside[kPixels];
#pragma unroll
        for (int i = 0; i < kPixels; ++i) {
          const int h = windows[i].h + r * t.dil_h, w = windows[i].w + s * t.dil_w;
          inside[i] = h >= 0 && h < t.H && w >= 0 && w < t.W;
          x[i] = input + (inside[i] ? windows[i].image + h * t.in.h + w * t.in.w : 0);
        }
        const int64_t tap = r * t.flt.h + s * t.flt.w;
#pragma unroll 1  // four copies of the body would take 168 registers and spill
        for (int c = 0; c < t.c_per_group; c += kVector) {
          Pack<T, kVector> f[kFilters], v[kPixels];
#pragma unroll
          for (int j = 0; j < kFilters; ++j) {
            f[j] = load_pack<T, kVector>(filter[j] + (tap + c * t.flt.c));
          }
#pragma unroll
          for (int i = 0; i < kPixels; ++i) {
            v[i] = inside[i] ? load_pack<T, kVector>(x[i] + c * t.in.c) : Pack<T, kVector>{};
          }
#pragma unroll
          for (int e = 0; e < kVector; ++e) {
#pragma unroll
            for (int j = 0; j < kFilters; ++j) {
#pragma unroll
              for (int i = 0; i < kPixels; ++i) {
                sum[j][i] += widen(f[j].at[e]) * widen(v[i].at[e]);
              }
            }
          }
        }
      }
    }

#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      const int64_t index = first + i * pixel_lanes;
      if (index >= t.pixels) break;
      const Pixel at = pixel_at(t, index);  // again: kept, it would cost registers in the loops
      const int64_t offset = at.n * t.res.n + at.p * t.res.h + at.q * t.res.w;
#pragma unroll
      for (int j = 0; j < kFilters; ++j) {
        if (j < filters) store_output<T>(t, k0 + j, offset + (k0 + j) * t.res.c, sum[j][i]);
      }
    }
  }
}

DirectParams parameters_of(const Conv2dProblem& p, const Conv2dArgs& args, int filters) {
  DirectParams t = {};
  t.input = args.input;
  t.filter = args.filter;
  t.scale = p.epilogue.scale ? args.scale : nullptr;
  t.shift = p.epilogue.shift ? args.shift : nullptr;
  t.residual = p.epilogue.residual ? args.residual : nullptr;
  t.out = args.out;
  t.activation = p.epilogue.activation;
  t.slope = p.epilogue.slope;
  // supports() has made sure that these fit.
  const auto to_int = [](int64_t value) { return static_cast<int>(value); };
  t.H = to_int(p.H);
  t.W = to_int(p.W);
  t.R = to_int(p.R);
  t.S = to_int(p.S);
  t.P = to_int(p.P());
  t.Q = to_int(p.Q());
  t.stride_h = to_int(p.stride_h);
  t.stride_w = to_int(p.stride_w);
  t.pad_h = to_int(p.pad_h);
  t.pad_w = to_int(p.pad_w);
  t.dil_h = to_int(p.dil_h);
  t.dil_w = to_int(p.dil_w);
  t.c_per_group = to_int(p.C / p.G);
  t.k_per_group = to_int(p.K / p.G);
  t.in = dense_strides(p.layout, p.C, p.H, p.W);
  t.flt = dense_strides(p.filter_layout, p.C / p.G, p.R, p.S);
  t.res = dense_strides(p.layout, p.K, p.P(), p.Q());
  t.pixels = p.N * p.P() * p.Q();

  t.tiles_per_group = (t.k_per_group + filters - 1) / filters;
  t.filter_tiles = to_int(p.G) * t.tiles_per_group;
  t.lanes_log2 = p.layout == Layout::kNCHW ? 0 : filters == 1 ? 5 : 3;
  t.filter_blocks = to_int(((int64_t{1} << t.lanes_log2) - 1 + t.filter_tiles) >> t.lanes_log2);
  const int64_t pixels_per_block = (kThreads >> t.lanes_log2) * kPixels;
  t.blocks = (t.pixels + pixels_per_block - 1) / pixels_per_block * t.filter_blocks;
  return t;
}

template <class T>
void launch_element(const Conv2dProblem& p, const Conv2dArgs& args, void* stream) {
  const int filters = p.K / p.G == 1 ? 1 : kMaxFilters;
  const DirectParams t = parameters_of(p, args, filters);
  constexpr int kVector = kPackSize<T>;
  const bool vector = filters > 1 && t.in.c == 1 && t.flt.c == 1 && t.c_per_group % kVector == 0 &&
                      is_aligned(args.input, kPackBytes) && is_aligned(args.filter, kPackBytes);
  const auto kernel = filters == 1 ? &conv2d_direct_fprop_kernel<T, 1, 1>
                      : vector     ? &conv2d_direct_fprop_kernel<T, kMaxFilters, kVector>
                                   : &conv2d_direct_fprop_kernel<T, kMaxFilters, 1>;
  launch_kernel(kName, kernel, std::min(t.blocks, kMaxBlocks), kThreads, stream, t);
}

std::string supports(const Conv2dProblem& p, const Device&) {
  // The last two of each axis bound every position the kernel computes, before or past the edge.
  return refuse_beyond_int({{"C", p.C},
                            {"K", p.K + 32 * kMaxFilters},
                            {"H", p.H},
                            {"W", p.W},
                            {"padded height", p.H + 2 * p.pad_h},
                            {"padded width", p.W + 2 * p.pad_w},
                            {"filter height", p.R * p.dil_h},
                            {"filter width", p.S * p.dil_w},
                            {"stride height", p.stride_h},
                            {"stride width", p.stride_w}});
}

}  // namespace
}  // namespace cuda

void add_cuda_conv2d_direct_rows(KernelTable& table) {
  Conv2dKernel row;
  row.name = cuda::kName;
  row.op = "conv2d";
  row.direction = Direction::kFprop;
  row.backend = Backend::kCuda;
  row.arch = "sm_80";
  row.dtypes = kAllDTypes;
  row.layouts = kAllLayouts;
  row.supports = cuda::supports;
  row.cost = [](const Conv2dProblem& p, const Device& device) {
    // Loads, conversions and predicates leave about a fifth of the issue slots to multiply-adds.
    return cuda::expected_us(p.bytes(), p.flops(), 0.2, device);
  };
  row.launch = [](const Conv2dProblem& p, const Conv2dArgs& args, const Context& context) {
    cuda::dispatch_element(p.dtype, [&](auto element) {
      cuda::launch_element<decltype(element)>(p, args, context.stream);
    });
  };
  table.conv2d.push_back(std::move(row));
}

}  // namespace fastconv
