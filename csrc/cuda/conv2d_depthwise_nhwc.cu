// Depthwise convolution in NHWC: a thread computes 4 neighbouring outputs of a row for a pack of
// channels (16 bytes where the multiplier is 1 and channels and pointers allow, else one channel).
//
// Neighbouring threads are neighbouring packs, so that a warp reads whole lines. Weights lie
// channel by channel in memory (K, R, S): a block turns a few filter rows at a time into taps by
// channels in shared memory. With stride and dilation 1 a thread takes three taps at once: 6 packs
// and 3 weights a channel for 12 multiply-adds a channel.
#include <string>

#include "cuda/conv2d_depthwise.h"

namespace fastconv {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kAcross = 4;              // outputs of a thread
constexpr int kTogether = 3;            // taps taken at once
constexpr int64_t kBudget = 32 * 1024;  // bytes of weights; 31x31 passes in a few turns

struct Tiling {
  int lanes_log2;   // neighbouring threads along packs
  int packs;        // of all channels
  int pack_blocks;  // packs / lanes, rounded up
  int row_items;    // threads' worth of work of a row: positions / kAcross, rounded up
  int filter_rows;  // in shared memory at a time
  int64_t items;    // of all images
  int64_t blocks;
};

// Filter rows r0 to r0 + rows - 1 of term j, as [tap][channel of the block], turned for dgrad.
template <class T, int kVector>
__device__ inline void load_weights(const DepthwiseParams& t, const Tiling& tiling,
                                    int first_channel, int j, int r0, int rows,
                                    accumulator_t<T>* weights) {
  const int channels = kVector << tiling.lanes_log2;
  const int taps = t.h.taps * t.w.taps, count = rows * t.w.taps;
  for (int i = static_cast<int>(threadIdx.x); i < count * channels; i += kThreads) {
    const int channel = i / count, tap = i - channel * count;
    const int64_t filter = t.filter_of(min(first_channel + channel, t.channels - 1), j);
    const int at = r0 * t.w.taps + tap;
    weights[tap * channels + channel] =
        widen(static_cast<const T*>(t.filter)[filter * taps + (t.backward ? taps - 1 - at : at)]);
  }
}

template <class T, int kVector>
__device__ inline void add_tap(const accumulator_t<T>* weights, const Pack<T, kVector>* x,
                               accumulator_t<T> (&sum)[kAcross][kVector]) {
#pragma unroll
  for (int i = 0; i < kAcross; ++i) {
#pragma unroll
    for (int e = 0; e < kVector; ++e) sum[i][e] += weights[e] * widen(x[i].at[e]);
  }
}

// One row of the filter over one row of the source. `u` is the virtual column of output 0, tap 0.
template <class T, int kVector, bool kUnit>
__device__ inline void add_row(const DepthwiseParams& t, const T* row, int u,
                               const accumulator_t<T>* weights, int channels,
                               accumulator_t<T> (&sum)[kAcross][kVector]) {
  const auto load = [&](int virtual_column) {
    const int w = source_at(t.w, virtual_column);
    return w >= 0 ? load_pack<T, kVector>(row + w * t.src.w) : Pack<T, kVector>{};
  };
  int s = 0;
  if constexpr (kUnit) {
#pragma unroll 1
    for (; s + kTogether <= t.w.taps; s += kTogether) {
      Pack<T, kVector> x[kAcross + kTogether - 1];
#pragma unroll
      for (int i = 0; i < kAcross + kTogether - 1; ++i) {
        const int w = u + s + i;
        x[i] =
            within(w, t.w.source) ? load_pack<T, kVector>(row + w * t.src.w) : Pack<T, kVector>{};
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        add_tap<T, kVector>(weights + (s + i) * channels, x + i, sum);
      }
    }
  }
#pragma unroll 1
  for (; s < t.w.taps; ++s) {
    Pack<T, kVector> x[kAcross];
#pragma unroll
    for (int i = 0; i < kAcross; ++i) x[i] = load(u + i * t.w.jump + s * t.w.dil);
    add_tap<T, kVector>(weights + s * channels, x, sum);
  }
}

// kUnit: jump and dilation of the columns are 1, with no zeros between. The blocks an SM is to hold
// are 64 or 168 registers a thread; ptxas alone spills a few to fit more.
template <class T, int kVector, bool kUnit>
__global__ void __launch_bounds__(kThreads, kVector == 1 ? 8 : 3)
    conv2d_depthwise_nhwc_kernel(const DepthwiseParams t, const Tiling tiling) {
  using A = accumulator_t<T>;
  const int lane = static_cast<int>(threadIdx.x) & ((1 << tiling.lanes_log2) - 1);
  const int item_lane = static_cast<int>(threadIdx.x) >> tiling.lanes_log2;
  const int channels = kVector << tiling.lanes_log2;  // of the block
  SharedCarver carver(shared_memory());
  A* weights = carver.take<A>(int64_t{tiling.filter_rows} * t.w.taps * channels);

  for (int64_t block = blockIdx.x; block < tiling.blocks; block += gridDim.x) {
    const Division part = divide(block, tiling.pack_blocks);
    const int first_channel = part.remainder * channels;
    const int channel = first_channel + lane * kVector;
    const int64_t item = part.quotient * (kThreads >> tiling.lanes_log2) + item_lane;
    const bool active = item < tiling.items && channel < t.channels;
    const Pixel at = pixel_at(active ? item : 0, t.h.target, tiling.row_items);
    const int first = at.col * kAcross;

    A sum[kAcross][kVector] = {};
#pragma unroll 1
    for (int j = 0; j < t.terms; ++j) {
      const T* source = static_cast<const T*>(t.source) + at.n * t.src.n +
                        t.source_channel(active ? channel : 0, j);
#pragma unroll 1
      for (int r0 = 0; r0 < t.h.taps; r0 += tiling.filter_rows) {
        const int rows = min(tiling.filter_rows, t.h.taps - r0);
        __syncthreads();  // the previous rows' readers are done
        load_weights<T, kVector>(t, tiling, first_channel, j, r0, rows, weights);
        __syncthreads();
#pragma unroll 1
        for (int r = 0; r < rows; ++r) {
          const int h = source_at(t.h, at.row * t.h.jump + t.h.start + (r0 + r) * t.h.dil);
          if (!active || h < 0) continue;
          add_row<T, kVector, kUnit>(t, source + h * t.src.h, first * t.w.jump + t.w.start,
                                     weights + r * t.w.taps * channels + lane * kVector, channels,
                                     sum);
        }
      }
    }
    if (!active) continue;
    const int64_t offset = offset_of(t.dst, {at.n, at.row, first}) + channel;
#pragma unroll
    for (int i = 0; i < kAcross; ++i) {
      if (first + i >= t.w.target) break;
      store_results<T, kVector>(t.epilogue, t.out, channel, kVector, offset + i * t.dst.w, 1, true,
                                sum[i]);
    }
  }
}

Tiling tiling_of(const DepthwiseParams& t, int vector, int64_t accumulator_bytes) {
  Tiling tiling = {};
  tiling.packs = t.channels / vector;
  const int most = vector == 1 ? 5 : 3;  // 32 channels, or 8 packs: a line of 128 bytes
  while (tiling.lanes_log2 < most && (1 << tiling.lanes_log2) < tiling.packs) ++tiling.lanes_log2;
  tiling.pack_blocks = to_int(ceil_div(tiling.packs, int64_t{1} << tiling.lanes_log2));
  tiling.row_items = to_int(ceil_div(t.w.target, kAcross));
  tiling.items = t.N * t.h.target * tiling.row_items;
  tiling.blocks = ceil_div(tiling.items, kThreads >> tiling.lanes_log2) * tiling.pack_blocks;
  const int64_t row_bytes = (vector * t.w.taps * accumulator_bytes) << tiling.lanes_log2;
  tiling.filter_rows =
      to_int(std::max<int64_t>(1, std::min<int64_t>(t.h.taps, kBudget / row_bytes)));
  return tiling;
}

template <class T, int kVector, bool kUnit>
void launch_kind(const char* name, const DepthwiseParams& t, void* stream) {
  using A = accumulator_t<T>;
  const Tiling tiling = tiling_of(t, kVector, sizeof(A));
  SharedCarver carver;
  carver.take<A>((int64_t{tiling.filter_rows} * t.w.taps * kVector) << tiling.lanes_log2);
  launch_kernel({name, std::min(tiling.blocks, kMaxBlocks), kThreads, stream, carver.bytes()},
                &conv2d_depthwise_nhwc_kernel<T, kVector, kUnit>, t, tiling);
}

}  // namespace

std::string depthwise_nhwc_supports(const Conv2dProblem& p, const Device& device) {
  // One row of the filter for 64 channels, the widest block.
  const int64_t bytes = 64 * p.S * size_of(accumulator_of(p.dtype)) + 1024;
  if (bytes <= device.shared_memory_per_block) return {};
  return std::to_string(bytes) + " bytes of shared memory";
}

void depthwise_nhwc_launch(const char* name, const Conv2dProblem& p, const Conv2dArgs& args,
                           bool backward, void* stream) {
  const DepthwiseParams t = depthwise_params_of(p, args, backward);
  const bool unit = t.w.jump == 1 && t.w.up == 1 && t.w.dil == 1;
  dispatch_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kVector = kPackSize<T>;
    const bool vector = t.multiplier == 1 && t.channels % kVector == 0 &&
                        is_aligned(t.source, kPackBytes) && is_aligned(t.out, kPackBytes) &&
                        is_aligned(t.epilogue.residual, kPackBytes);
    if (!vector) return launch_kind<T, 1, false>(name, t, stream);
    if (!unit) return launch_kind<T, kVector, false>(name, t, stream);
    launch_kind<T, kVector, true>(name, t, stream);
  });
}

}  // namespace cuda
}  // namespace fastconv
