// Convolution, bias or scale and shift, activation and max pooling in one kernel, for small
// networks whose layers are shorter than a launch.
//
// A block computes the convolution under a tile of pooled outputs, for 8 filters: up to 512
// positions, 4 a thread. Per tap a thread reads 4 inputs and the 8 weights that all threads read: 6
// shared loads for 32 multiply-adds. Input patch and weights pass through shared memory a few
// channels at a time. Results are rounded to the element type into shared memory and pooled from
// there, as if they had been stored: the same values as by convolution and pooling apart. Where
// windows overlap two tiles, both compute what they share.
#include <limits>
#include <string>

#include "cuda/conv2d.h"
#include "cuda/table.h"

namespace fastconv {
namespace cuda {
namespace {

constexpr const char* kName = "conv2d_max_pool2d_sm80_fprop";
constexpr int kThreads = 128;
constexpr int kPositions = 4;  // of a thread
constexpr int kMaxPositions = kThreads * kPositions;
constexpr int kFilters = 8;
constexpr int kMaxChannels = 64;        // a group; more is worth a kernel of its own
constexpr int64_t kBudget = 48 * 1024;  // bytes of shared memory that need no opt-in

// Here, since a host function, constexpr or not, may not be called inside a kernel.
template <class A>
constexpr A kMinusInfinity = -std::numeric_limits<A>::infinity();

struct Window {
  int R, S, stride_h, stride_w, pad_h, pad_w, P, Q;  // P, Q: pooled
};

struct Tiling {
  int pooled_rows, pooled_columns;      // of a tile
  int rows, columns;                    // of the convolution under it
  int patch_rows, patch_columns;        // of the input under that
  int tiles_h, tiles_w, filter_blocks;  // filter_blocks: of a group
  int channels;                         // in shared memory at a time
  int64_t blocks;
};

template <class T>
struct Shared {
  using A = accumulator_t<T>;
  A *patch, *weights;  // [channels][patch_rows][patch_columns], [channels * R * S][kFilters]
  T* results;          // [kFilters][rows * columns]
  int64_t bytes;
  FASTCONV_HOST_DEVICE Shared(SharedCarver carve, const Tiling& t, int taps)
      : patch(carve.take<A>(int64_t{t.channels} * t.patch_rows * t.patch_columns)),
        weights(carve.take<A>(int64_t{t.channels} * taps * kFilters)),
        results(carve.take<T>(int64_t{kFilters} * t.rows * t.columns)),
        bytes(carve.bytes()) {}
};

// One tile: where its pooled outputs, and the convolution under them, begin.
struct TileAt {
  int64_t n;
  int group, k_in_group, filters;
  int pooled_row, pooled_column, p, q;

  __device__ TileAt(const ConvParams& t, const Window& window, const Tiling& tiling,
                    int64_t block) {
    const Division by_filter = divide(block, tiling.filter_blocks);
    const Division by_group = divide(by_filter.quotient, t.G);
    const Division by_w = divide(by_group.quotient, tiling.tiles_w);
    const Division by_h = divide(by_w.quotient, tiling.tiles_h);
    n = by_h.quotient;
    group = by_group.remainder;
    k_in_group = by_filter.remainder * kFilters;
    filters = min(kFilters, t.k_per_group - k_in_group);
    pooled_row = by_h.remainder * tiling.pooled_rows;
    pooled_column = by_w.remainder * tiling.pooled_columns;
    p = pooled_row * window.stride_h - window.pad_h;
    q = pooled_column * window.stride_w - window.pad_w;
  }
};

// Channels c0 to c0 + channels - 1 of the group under the tile, zeros outside, and their weights.
template <class T>
__device__ inline void load_operands(const ConvParams& t, const Tiling& tiling, const TileAt& at,
                                     int c0, int channels, const Shared<T>& shared) {
  using A = accumulator_t<T>;
  const int thread = static_cast<int>(threadIdx.x);
  const int area = tiling.patch_rows * tiling.patch_columns;
  const T* input =
      static_cast<const T*>(t.input) + at.n * t.in.n + (at.group * t.c_per_group + c0) * t.in.c;
  for (int i = thread; i < channels * area; i += kThreads) {
    const int c = i / area, rest = i - c * area;
    const int row = rest / tiling.patch_columns, column = rest - row * tiling.patch_columns;
    const int h = at.p * t.stride_h - t.pad_h + row, w = at.q * t.stride_w - t.pad_w + column;
    shared.patch[i] = within(h, t.H) && within(w, t.W)
                          ? widen(input[c * t.in.c + h * t.in.h + w * t.in.w])
                          : A(0);
  }
  const int taps = t.R * t.S, count = channels * taps;
  const int64_t k0 = at.group * t.k_per_group + at.k_in_group;
  const T* filter = static_cast<const T*>(t.filter) + k0 * t.flt.n + c0 * t.flt.c;
  for (int i = thread; i < kFilters * count; i += kThreads) {
    const int k = i / count, rest = i - k * count;
    const int c = rest / taps, tap = rest - c * taps;
    const int r = tap / t.S, s = tap - r * t.S;
    const int64_t offset = k * t.flt.n + c * t.flt.c + r * t.flt.h + s * t.flt.w;
    shared.weights[rest * kFilters + k] = k < at.filters ? widen(filter[offset]) : A(0);
  }
}

template <class T>
__device__ inline void add_channels(const ConvParams& t, const Tiling& tiling, int channels,
                                    const Shared<T>& shared, const int (&patch_at)[kPositions],
                                    accumulator_t<T> (&sum)[kPositions][kFilters]) {
  using A = accumulator_t<T>;
  const A* weights = shared.weights;
#pragma unroll 1
  for (int i = 0; i < channels * t.R; ++i) {
    const int c = i / t.R, r = i - c * t.R;
    const A* row = shared.patch + (c * tiling.patch_rows + r * t.dil_h) * tiling.patch_columns;
#pragma unroll 1
    for (int s = 0; s < t.S; ++s, weights += kFilters) {
      const auto f = load_pack<A, kFilters>(weights);
      A x[kPositions];
#pragma unroll
      for (int e = 0; e < kPositions; ++e) x[e] = row[patch_at[e] + s * t.dil_w];
#pragma unroll
      for (int e = 0; e < kPositions; ++e) {
#pragma unroll
        for (int j = 0; j < kFilters; ++j) sum[e][j] += x[e] * f.at[j];
      }
    }
  }
}

// The maximum over one window of results: an element becomes it when it is greater than the maximum
// so far, or NaN. Results outside the convolution's output count as -inf.
template <class T>
__device__ inline T pool_window(const ConvParams& t, const Window& window, const Tiling& tiling,
                                const TileAt& at, int row, int column, const T* results) {
  using A = accumulator_t<T>;
  A most = kMinusInfinity<A>;
  T best = narrow<T>(most);  // as stored: a conversion and back would lose a NaN's bits
  for (int r = 0; r < window.R; ++r) {
    const int y = row * window.stride_h + r;
    if (!within(at.p + y, t.P)) continue;
    for (int s = 0; s < window.S; ++s) {
      const int x = column * window.stride_w + s;
      if (!within(at.q + x, t.Q)) continue;
      const T result = results[y * tiling.columns + x];
      const A value = widen(result);
      if (value > most || value != value) {
        most = value;
        best = result;
      }
    }
  }
  return best;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    conv2d_max_pool2d_kernel(const ConvParams t, const Window window, const Tiling tiling,
                             const Strides4 out) {
  using A = accumulator_t<T>;
  const Shared<T> shared(SharedCarver(shared_memory()), tiling, t.R * t.S);
  const int thread = static_cast<int>(threadIdx.x);
  const int positions = tiling.rows * tiling.columns;
  int patch_at[kPositions];  // of a position past the last: the first's
#pragma unroll
  for (int e = 0; e < kPositions; ++e) {
    const int position = thread + e * kThreads, row = position / tiling.columns;
    const int column = position - row * tiling.columns;
    patch_at[e] =
        position < positions ? row * t.stride_h * tiling.patch_columns + column * t.stride_w : 0;
  }

  for (int64_t block = blockIdx.x; block < tiling.blocks; block += gridDim.x) {
    const TileAt at(t, window, tiling, block);
    const int k0 = at.group * t.k_per_group + at.k_in_group;
    A sum[kPositions][kFilters] = {};
    for (int c0 = 0; c0 < t.c_per_group; c0 += tiling.channels) {
      const int channels = min(tiling.channels, t.c_per_group - c0);
      __syncthreads();  // the previous channels' and results' readers are done
      load_operands<T>(t, tiling, at, c0, channels, shared);
      __syncthreads();
      add_channels<T>(t, tiling, channels, shared, patch_at, sum);
    }

#pragma unroll
    for (int e = 0; e < kPositions; ++e) {
      const int position = thread + e * kThreads;
      if (position >= positions) break;
      store_results<T, kFilters>(t.epilogue, shared.results, k0, at.filters, position, positions,
                                 false, sum[e]);
    }
    __syncthreads();

    const int pooled = tiling.pooled_rows * tiling.pooled_columns;
    for (int i = thread; i < pooled * at.filters; i += kThreads) {
      // Neighbouring threads write neighbours.
      const int j = out.c == 1 ? i % at.filters : i / pooled;
      const int position = out.c == 1 ? i / at.filters : i % pooled;
      const int row = position / tiling.pooled_columns;
      const int column = position - row * tiling.pooled_columns;
      const Pixel to = {at.n, at.pooled_row + row, at.pooled_column + column};
      if (to.row >= window.P || to.col >= window.Q) continue;
      static_cast<T*>(t.out)[offset_of(out, to) + (k0 + j) * out.c] =
          pool_window(t, window, tiling, at, row, column, shared.results + j * positions);
    }
  }
}

int64_t shared_bytes(const Conv2dProblem& p, const Tiling& t) {
  int64_t bytes = 0;
  dispatch_element(p.dtype, [&](auto element) {
    bytes = Shared<decltype(element)>(SharedCarver(), t, to_int(p.R * p.S)).bytes;
  });
  return bytes;
}

void set_tile(Tiling& t, const Conv2dProblem& p, int64_t pooled_rows, int64_t pooled_columns) {
  const EpiloguePool& pool = p.epilogue.pool;
  t.pooled_rows = to_int(pooled_rows);
  t.pooled_columns = to_int(pooled_columns);
  t.rows = to_int((pooled_rows - 1) * pool.stride_h + pool.R);
  t.columns = to_int((pooled_columns - 1) * pool.stride_w + pool.S);
  t.patch_rows = to_int((t.rows - 1) * p.stride_h + (p.R - 1) * p.dil_h + 1);
  t.patch_columns = to_int((t.columns - 1) * p.stride_w + (p.S - 1) * p.dil_w + 1);
}

// The largest tile of no more than 512 positions whose single channel fits the budget, and as many
// channels at a time as then fit.
Tiling tiling_of(const Conv2dProblem& p) {
  const EpiloguePool& pool = p.epilogue.pool;
  const int64_t P = pool.P(p.P()), Q = pool.Q(p.Q());
  Tiling t = {};
  t.channels = 1;
  set_tile(t, p, std::min<int64_t>(P, kMaxPositions), std::min<int64_t>(Q, kMaxPositions));
  const auto fits = [&] {
    return int64_t{t.rows} * t.columns <= kMaxPositions && shared_bytes(p, t) <= kBudget;
  };
  while (!fits() && (t.pooled_rows > 1 || t.pooled_columns > 1)) {
    if (t.pooled_rows >= t.pooled_columns) {
      set_tile(t, p, (t.pooled_rows + 1) / 2, t.pooled_columns);
    } else {
      set_tile(t, p, t.pooled_rows, (t.pooled_columns + 1) / 2);
    }
  }
  for (++t.channels; t.channels <= p.C / p.G && shared_bytes(p, t) <= kBudget; ++t.channels) {
  }
  --t.channels;
  t.tiles_h = to_int(ceil_div(P, t.pooled_rows));
  t.tiles_w = to_int(ceil_div(Q, t.pooled_columns));
  t.filter_blocks = to_int(ceil_div(p.K / p.G, kFilters));
  t.blocks = p.N * t.tiles_h * t.tiles_w * p.G * t.filter_blocks;
  return t;
}

std::string supports(const Conv2dProblem& p, const Device& device) {
  const EpiloguePool& pool = p.epilogue.pool;
  if (p.epilogue.residual) return "a residual";
  if (p.C / p.G > kMaxChannels) {
    return std::to_string(p.C / p.G) + " channels a group, at most " + std::to_string(kMaxChannels);
  }
  std::string why = refuse_conv_beyond_int(p, kFilters);
  if (!why.empty()) return why;
  if (pool.R > kMaxPositions || pool.S > kMaxPositions || pool.R * pool.S > kMaxPositions) {
    return "a pooling window of " + std::to_string(pool.R) + "x" + std::to_string(pool.S) +
           ", at most " + std::to_string(kMaxPositions) + " positions";
  }
  // Extents first: their products, sizes of arrays, must fit an int too.
  const int64_t most = device.shared_memory_per_block;
  const int64_t rows = (kMaxPositions - 1) * pool.stride_h + pool.R;
  const int64_t columns = (kMaxPositions - 1) * pool.stride_w + pool.S;
  const int64_t patch_rows = rows * p.stride_h + p.R * p.dil_h;
  const int64_t patch_columns = columns * p.stride_w + p.S * p.dil_w;
  why = refuse_beyond_int({{"patch height", patch_rows}, {"patch width", patch_columns}});
  if (!why.empty()) return why;
  const int64_t needed = shared_bytes(p, tiling_of(p));
  return needed > most ? std::to_string(needed) + " bytes of shared memory" : std::string();
}

template <class T>
void launch_element(const Conv2dProblem& p, const Conv2dArgs& args, void* stream) {
  const EpiloguePool& pool = p.epilogue.pool;
  const int64_t P = pool.P(p.P()), Q = pool.Q(p.Q());
  const Tiling tiling = tiling_of(p);
  const Window window = {to_int(pool.R),
                         to_int(pool.S),
                         to_int(pool.stride_h),
                         to_int(pool.stride_w),
                         to_int(pool.pad_h),
                         to_int(pool.pad_w),
                         to_int(P),
                         to_int(Q)};
  launch_kernel(
      {kName, std::min(tiling.blocks, kMaxBlocks), kThreads, stream, shared_bytes(p, tiling)},
      &conv2d_max_pool2d_kernel<T>, conv_params_of(p, args), window, tiling,
      dense_strides(p.layout, p.K, P, Q));
}

}  // namespace
}  // namespace cuda

void add_cuda_conv2d_max_pool2d_rows(KernelTable& table) {
  Conv2dKernel row = cuda::conv2d_row(cuda::kName, Direction::kFprop);
  row.op = "conv2d_max_pool2d";
  row.supports = cuda::supports;
  row.cost = [](const Conv2dProblem& p, const Device& device) {
    const cuda::Tiling t = cuda::tiling_of(p);
    const double flops = 2.0 * static_cast<double>(t.blocks * cuda::kMaxPositions) *
                         static_cast<double>(cuda::kFilters * (p.C / p.G) * p.R * p.S);
    const EpiloguePool& pool = p.epilogue.pool;
    const int64_t results = p.N * p.K * pool.P(p.P()) * pool.Q(p.Q());
    const double bytes = static_cast<double>(size_of(p.dtype) *
                                             (p.input_elements() + p.filter_elements() + results));
    const double share = p.dtype == DType::kFloat64 ? 0.2 : 0.4;
    return cuda::expected_us(bytes, flops, share, cuda::busy_part(device, t.blocks, 4));
  };
  row.launch = [](const Conv2dProblem& p, const Conv2dArgs& args, const Context& context) {
    cuda::dispatch_element(p.dtype, [&](auto element) {
      cuda::launch_element<decltype(element)>(p, args, context.stream);
    });
  };
  table.conv2d.push_back(std::move(row));
}

}  // namespace fastconv
