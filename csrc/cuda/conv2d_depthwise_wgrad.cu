// Filter gradient of a depthwise convolution (C/G = 1, any multiplier K/G):
//   dw[k,r,s] = sum over n, p, q of dy[n,p,q,k] * x[n, p*stride_h - pad_h + r*dil_h, ...,
//   k/multiplier]
//
// A thread adds up 4 neighbouring taps of one filter row, for one filter, or in NHWC for a pack of
// 16 bytes of them, over every so many-th pixel of its block's share; a position is worked out
// once for all. Neighbouring threads are neighbouring pixels in NCHW and neighbouring filters in
// NHWC. The block adds its threads' sums in their order; blocks' sums go through the workspace.
#include <string>

#include "cuda/conv2d.h"
#include "cuda/table.h"

namespace fastconv {
namespace cuda {
namespace {

constexpr const char* kName = "conv2d_depthwise_sm80_wgrad";
constexpr int kThreads = 128;
constexpr int kTaps = 4;

struct WgradParams {
  ConvParams conv;
  void* partials;  // null: a block has whole sums
  int64_t pixels_per_split, results, blocks;
  int lanes_log2;     // neighbouring threads along filters
  int filter_blocks;  // filters / (lanes * vector), rounded up
  int tap_blocks;     // of a filter row
  PixelStep step;     // from a thread's pixel to its next
  int multiplier;
};

// What one block does.
struct BlockAt {
  int first_filter, r, s, split;

  __device__ BlockAt(const WgradParams& t, int64_t block, int filters) {
    const Division by_tap = divide(block, t.tap_blocks);
    const Division by_row = divide(by_tap.quotient, t.conv.R);
    const Division by_filter = divide(by_row.quotient, t.filter_blocks);
    s = by_tap.remainder * kTaps;
    r = by_row.remainder;
    first_filter = by_filter.remainder * filters;
    split = static_cast<int>(by_filter.quotient);
  }
};

template <class T, int kVector>
__device__ inline void add_pixels(const WgradParams& t, const BlockAt& at, int k,
                                  accumulator_t<T> (&sum)[kTaps][kVector]) {
  const ConvParams& conv = t.conv;
  const T* grad = static_cast<const T*>(conv.grad) + k * conv.res.c;
  const T* input = static_cast<const T*>(conv.input) + k / t.multiplier * conv.in.c;
  const int pixel_lanes = kThreads >> t.lanes_log2;
  const int64_t begin = at.split * t.pixels_per_split;
  const int64_t end = min(begin + t.pixels_per_split, conv.pixels);
  int64_t index = begin + (static_cast<int>(threadIdx.x) >> t.lanes_log2);
  Pixel pixel = pixel_at(index, conv.P, conv.Q);
#pragma unroll 1
  for (; index < end; index += pixel_lanes) {
    const int h = pixel.row * conv.stride_h - conv.pad_h + at.r * conv.dil_h;
    const int w = pixel.col * conv.stride_w - conv.pad_w + at.s * conv.dil_w;
    if (within(h, conv.H)) {
      const auto g = load_pack<T, kVector>(grad + offset_of(conv.res, pixel));
      const T* row = input + pixel.n * conv.in.n + h * conv.in.h;
      Pack<T, kVector> x[kTaps];
#pragma unroll
      for (int i = 0; i < kTaps; ++i) {
        const int column = w + i * conv.dil_w;
        x[i] = within(column, conv.W) ? load_pack<T, kVector>(row + column * conv.in.w)
                                      : Pack<T, kVector>{};
      }
#pragma unroll
      for (int i = 0; i < kTaps; ++i) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) sum[i][e] += widen(g.at[e]) * widen(x[i].at[e]);
      }
    }
    advance(pixel, t.step, conv.P, conv.Q);
  }
}

// kVector > 1: filters are contiguous and aligned in both tensors, and the multiplier is 1.
template <class T, int kVector>
__global__ void __launch_bounds__(kThreads, 4) conv2d_depthwise_wgrad_kernel(const WgradParams t) {
  using A = accumulator_t<T>;
  SharedCarver carver(shared_memory());
  A* sums = carver.take<A>(kTaps * kVector * kThreads);  // [kTaps * kVector][pixel lane][lane]
  const int thread = static_cast<int>(threadIdx.x);
  const int lanes = 1 << t.lanes_log2, filters = kVector << t.lanes_log2;
  for (int64_t block = blockIdx.x; block < t.blocks; block += gridDim.x) {
    const BlockAt at(t, block, filters);
    const int k = at.first_filter + (thread & (lanes - 1)) * kVector;
    A sum[kTaps][kVector] = {};
    if (k < t.conv.k_per_group * t.conv.G) add_pixels<T, kVector>(t, at, k, sum);
#pragma unroll
    for (int i = 0; i < kTaps; ++i) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) sums[(i * kVector + e) * kThreads + thread] = sum[i][e];
    }
    __syncthreads();
    for (int i = thread; i < kTaps * filters; i += kThreads) {
      const int value = i >> t.lanes_log2, lane = i & (lanes - 1);
      const int s = at.s + value / kVector;
      const int filter = at.first_filter + lane * kVector + value % kVector;
      if (s >= t.conv.S || filter >= t.conv.k_per_group * t.conv.G) continue;
      A total = 0;
#pragma unroll 4
      for (int from = lane; from < kThreads; from += lanes) total += sums[value * kThreads + from];
      // Both filter layouts are K, R, S where C/G is 1.
      const int64_t offset = (int64_t{filter} * t.conv.R + at.r) * t.conv.S + s;
      store_partial<T>(t.partials, t.conv.out, t.results, at.split, offset, total);
    }
    __syncthreads();
  }
}

struct Cut {
  int lanes_log2;
  int64_t filter_blocks, tap_blocks, blocks;
  Split split;
};

// How a problem is cut into blocks where threads take `vector` filters.
Cut cut_of(const Conv2dProblem& p, int vector) {
  Cut cut = {};
  const int most = p.layout == Layout::kNCHW ? 0 : vector == 1 ? 5 : 3;  // a line of 128 bytes
  while (cut.lanes_log2 < most && (int64_t{vector} << cut.lanes_log2) < p.K) ++cut.lanes_log2;
  cut.filter_blocks = ceil_div(p.K, int64_t{vector} << cut.lanes_log2);
  cut.tap_blocks = ceil_div(p.S, kTaps);
  cut.blocks = cut.filter_blocks * p.R * cut.tap_blocks;
  cut.split = split_sum(p.N * p.P() * p.Q(), cut.blocks, p.filter_elements(),
                        size_of(accumulator_of(p.dtype)));
  return cut;
}

int widest_vector(const Conv2dProblem& p) {
  const int64_t pack = kPackBytes / size_of(p.dtype);
  return p.layout == Layout::kNHWC && p.K == p.C && p.K % pack == 0 ? to_int(pack) : 1;
}

template <class T, int kVector>
void launch_vector(const Conv2dProblem& p, WgradParams t, const Cut& cut, void* stream) {
  const int64_t pixel_lanes = kThreads >> cut.lanes_log2;
  t.step = pixel_step(pixel_lanes, t.conv.P, t.conv.Q);
  t.pixels_per_split = cut.split.items_per_split;
  t.results = p.filter_elements();
  t.blocks = cut.blocks * cut.split.splits;
  t.lanes_log2 = cut.lanes_log2;
  t.filter_blocks = to_int(cut.filter_blocks);
  t.tap_blocks = to_int(cut.tap_blocks);
  SharedCarver carver;
  carver.take<accumulator_t<T>>(kTaps * kVector * kThreads);
  launch_kernel({kName, std::min(t.blocks, kMaxBlocks), kThreads, stream, carver.bytes()},
                &conv2d_depthwise_wgrad_kernel<T, kVector>, t);
}

void launch(const Conv2dProblem& p, const Conv2dArgs& args, const Context& context) {
  const bool aligned = is_aligned(args.grad, kPackBytes) && is_aligned(args.input, kPackBytes);
  const int vector = aligned ? widest_vector(p) : 1;
  Cut cut = cut_of(p, vector);
  cut.split = cut_of(p, widest_vector(p)).split;  // what the workspace was asked for
  WgradParams t = {};
  t.conv = conv_params_of(p, args);
  t.partials = cut.split.splits > 1 ? args.workspace : nullptr;
  t.multiplier = to_int(p.K / p.G);
  dispatch_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (vector > 1) {
      launch_vector<T, kPackSize<T>>(p, t, cut, context.stream);
    } else {
      launch_vector<T, 1>(p, t, cut, context.stream);
    }
  });
  if (cut.split.splits > 1) {
    reduce_partials(kName, p.dtype, args.workspace, args.out, p.filter_elements(), cut.split.splits,
                    context.stream);
  }
}

}  // namespace
}  // namespace cuda

void add_cuda_conv2d_depthwise_wgrad_rows(KernelTable& table) {
  Conv2dKernel row = cuda::conv2d_row(cuda::kName, Direction::kWgrad);
  row.supports = [](const Conv2dProblem& p, const Device&) {
    if (p.C != p.G) return std::to_string(p.C / p.G) + " channels a group, not 1";
    return cuda::refuse_conv_beyond_int(p, 32 * cuda::kPackBytes);
  };
  row.cost = [](const Conv2dProblem& p, const Device& device) {
    // 5 loads for 4 multiply-adds, through L1.
    const cuda::Cut cut = cuda::cut_of(p, cuda::widest_vector(p));
    return cuda::expected_us(p.bytes(), p.flops(), 0.1,
                             cuda::busy_part(device, cut.blocks * cut.split.splits, 4));
  };
  row.workspace = [](const Conv2dProblem& p, const Device&) {
    return cuda::split_workspace(cuda::cut_of(p, cuda::widest_vector(p)).split, p.filter_elements(),
                                 p.dtype);
  };
  row.launch = cuda::launch;
  table.conv2d.push_back(std::move(row));
}

}  // namespace fastconv
