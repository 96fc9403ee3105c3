// What the convolution kernels share: a problem as a kernel reads it, positions, the epilogue's
// store, and how a reduction is split over blocks.
#pragma once

#include <algorithm>
#include <string>

#include "core/conv2d_problem.h"
#include "core/epilogue.h"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "cuda/limits.h"

namespace fastconv {
namespace cuda {

struct Strides4 {
  int64_t n, c, h, w;  // of a filter: k, c, r, s
};

inline Strides4 dense_strides(Layout layout, int64_t C, int64_t H, int64_t W) {
  if (layout == Layout::kNCHW) return {C * H * W, H * W, W, 1};
  return {H * W * C, 1, W * C, C};
}

struct EpilogueParams {
  const void *scale, *shift, *residual;  // null: without
  double slope;
  Activation activation;
};

inline EpilogueParams epilogue_params_of(const Epilogue& e, const Conv2dArgs& args) {
  return {e.scale ? args.scale : nullptr, e.shift ? args.shift : nullptr,
          e.residual ? args.residual : nullptr, e.slope, e.activation};
}

// A convolution as a kernel reads it. Positions along one axis are int, offsets 64-bit.
struct ConvParams {
  const void *input, *filter, *grad;
  void* out;
  EpilogueParams epilogue;
  Strides4 in, flt, res;  // res: of the output, its gradient and the residual
  int64_t N, pixels;      // pixels: N * P * Q
  int G, c_per_group, k_per_group;
  int H, W, R, S, P, Q;
  int stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
};

// What supports() has shown to fit.
inline int to_int(int64_t value) { return static_cast<int>(value); }

inline ConvParams conv_params_of(const Conv2dProblem& p, const Conv2dArgs& args) {
  ConvParams t = {};
  t.input = args.input;
  t.filter = args.filter;
  t.grad = args.grad;
  t.out = args.out;
  t.epilogue = epilogue_params_of(p.epilogue, args);
  t.in = dense_strides(p.layout, p.C, p.H, p.W);
  t.flt = dense_strides(p.filter_layout, p.C / p.G, p.R, p.S);
  t.res = dense_strides(p.layout, p.K, p.P(), p.Q());
  t.N = p.N;
  t.pixels = p.N * p.P() * p.Q();
  t.G = to_int(p.G);
  t.c_per_group = to_int(p.C / p.G);
  t.k_per_group = to_int(p.K / p.G);
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
  return t;
}

// The sums bound every position a kernel computes, before or past the edge; `channels` are what a
// kernel rounds the channel counts up by.
inline std::string refuse_conv_beyond_int(const Conv2dProblem& p, int64_t channels) {
  return refuse_beyond_int({{"C", p.C + p.G * channels},
                            {"K", p.K + p.G * channels},
                            {"filter positions", p.R * p.S * (p.C / p.G + channels)},
                            {"padded height", p.H + 2 * p.pad_h + p.R * p.dil_h + p.stride_h},
                            {"padded width", p.W + 2 * p.pad_w + p.S * p.dil_w + p.stride_w}});
}

// Image and position of a flat index over images of `rows` x `cols`.
struct Pixel {
  int64_t n;
  int row, col;
};
__device__ inline Pixel pixel_at(int64_t index, int rows, int cols) {
  const Division row = divide(index, cols);
  const Division image = divide(row.quotient, rows);
  return {image.quotient, image.remainder, row.remainder};
}
// From a pixel to the one `count` further, without a division on the device.
struct PixelStep {
  int n, row, col;
};
inline PixelStep pixel_step(int64_t count, int rows, int cols) {
  const int64_t image = int64_t{rows} * cols;
  return {to_int(count / image), to_int(count % image / cols), to_int(count % cols)};
}
__device__ inline void advance(Pixel& pixel, const PixelStep& by, int rows, int cols) {
  pixel.col += by.col;
  pixel.row += by.row;
  pixel.n += by.n;
  if (pixel.col >= cols) {
    pixel.col -= cols;
    ++pixel.row;
  }
  if (pixel.row >= rows) {
    pixel.row -= rows;
    ++pixel.n;
  }
}
__device__ inline int64_t offset_of(const Strides4& s, const Pixel& at) {
  return at.n * s.n + at.row * s.h + at.col * s.w;
}

__device__ inline bool within(int x, int size) {
  return static_cast<unsigned>(x) < static_cast<unsigned>(size);
}

// The output position along one axis whose window starts at `x`, counted from the padding's edge;
// -1 where none does.
__device__ inline int window_starting_at(int x, int stride, int count) {
  if (x < 0) return -1;
  const int i = stride == 1 ? x : x / stride;
  return i * stride == x && i < count ? i : -1;
}

// scale, shift, residual, activation; one rounding; the store.
template <class T>
__device__ inline void store_result(const EpilogueParams& e, void* out, int k, int64_t offset,
                                    accumulator_t<T> z) {
  using A = accumulator_t<T>;
  if (e.scale != nullptr) z *= static_cast<const A*>(e.scale)[k];
  if (e.shift != nullptr) z += static_cast<const A*>(e.shift)[k];
  if (e.residual != nullptr) z += widen(static_cast<const T*>(e.residual)[offset]);
  static_cast<T*>(out)[offset] = narrow<T>(activate(z, e.activation, static_cast<A>(e.slope)));
}

// The same for the first `count` of kCount filters of a pixel, `stride` elements apart. `vector`:
// all kCount are there, are neighbours, and are aligned in the output and the residual.
template <class T, int kCount>
__device__ inline void store_results(const EpilogueParams& e, void* out, int k, int count,
                                     int64_t offset, int64_t stride, bool vector,
                                     const accumulator_t<T> (&sum)[kCount]) {
  using A = accumulator_t<T>;
  const A *scale = static_cast<const A*>(e.scale), *shift = static_cast<const A*>(e.shift);
  const T* residual = static_cast<const T*>(e.residual);
  T* to = static_cast<T*>(out) + offset;
  Pack<T, kCount> values = {};
  if (residual != nullptr && vector) values = load_pack<T, kCount>(residual + offset);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (!vector && i >= count) break;
    if (residual != nullptr && !vector) values.at[i] = residual[offset + i * stride];
    A z = sum[i];
    if (scale != nullptr) z *= scale[k + i];
    if (shift != nullptr) z += shift[k + i];
    if (residual != nullptr) z += widen(values.at[i]);
    values.at[i] = narrow<T>(activate(z, e.activation, static_cast<A>(e.slope)));
    if (!vector) to[i * stride] = values.at[i];
  }
  if (vector) store_pack(to, values);
}

// Splitting a sum over `items` between `splits` blocks. Which items go where follows from the
// problem alone, so the bits do not depend on the GPU. Each block leaves a partial sum of every
// result in the workspace; reduce_partials() adds them up in ascending order.
struct Split {
  int splits;
  int64_t items_per_split;
};

// `blocks` of the launch without a split, `results` partial sums a split of `result_bytes` each.
inline Split split_sum(int64_t items, int64_t blocks, int64_t results, int64_t result_bytes) {
  constexpr int64_t kFill = 512;         // blocks that fill 132 SMs, with some to balance
  constexpr int64_t kLeast = 128;        // items worth a block
  constexpr int64_t kChain = 8192;       // a float32 sum of more loses digits
  constexpr int64_t kBudget = 64 << 20;  // bytes of partial sums, unless kFill asks for more
  const int64_t fill = ceil_div(kFill, std::max<int64_t>(blocks, 1));
  const int64_t affordable = std::max(fill, kBudget / std::max<int64_t>(results * result_bytes, 1));
  int64_t splits = std::min(std::max(fill, ceil_div(items, kChain)), affordable);
  splits = std::max<int64_t>(1, std::min(splits, items / kLeast));
  const int64_t each = std::max<int64_t>(1, ceil_div(items, splits));
  return {to_int(std::max<int64_t>(1, ceil_div(items, each))), each};
}

// Bytes of the partial sums; none where one block has the whole sum.
inline size_t split_workspace(const Split& split, int64_t results, DType dtype) {
  if (split.splits == 1) return 0;
  return static_cast<size_t>(split.splits * results * size_of(accumulator_of(dtype)));
}

// out[i] = round(sum over splits of partials[split * results + i]). conv2d_reduce.cu.
void reduce_partials(const char* name, DType dtype, const void* partials, void* out,
                     int64_t results, int splits, void* stream);

// A block's result: into its split's partial sums, or rounded into the output.
template <class T>
__device__ inline void store_partial(void* partials, void* out, int64_t results, int split,
                                     int64_t at, accumulator_t<T> sum) {
  if (partials != nullptr) {
    static_cast<accumulator_t<T>*>(partials)[split * results + at] = sum;
  } else {
    static_cast<T*>(out)[at] = narrow<T>(sum);
  }
}

// What every CUDA row of a convolution has in common.
inline Conv2dKernel conv2d_row(const char* name, Direction direction) {
  Conv2dKernel row;
  row.name = name;
  row.op = "conv2d";
  row.direction = direction;
  row.backend = Backend::kCuda;
  row.arch = "sm_80";
  row.dtypes = kAllDTypes;
  row.layouts = kAllLayouts;
  return row;
}

}  // namespace cuda
}  // namespace fastconv
