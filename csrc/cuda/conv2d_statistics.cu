// One kernel: a block merges a few filters' tiles, in order.
//
// With d_i = mean_i - mean_0, Chan's formula for all tiles at once needs the three sums of
// n_i * d_i, n_i * d_i^2 and M2_i, in double:
//   mean = mean_0 + S1 / n,   M2 = S3 + S2 - S1^2 / n.
// The subtraction is harmless: d_0 = 0, so one tile's distance from the mean is mean - mean_0, and
// S2 is at most (1 + n / n_0) times the distances' part of M2. A million tiles leave 10 digits.
#include "cuda/conv2d.h"
#include "cuda/conv2d_statistics.h"

namespace fastconv {
namespace cuda {
namespace {

// 4 filters a block: a tile's 4 pairs are one 32-byte sector. 256 threads then stand below each
// other, so that 6,000 tiles (ResNet's first layers at batch 256) are 25 pairs a thread.
constexpr int kThreads = 1024, kFilters = 4;
constexpr int kRows = kThreads / kFilters;
constexpr int kInFlight = 8;  // loads a thread has under way

struct MergeParams {
  const float* partials;
  float *mean_out, *var_out;
  int64_t tiles, pixels_per_tile, pixels;
  int64_t K;
};

struct MergeSums {
  double *first, *second;
  int64_t bytes;
  FASTCONV_HOST_DEVICE explicit MergeSums(SharedCarver carve)
      : first(carve.take<double>(kThreads)),
        second(carve.take<double>(kThreads)),
        bytes(carve.bytes()) {}
};

// S1 and S2 + S3 over the thread's tiles: `row` and every kRows-th from there.
__device__ inline void sum_tiles(const MergeParams& t, int64_t k, int row, float centre,
                                 double& first, double& second) {
  const double full = static_cast<double>(t.pixels_per_tile);
  const double last = static_cast<double>(t.pixels - (t.tiles - 1) * t.pixels_per_tile);
  const auto pair_at = [&](int64_t tile) {
    return load_pack<float, 2>(t.partials + (tile * t.K + k) * 2);
  };
  const auto add = [&](int64_t tile, const Pack<float, 2>& pair) {
    const double d = static_cast<double>(pair.at[0]) - static_cast<double>(centre);
    const double weighted = (tile == t.tiles - 1 ? last : full) * d;
    first += weighted;
    second += weighted * d + static_cast<double>(pair.at[1]);
  };
  int64_t tile = row;
#pragma unroll 1
  for (; tile + (kInFlight - 1) * kRows < t.tiles; tile += kInFlight * kRows) {
    Pack<float, 2> pairs[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) pairs[i] = pair_at(tile + i * kRows);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) add(tile + i * kRows, pairs[i]);
  }
#pragma unroll 1
  for (; tile < t.tiles; tile += kRows) add(tile, pair_at(tile));
}

__global__ void __launch_bounds__(kThreads) merge_statistics_kernel(const MergeParams t) {
  const MergeSums shared{SharedCarver(shared_memory())};
  const int me = static_cast<int>(threadIdx.x);
  const int64_t k = blockIdx.x * int64_t{kFilters} + me % kFilters;
  const bool mine = k < t.K;  // else the thread only meets the others at the barriers
  const float centre = mine ? t.partials[k * 2] : 0.0f;
  double first = 0, second = 0;
  if (mine) sum_tiles(t, k, me / kFilters, centre, first, second);
  for (int threads = kThreads / 2; threads >= kFilters; threads /= 2) {
    // The upper half hands its sums to the lower one.
    if (me >= threads && me < 2 * threads) {
      shared.first[me] = first;
      shared.second[me] = second;
    }
    __syncthreads();
    if (me < threads) {
      first += shared.first[me + threads];
      second += shared.second[me + threads];
    }
  }
  if (me >= kFilters || !mine) return;
  const double count = static_cast<double>(t.pixels);
  const double above = first / count;
  t.mean_out[k] = static_cast<float>(static_cast<double>(centre) + above);
  // Not below zero: rounding may leave a constant channel a negative trifle. NaN stays.
  const double m2 = second - first * above;
  t.var_out[k] = static_cast<float>(m2 < 0 ? 0.0 : m2 / count);
}

}  // namespace

int64_t statistics_bytes(int64_t tiles, int64_t K) {
  return tiles * K * 2 * static_cast<int64_t>(sizeof(float));
}

void merge_statistics(const char* name, const float* partials, int64_t tiles,
                      int64_t pixels_per_tile, int64_t pixels, int64_t K, float* mean_out,
                      float* var_out, void* stream) {
  const MergeParams t = {partials, mean_out, var_out, tiles, pixels_per_tile, pixels, K};
  launch_kernel({name, ceil_div(K, kFilters), kThreads, stream, MergeSums{SharedCarver()}.bytes},
                &merge_statistics_kernel, t);
}

}  // namespace cuda
}  // namespace fastconv
