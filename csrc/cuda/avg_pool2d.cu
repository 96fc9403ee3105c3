// Average and adaptive average pooling, and their gradients.
//
// fprop: a thread adds a window row by row and divides last, so that sums of small integers give
// the exact quotient rounded once. Windows of 32 elements or more (a global average: 7 x 7 to 1 x
// 1) are shared by lanes of a warp, each of which adds every 32nd element (NHWC: every 8th, of 4
// packs of channels, which together fill 64 bytes of a line), and whose sums are added pairwise.
//
// dgrad gathers: a thread takes one input position and adds the windows over it in ascending order,
// those of one output row first, as the rows for the CPU do. No atomics, always the same bits.
#include <string>
#include <type_traits>

#include "cuda/pool2d.h"
#include "cuda/table.h"

namespace fastconv {
namespace cuda {
namespace {

constexpr const char* kFpropName = "avg_pool2d_sm80_fprop";
constexpr const char* kDgradName = "avg_pool2d_sm80_dgrad";
constexpr const char* kAdaptiveFpropName = "adaptive_avg_pool2d_sm80_fprop";
constexpr const char* kAdaptiveDgradName = "adaptive_avg_pool2d_sm80_dgrad";
constexpr int kThreads = kPoolThreads;
constexpr int kWarp = 32;
constexpr int64_t kLargeWindow = 32;
// A lane adds this many elements before their sum joins its own: torch averages whole planes in a
// cascade of sums, and 1,568 float additions in a row (a 112 x 112 plane, NHWC) lose 4 bits.
constexpr int kRun = 32;

struct AverageParams : PoolGeometry {
  const void* input;  // or the output's gradient
  void* out;
  double divisor;  // given by the caller; 0: by the window's size
  int items_log2;  // items that a warp takes at once, where lanes share a window
  bool adaptive, count_include_pad;
};

// What is summed along one axis of a window.
struct Span {
  int begin, end;
};

// floor(p * size / outputs) to ceil((p + 1) * size / outputs).
__device__ inline Span adaptive_span(int p, int size, int outputs) {
  const int begin = static_cast<int>(divide(int64_t{p} * size, outputs).quotient);
  const int end =
      static_cast<int>(divide((int64_t{p} + 1) * size + (outputs - 1), outputs).quotient);
  return {begin, end};
}

__device__ inline Span plain_span(int p, int size, int window, int stride, int pad) {
  const int begin = p * stride - pad;
  return {max(begin, 0), min(begin + window, size)};
}

// What count_include_pad divides by, along one axis. A ceil_mode window may pass the padded edge;
// what lies beyond it is not counted.
__device__ inline int padded_size(int p, int size, int window, int stride, int pad) {
  const int begin = p * stride - pad;
  return min(begin + window, size + pad) - begin;
}

__device__ inline Span row_span(const AverageParams& t, int p) {
  return t.adaptive ? adaptive_span(p, t.H, t.P) : plain_span(p, t.H, t.R, t.stride_h, t.pad_h);
}
__device__ inline Span column_span(const AverageParams& t, int q) {
  return t.adaptive ? adaptive_span(q, t.W, t.Q) : plain_span(q, t.W, t.S, t.stride_w, t.pad_w);
}

// Of the window of output (p, q). 1 where it has no element: its sum is 0, and 0 / 0 would be NaN.
template <class A>
__device__ inline A divisor_of(const AverageParams& t, int p, int q, Span rows, Span cols) {
  if (rows.begin >= rows.end || cols.begin >= cols.end) return A(1);
  if (t.divisor != 0) return static_cast<A>(t.divisor);
  if (t.count_include_pad) {
    return static_cast<A>(int64_t{padded_size(p, t.H, t.R, t.stride_h, t.pad_h)} *
                          padded_size(q, t.W, t.S, t.stride_w, t.pad_w));
  }
  return static_cast<A>(int64_t{rows.end - rows.begin} * (cols.end - cols.begin));
}

template <class T, int kVector>
__device__ inline void store_average(T* to, const accumulator_t<T> (&sum)[kVector],
                                     accumulator_t<T> divisor) {
  Pack<T, kVector> rounded;
#pragma unroll
  for (int e = 0; e < kVector; ++e) rounded.at[e] = narrow<T>(sum[e] / divisor);
  store_pack(to, rounded);
}

template <class T, int kVector>
__device__ inline const T* image_of(const AverageParams& t, const PoolItem& item) {
  return static_cast<const T*>(t.input) + (item.image * t.H * t.W * t.channels + item.channel);
}

template <class T, int kVector>
__global__ void __launch_bounds__(kThreads) avg_pool2d_fprop_kernel(const AverageParams t) {
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < t.items;
       i += gridDim.x * int64_t{kThreads}) {
    const PoolItem item = item_at<kVector>(t, i, t.P, t.Q);
    const Span rows = row_span(t, item.row), cols = column_span(t, item.col);
    const T* image = image_of<T, kVector>(t, item);
    accumulator_t<T> sum[kVector] = {};
    for (int h = rows.begin; h < rows.end; ++h) {
      const T* x = image + (int64_t{h} * t.W + cols.begin) * t.channels;
#pragma unroll 2  // by four, ptxas spills the window's size to keep 1,536 threads on an SM
      for (int w = cols.begin; w < cols.end; ++w, x += t.channels) {
        const auto pack = load_pack<T, kVector>(x);
#pragma unroll
        for (int e = 0; e < kVector; ++e) sum[e] += widen(pack.at[e]);
      }
    }
    store_average(static_cast<T*>(t.out) + item.element, sum,
                  divisor_of<accumulator_t<T>>(t, item.row, item.col, rows, cols));
  }
}

// The same with 32 >> items_log2 lanes to a window: lane l holds item l % items of the warp's.
template <class T, int kVector>
__global__ void __launch_bounds__(kThreads) avg_pool2d_fprop_wide_kernel(const AverageParams t) {
  const int items = 1 << t.items_log2, lanes = kWarp >> t.items_log2;
  const int warp_lane = static_cast<int>(threadIdx.x) % kWarp;
  const int lane = warp_lane >> t.items_log2;
  const int64_t step = int64_t{gridDim.x} * (kThreads / kWarp) * items;
  const int64_t warp = blockIdx.x * int64_t{kThreads / kWarp} + threadIdx.x / kWarp;
  for (int64_t first = warp * items; first < t.items; first += step) {
    const int64_t i = first + (warp_lane & (items - 1));
    // Past the last item a lane repeats it and does not store: all 32 meet in the shuffles.
    const PoolItem item = item_at<kVector>(t, i < t.items ? i : t.items - 1, t.P, t.Q);
    const Span rows = row_span(t, item.row), cols = column_span(t, item.col);
    const T* image = image_of<T, kVector>(t, item);
    const int width = max(cols.end - cols.begin, 1);
    const int down = lanes / width, right = lanes - down * width;  // a step of `lanes` elements

    accumulator_t<T> sum[kVector] = {};
    int h = rows.begin + lane / width, w = cols.begin + lane % width;
    if (cols.begin >= cols.end) h = rows.end;
    while (h < rows.end) {
      accumulator_t<T> run[kVector] = {};
#pragma unroll 4
      for (int i = 0; i < kRun && h < rows.end; ++i) {
        const auto pack = load_pack<T, kVector>(image + (int64_t{h} * t.W + w) * t.channels);
#pragma unroll
        for (int e = 0; e < kVector; ++e) run[e] += widen(pack.at[e]);
        w += right;
        h += down;
        if (w >= cols.end) {
          w -= width;
          ++h;
        }
      }
#pragma unroll
      for (int e = 0; e < kVector; ++e) sum[e] += run[e];
    }
    for (int offset = kWarp / 2; offset >= items; offset /= 2) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        sum[e] += __shfl_down_sync(0xffffffffu, sum[e], static_cast<unsigned>(offset));
      }
    }
    if (lane == 0 && i < t.items) {
      store_average(static_cast<T*>(t.out) + item.element, sum,
                    divisor_of<accumulator_t<T>>(t, item.row, item.col, rows, cols));
    }
  }
}

// Adaptive window p covers x when p * size < (x + 1) * outputs and (p + 1) * size > x * outputs.
__device__ inline Cover adaptive_over(int x, int size, int outputs) {
  return {static_cast<int>(divide(int64_t{x} * outputs, size).quotient),
          static_cast<int>(divide((int64_t{x} + 1) * outputs + (size - 1), size).quotient)};
}

template <class T, int kVector>
__global__ void __launch_bounds__(kThreads) avg_pool2d_dgrad_kernel(const AverageParams t) {
  using A = accumulator_t<T>;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < t.items;
       i += gridDim.x * int64_t{kThreads}) {
    const PoolItem item = item_at<kVector>(t, i, t.H, t.W);
    const Cover over_row = t.adaptive ? adaptive_over(item.row, t.H, t.P)
                                      : windows_over(item.row, t.pad_h, t.stride_h, t.R, t.P);
    const Cover over_col = t.adaptive ? adaptive_over(item.col, t.W, t.Q)
                                      : windows_over(item.col, t.pad_w, t.stride_w, t.S, t.Q);
    const T* grad =
        static_cast<const T*>(t.input) + (item.image * t.P * t.Q * t.channels + item.channel);
    A sum[kVector] = {};
    for (int p = over_row.begin; p < over_row.end; ++p) {
      const Span rows = row_span(t, p);
      A line[kVector] = {};
#pragma unroll 1  // divisions are long: copies of the body would only fill the instruction cache
      for (int q = over_col.begin; q < over_col.end; ++q) {
        const A divisor = divisor_of<A>(t, p, q, rows, column_span(t, q));
        const auto dy = load_pack<T, kVector>(grad + (int64_t{p} * t.Q + q) * t.channels);
#pragma unroll
        for (int e = 0; e < kVector; ++e) line[e] += widen(dy.at[e]) / divisor;
      }
#pragma unroll
      for (int e = 0; e < kVector; ++e) sum[e] += line[e];
    }
    store_average(static_cast<T*>(t.out) + item.element, sum, A(1));
  }
}

AverageParams parameters_of(const Pool2dProblem& p, int vector) {
  AverageParams t = {};
  set_geometry(t, p, vector);
  t.adaptive = p.kind == PoolKind::kAdaptiveAverage;
  t.divisor = t.adaptive ? 0.0 : static_cast<double>(p.divisor_override);
  t.count_include_pad = !t.adaptive && p.count_include_pad;
  return t;
}

// The largest window, in elements.
int64_t window_size(const Pool2dProblem& p) {
  if (p.kind == PoolKind::kAverage) return p.R * p.S;
  return ((p.H + p.P - 1) / p.P) * ((p.W + p.Q - 1) / p.Q);
}

// Calls f(T{}, vector) with the element type of a problem; vector is a compile-time constant.
template <class F>
void dispatch_average(const Pool2dProblem& p, const Pool2dArgs& a, F&& f) {
  dispatch_element(p.dtype, [&](auto element) {
    constexpr int kVector = kPackSize<decltype(element)>;
    if (packs_fit(p, kVector, {a.input, a.grad, a.out})) {
      f(element, std::integral_constant<int, kVector>{});
    } else {
      f(element, std::integral_constant<int, 1>{});
    }
  });
}

void launch_fprop(const char* name, const Pool2dProblem& p, const Pool2dArgs& a,
                  const Context& context) {
  if (p.output_elements() == 0) return;  // window_size() divides by the output's size
  dispatch_average(p, a, [&](auto element, auto vector) {
    using T = decltype(element);
    constexpr int kVector = decltype(vector)::value;
    AverageParams t = parameters_of(p, vector);
    t.input = a.input;
    t.out = a.out;
    t.items = p.output_elements() / vector;
    const bool wide = window_size(p) >= kLargeWindow;
    // NHWC: 64 bytes of neighbouring channels, or 8 where channels come one by one.
    t.items_log2 = p.layout == Layout::kNCHW ? 0 : kVector > 1 ? 2 : 3;
    const int64_t per_block = wide ? (kThreads / kWarp) << t.items_log2 : kThreads;
    launch_kernel(
        {name, blocks_for(t.items, per_block), kThreads, context.stream},
        wide ? &avg_pool2d_fprop_wide_kernel<T, kVector> : &avg_pool2d_fprop_kernel<T, kVector>, t);
  });
}

void launch_dgrad(const char* name, const Pool2dProblem& p, const Pool2dArgs& a,
                  const Context& context) {
  dispatch_average(p, a, [&](auto element, auto vector) {
    AverageParams t = parameters_of(p, vector);
    t.input = a.grad;
    t.out = a.out;
    t.items = p.input_elements() / vector;
    launch_kernel({name, blocks_for(t.items, kThreads), kThreads, context.stream},
                  &avg_pool2d_dgrad_kernel<decltype(element), decltype(vector)::value>, t);
  });
}

}  // namespace
}  // namespace cuda

void add_cuda_avg_pool2d_rows(KernelTable& table) {
  using namespace cuda;
  const auto add = [&](const char* name, const char* op, Direction direction, auto launch) {
    table.pool2d.push_back(pool2d_row(name, op, direction,
                                      [name, launch](const Pool2dProblem& p, const Pool2dArgs& a,
                                                     const Context& c) { launch(name, p, a, c); }));
  };
  add(kFpropName, "avg_pool2d", Direction::kFprop, launch_fprop);
  add(kDgradName, "avg_pool2d", Direction::kDgrad, launch_dgrad);
  add(kAdaptiveFpropName, "adaptive_avg_pool2d", Direction::kFprop, launch_fprop);
  add(kAdaptiveDgradName, "adaptive_avg_pool2d", Direction::kDgrad, launch_dgrad);
}

}  // namespace fastconv
