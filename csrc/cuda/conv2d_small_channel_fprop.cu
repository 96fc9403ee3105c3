// Convolution of at most 4 channels: first layers (LeNet 1 -> 6, VGG 3 -> 64, ResNet's 7x7/2 and
// AlexNet's 11x11/4 stems), whose reduction is too short for an implicit matrix product.
//
// A block computes 128 pixels of an image (32 lanes by 4) for 32 filters: each of its 4 warps takes
// 8 filters, each thread 4 pixels, 32 sums. Per tap a thread reads 4 inputs, different for each
// lane, and 8 weights, the same for the warp: 6 shared loads for 32 multiply-adds. Input patch and
// weights stand in shared memory, as many channels at a time as fit.
//
// Columns of the patch are sorted by their remainder modulo the stride, so that neighbouring
// outputs read neighbouring words whatever the stride: no bank is asked twice.
#include <string>

#include "cuda/conv2d.h"
#include "cuda/table.h"

namespace fastconv {
namespace cuda {
namespace {

constexpr const char* kName = "conv2d_small_channel_sm80_fprop";
constexpr int kMaxChannels = 4;
constexpr int kLanes = 32, kWarps = 4, kThreads = kLanes * kWarps;
constexpr int kFilters = 8;                       // of a thread
constexpr int kBlockFilters = kFilters * kWarps;  // 32
constexpr int kPixels = 4;                        // of a thread
// A weight row's pitch: 16-byte aligned, and its bank moves on by 4 a tap.
constexpr int kPitch = kBlockFilters + 4;
constexpr int64_t kBudget = 32 * 1024;  // bytes for further channels at a time

struct Tiling {
  int columns_log2;  // lanes along q; the other lanes are rows
  int rows;          // of output pixels in a tile
  int tiles_h, tiles_w, filter_blocks;
  int patch_rows, patch_columns;
  int phase_pitch;  // patch columns of one remainder modulo stride_w
  int channels;     // in shared memory at a time
  int64_t blocks;

  FASTCONV_HOST_DEVICE int columns() const { return 1 << columns_log2; }
};

template <class A>
struct Shared {
  A *patch, *weights;  // [channels][patch_rows][stride_w][phase_pitch], [channels * R * S][kPitch]
  int64_t bytes;
  FASTCONV_HOST_DEVICE Shared(SharedCarver carve, const Tiling& t, int stride_w, int taps)
      : patch(carve.take<A>(int64_t{t.channels} * t.patch_rows * stride_w * t.phase_pitch)),
        weights(carve.take<A>(int64_t{t.channels} * taps * kPitch)),
        bytes(carve.bytes()) {}
};

// One tile of the output.
struct TileAt {
  int64_t n;
  int p, q, k;

  __device__ TileAt(const Tiling& t, int64_t block) {
    const Division by_filter = divide(block, t.filter_blocks);
    const Division by_w = divide(by_filter.quotient, t.tiles_w);
    const Division by_h = divide(by_w.quotient, t.tiles_h);
    k = by_filter.remainder * kBlockFilters;
    q = by_w.remainder << t.columns_log2;
    p = by_h.remainder * t.rows;
    n = by_h.quotient;
  }
};

// Channels c0 to c0 + channels - 1 under the tile, zeros outside the input.
template <class T>
__device__ inline void load_patch(const ConvParams& t, const Tiling& tiling, const TileAt& at,
                                  int c0, int channels, accumulator_t<T>* patch) {
  using A = accumulator_t<T>;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  for (int i = static_cast<int>(threadIdx.x) / kLanes; i < channels * tiling.patch_rows;
       i += kWarps) {
    const int c = i / tiling.patch_rows, row = i - c * tiling.patch_rows;
    const int h = at.p * t.stride_h - t.pad_h + row;
    const T* from = static_cast<const T*>(t.input) + at.n * t.in.n + (c0 + c) * t.in.c + h * t.in.h;
    A* to = patch + i * t.stride_w * tiling.phase_pitch;
    for (int column = lane; column < t.stride_w * tiling.phase_pitch; column += kLanes) {
      const int w = at.q * t.stride_w - t.pad_w + column;
      const int position = column / t.stride_w, phase = column - position * t.stride_w;
      to[phase * tiling.phase_pitch + position] =
          within(h, t.H) && within(w, t.W) ? widen(from[w * t.in.w]) : A(0);
    }
  }
}

// The block's 32 filters over the same channels, zeros past the last filter.
template <class T>
__device__ inline void load_weights(const ConvParams& t, const TileAt& at, int c0, int channels,
                                    accumulator_t<T>* weights) {
  using A = accumulator_t<T>;
  const int taps = t.R * t.S, count = channels * taps;
  for (int i = static_cast<int>(threadIdx.x); i < kBlockFilters * count; i += kThreads) {
    const int k = i / count, rest = i - k * count;
    const int c = rest / taps, tap = rest - c * taps;
    const int r = tap / t.S, s = tap - r * t.S;
    const int64_t offset = (at.k + k) * t.flt.n + (c0 + c) * t.flt.c + r * t.flt.h + s * t.flt.w;
    weights[rest * kPitch + k] =
        at.k + k < t.k_per_group ? widen(static_cast<const T*>(t.filter)[offset]) : A(0);
  }
}

// One row of the filter. `x` stands at the thread's first pixel, `pixel_step` apart.
template <class A>
__device__ inline void add_row(const ConvParams& t, const Tiling& tiling, const A* x,
                               int pixel_step, const A* weights, A (&sum)[kPixels][kFilters]) {
  int phase = 0;
#pragma unroll 1
  for (int s = 0; s < t.S; ++s) {
    const auto f = load_pack<A, kFilters>(weights + s * kPitch);
    A v[kPixels];
#pragma unroll
    for (int i = 0; i < kPixels; ++i) v[i] = x[i * pixel_step + phase * tiling.phase_pitch];
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
#pragma unroll
      for (int j = 0; j < kFilters; ++j) sum[i][j] += v[i] * f.at[j];
    }
    for (phase += t.dil_w; phase >= t.stride_w; phase -= t.stride_w) ++x;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    conv2d_small_channel_kernel(const ConvParams t, const Tiling tiling, const bool vector) {
  using A = accumulator_t<T>;
  const Shared<A> shared(SharedCarver(shared_memory()), tiling, t.stride_w, t.R * t.S);
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int first_filter = static_cast<int>(threadIdx.x) / kLanes * kFilters;
  const int column = lane & (tiling.columns() - 1), row = lane >> tiling.columns_log2;
  const int row_lanes = kLanes >> tiling.columns_log2;  // pixels of a thread are as far apart
  const int patch_row = t.stride_w * tiling.phase_pitch;

  for (int64_t block = blockIdx.x; block < tiling.blocks; block += gridDim.x) {
    const TileAt at(tiling, block);
    A sum[kPixels][kFilters] = {};
    for (int c0 = 0; c0 < t.c_per_group; c0 += tiling.channels) {
      const int channels = min(tiling.channels, t.c_per_group - c0);
      __syncthreads();  // the previous channels' readers are done
      load_patch<T>(t, tiling, at, c0, channels, shared.patch);
      load_weights<T>(t, at, c0, channels, shared.weights);
      __syncthreads();
#pragma unroll 1
      for (int i = 0; i < channels * t.R; ++i) {
        const int c = i / t.R, r = i - c * t.R;
        const A* x = shared.patch + column +
                     (c * tiling.patch_rows + row * t.stride_h + r * t.dil_h) * patch_row;
        add_row(t, tiling, x, row_lanes * t.stride_h * patch_row,
                shared.weights + i * t.S * kPitch + first_filter, sum);
      }
    }
    const int k = at.k + first_filter, q = at.q + column;
    const int count = min(kFilters, t.k_per_group - k);
    if (count <= 0 || q >= t.Q) continue;
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      const int p = at.p + row + i * row_lanes;
      if (p >= t.P) break;
      store_results<T, kFilters>(t.epilogue, t.out, k, count,
                                 offset_of(t.res, {at.n, p, q}) + k * t.res.c, t.res.c,
                                 vector && count == kFilters, sum[i]);
    }
  }
}

Tiling tiling_of(const Conv2dProblem& p) {
  Tiling t = {};
  t.columns_log2 = p.Q() <= 8 ? 3 : p.Q() <= 16 ? 4 : 5;
  t.rows = kPixels * (kLanes >> t.columns_log2);
  t.tiles_h = to_int(ceil_div(p.P(), t.rows));
  t.tiles_w = to_int(ceil_div(p.Q(), t.columns()));
  t.filter_blocks = to_int(ceil_div(p.K, kBlockFilters));
  t.patch_rows = to_int((t.rows - 1) * p.stride_h + (p.R - 1) * p.dil_h + 1);
  t.patch_columns = to_int((t.columns() - 1) * p.stride_w + (p.S - 1) * p.dil_w + 1);
  t.phase_pitch = to_int(ceil_div(t.patch_columns, p.stride_w));
  const int64_t channel = (t.patch_rows * p.stride_w * t.phase_pitch + p.R * p.S * kPitch) *
                          size_of(accumulator_of(p.dtype));
  t.channels = to_int(std::max<int64_t>(1, std::min<int64_t>(p.C, kBudget / channel)));
  t.blocks = p.N * t.tiles_h * t.tiles_w * t.filter_blocks;
  return t;
}

int64_t shared_bytes(const Conv2dProblem& p, const Tiling& t) {
  const int taps = to_int(p.R * p.S), stride = to_int(p.stride_w);
  return p.dtype == DType::kFloat64 ? Shared<double>(SharedCarver(), t, stride, taps).bytes
                                    : Shared<float>(SharedCarver(), t, stride, taps).bytes;
}

std::string supports(const Conv2dProblem& p, const Device& device) {
  if (p.G != 1) return std::to_string(p.G) + " groups";
  if (p.C > kMaxChannels) {
    return std::to_string(p.C) + " channels, at most " + std::to_string(kMaxChannels);
  }
  std::string why = refuse_conv_beyond_int(p, kBlockFilters);
  if (!why.empty()) return why;
  // Extents first: their products, sizes of arrays, must fit an int too.
  const int64_t most = device.shared_memory_per_block;
  const int64_t rows = 16 * p.stride_h + p.R * p.dil_h;
  const int64_t columns = kLanes * p.stride_w + p.S * p.dil_w;
  if (rows > most || columns > most || rows * columns > 0x7fffffff) {
    return "a patch of " + std::to_string(rows) + "x" + std::to_string(columns) +
           " positions in shared memory";
  }
  const int64_t needed = shared_bytes(p, tiling_of(p));
  return needed > most ? std::to_string(needed) + " bytes of shared memory" : std::string();
}

template <class T>
void launch_element(const Conv2dProblem& p, const Conv2dArgs& args, void* stream) {
  const ConvParams t = conv_params_of(p, args);
  const Tiling tiling = tiling_of(p);
  const bool vector = t.res.c == 1 && p.K % kFilters == 0 && is_aligned(t.out, kPackBytes) &&
                      is_aligned(t.epilogue.residual, kPackBytes);
  launch_kernel(
      {kName, std::min(tiling.blocks, kMaxBlocks), kThreads, stream, shared_bytes(p, tiling)},
      &conv2d_small_channel_kernel<T>, t, tiling, vector);
}

}  // namespace
}  // namespace cuda

void add_cuda_conv2d_small_channel_rows(KernelTable& table) {
  Conv2dKernel row = cuda::conv2d_row(cuda::kName, Direction::kFprop);
  row.supports = cuda::supports;
  row.cost = [](const Conv2dProblem& p, const Device& device) {
    // Tiles are whole: 32 filters by 128 pixels.
    const cuda::Tiling t = cuda::tiling_of(p);
    const double flops = 2.0 * static_cast<double>(t.blocks * cuda::kThreads * cuda::kFilters) *
                         static_cast<double>(cuda::kPixels * p.C * p.R * p.S);
    const double share = p.dtype == DType::kFloat64 ? 0.25 : 0.5;
    return cuda::expected_us(p.bytes(), flops, share, cuda::busy_part(device, t.blocks, 4));
  };
  row.launch = [](const Conv2dProblem& p, const Conv2dArgs& args, const Context& context) {
    cuda::dispatch_element(p.dtype, [&](auto element) {
      cuda::launch_element<decltype(element)>(p, args, context.stream);
    });
  };
  table.conv2d.push_back(std::move(row));
}

}  // namespace fastconv
