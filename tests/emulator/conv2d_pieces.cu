// What the tensor-core convolutions share, each piece against plain loops: copies of activations
// and filters, the store of a staged tile, the statistics of its results.
#include <cmath>
#include <limits>

#include "cases.h"
#include "cuda/conv2d_layout.h"
#include "cuda/conv2d_stage.h"

namespace fastconv {
namespace testing {
namespace {

using cuda::launch_kernel;
using cuda::shared_memory;
using cuda::SharedCarver;

template <class T>
constexpr DType kDType = std::is_same_v<T, float>    ? DType::kFloat32
                         : std::is_same_v<T, __half> ? DType::kFloat16
                                                     : DType::kBFloat16;

template <class T>
std::vector<T> random_values(size_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::vector<T> values(count);
  for (T& value : values) value = T(normal(random));
  return values;
}

// ---- Copies ----

struct Activations {
  int N, C, pixels, G;
};
constexpr Activations kActivations[] = {
    {2, 64, 64, 1}, {1, 3, 49, 1}, {3, 20, 35, 1},   {2, 72, 20, 1}, {1, 130, 196, 1},
    {2, 8, 1, 1},   {2, 13, 1, 1}, {2, 12, 36, 3},   {1, 40, 9, 5},  {2, 6, 8, 6},
    {0, 8, 64, 1},  {1, 24, 0, 1}, {1, 136, 100, 1},
};

template <class T>
void activations_case(uint64_t seed) {
  for (const Activations& t : kActivations) {
    const int each = t.C / t.G, padded = static_cast<int>(cuda::padded_channels(each, kDType<T>));
    const auto x = random_values<T>(static_cast<size_t>(t.N) * t.C * t.pixels, seed);
    for (const Layout layout : {Layout::kNCHW, Layout::kNHWC}) {
      const std::string what = "C = " + std::to_string(t.C) +
                               ", pixels = " + std::to_string(t.pixels) + ", " + name_of(layout);
      const int64_t bytes = cuda::activation_copy_bytes(kDType<T>, t.N, t.C, t.pixels, t.G);
      std::vector<T> want(static_cast<size_t>(t.N) * t.pixels * t.G * padded, T(0.0f));
      expect(bytes == static_cast<int64_t>(want.size() * sizeof(T)), what + ": bytes");
      for (int n = 0; n < t.N; ++n) {
        for (int c = 0; c < t.C; ++c) {
          for (int i = 0; i < t.pixels; ++i) {
            const size_t from = layout == Layout::kNCHW
                                    ? (static_cast<size_t>(n) * t.C + c) * t.pixels + i
                                    : (static_cast<size_t>(n) * t.pixels + i) * t.C + c;
            const size_t to = (static_cast<size_t>(n) * t.pixels + i) * t.G + c / each;
            want[to * padded + c % each] = x[from];
          }
        }
      }
      Array<T> in(x), out(want.size());
      cuda::copy_activations("copy", kDType<T>, layout, in.get(), out.get(), t.N, t.C, t.pixels,
                             nullptr, t.G);
      expect_equal(out.read(), want, what);
    }
  }
}

const Register activations_f32("activations_f32", activations_case<float>);
const Register activations_f16("activations_f16", activations_case<__half>);
const Register activations_bf16("activations_bf16", activations_case<__nv_bfloat16>);

struct Filter {
  int K, C, R, S, G;  // C: of all groups
};
constexpr Filter kFilters[] = {
    {16, 32, 3, 3, 1}, {7, 5, 3, 2, 1}, {24, 12, 1, 1, 1},  {64, 72, 1, 1, 1}, {12, 20, 3, 3, 4},
    {40, 8, 5, 1, 2},  {6, 6, 3, 3, 6}, {130, 16, 2, 2, 1}, {8, 4, 4, 4, 1},
};

// hi and lo as they should be: hi within TF32's ten bits and nearest to x, both in turn.
float rounded_to_tf32(float x) {
  if (!std::isfinite(x) || x == 0) return x;
  int exponent;
  std::frexp(x, &exponent);
  const float unit = std::ldexp(1.0f, exponent - 11);
  return std::round(x / unit) * unit;
}

template <class T>
void filter_case(uint64_t seed, const Filter& f, Layout layout, cuda::FilterOrder order,
                 bool split) {
  Conv2dProblem p;
  p.K = f.K;
  p.C = f.C;
  p.R = f.R;
  p.S = f.S;
  p.G = f.G;
  p.dtype = kDType<T>;
  p.filter_layout = layout;
  const int channels = f.C / f.G, filters = f.K / f.G, taps = f.R * f.S;
  const bool forward = order == cuda::FilterOrder::kKRSC;
  const auto padded =
      static_cast<size_t>(cuda::padded_channels(forward ? channels : filters, kDType<T>));
  const size_t part = static_cast<size_t>(forward ? f.K : f.C) * taps * padded;
  const auto x = random_values<T>(static_cast<size_t>(f.K) * channels * taps, seed);
  std::vector<T> want(part * (split ? 2 : 1), T(0.0f));
  for (int k = 0; k < f.K; ++k) {
    for (int c = 0; c < channels; ++c) {
      for (int tap = 0; tap < taps; ++tap) {
        const int from = layout == Layout::kNCHW ? (k * channels + c) * taps + tap
                                                 : (k * taps + tap) * channels + c;
        const int row = forward ? k : k / filters * channels + c;
        const size_t to =
            (static_cast<size_t>(row) * taps + tap) * padded + (forward ? c : k % filters);
        want[to] = x[from];
        if (split) {
          const float value = static_cast<float>(x[from]), hi = rounded_to_tf32(value);
          want[to] = T(hi);
          want[part + to] = T(rounded_to_tf32(value - hi));
        }
      }
    }
  }
  const cuda::FilterCopy copy = {order, split};
  const std::string what = "K = " + std::to_string(f.K) + ", C = " + std::to_string(f.C) + ", " +
                           name_of(layout) + (forward ? " to KRSC" : " to CRSK");
  expect(cuda::filter_copy_bytes(p, copy) == static_cast<int64_t>(want.size() * sizeof(T)),
         what + ": bytes");
  Array<T> in(x), out(want.size());
  cuda::copy_filter("copy", p, copy, in.get(), out.get(), nullptr);
  expect_equal(out.read(), want, what);
}

template <class T>
void filters_case(uint64_t seed) {
  for (const Filter& f : kFilters) {
    for (const Layout layout : {Layout::kNCHW, Layout::kNHWC}) {
      for (const auto order : {cuda::FilterOrder::kKRSC, cuda::FilterOrder::kCRSK}) {
        filter_case<T>(seed, f, layout, order, false);
        if (std::is_same_v<T, float>) filter_case<T>(seed, f, layout, order, true);
      }
    }
  }
}

const Register filters_f32("filters_f32", filters_case<float>);
const Register filters_f16("filters_f16", filters_case<__half>);
const Register filters_bf16("filters_bf16", filters_case<__nv_bfloat16>);

void float64_is_refused(uint64_t) {
  expect_throws("float64", [] {
    cuda::copy_activations("copy", DType::kFloat64, Layout::kNHWC, nullptr, nullptr, 1, 8, 8,
                           nullptr);
  });
}
const Register refused("float64_is_refused", float64_is_refused);

// ---- Staged tiles ----

constexpr int kTileRows = 64;

template <class T, int kCols, int kThreads>
__global__ void __launch_bounds__(kThreads)
    stage_kernel(const float* sums, const int64_t* offsets, int filters, int pixels,
                 cuda::StageTarget to) {
  constexpr int kPitch = cuda::stage_pitch(kCols);
  SharedCarver carve(shared_memory());
  auto* staged = carve.take<float>(cuda::stage_floats(kTileRows, kCols));
  auto* rows = carve.take<int64_t>(kTileRows);
  const int tiles_k = (filters + kCols - 1) / kCols;
  const int tile = static_cast<int>(blockIdx.x) / tiles_k;
  const int first_k = static_cast<int>(blockIdx.x) % tiles_k * kCols;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < kTileRows * kCols; i += kThreads) {
    const int pixel = tile * kTileRows + i / kCols, k = first_k + i % kCols;
    const bool inside = pixel < pixels && k < filters;
    staged[i / kCols * kPitch + i % kCols] = inside ? sums[int64_t{pixel} * filters + k] : 1e30f;
  }
  for (int i = thread; i < kTileRows; i += kThreads) {
    rows[i] = tile * kTileRows + i < pixels ? offsets[tile * kTileRows + i] : -1;
  }
  __syncthreads();
  const cuda::StagedTile from = {staged, rows, first_k, min(filters - first_k, kCols)};
  cuda::store_tile<T, kTileRows, kCols, kThreads>(from, to, tile, thread, [] { __syncthreads(); });
}

struct StageCase {
  int N, pixels, K;
  Layout layout;
  bool scale, shift, residual, statistics;
  Activation activation;
};
constexpr Layout kNchw = Layout::kNCHW, kNhwc = Layout::kNHWC;
constexpr StageCase kStages[] = {
    {1, 64, 64, kNhwc, false, false, false, false, Activation::kNone},
    {3, 50, 72, kNhwc, true, true, true, true, Activation::kReLU},
    {2, 70, 40, kNhwc, false, true, true, true, Activation::kSiLU},
    {3, 33, 37, kNhwc, true, true, true, true, Activation::kLeakyReLU},
    {2, 1, 130, kNchw, true, false, true, true, Activation::kHardSwish},
    {3, 49, 67, kNchw, true, true, true, true, Activation::kSigmoid},
    {1, 200, 24, kNchw, false, true, false, false, Activation::kReLU6},
};

template <class T>
T epilogue_of(const StageCase& t, float z, int k, const std::vector<float>& scale,
              const std::vector<float>& shift, T residual) {
  if (t.scale) z *= scale[static_cast<size_t>(k)];
  if (t.shift) z += shift[static_cast<size_t>(k)];
  if (t.residual) z += static_cast<float>(residual);
  return T(activate(z, t.activation, 0.25f));
}

// Mean and biased variance of each channel's results, [rows][K], in double.
template <class T>
void expect_moments(const std::vector<T>& rows, int K, const std::vector<float>& mean,
                    const std::vector<float>& var) {
  const size_t count = rows.size() / static_cast<size_t>(K);
  for (size_t k = 0; k < static_cast<size_t>(K); ++k) {
    double sum = 0, squares = 0;
    for (size_t i = 0; i < count; ++i) sum += static_cast<float>(rows[i * K + k]);
    const double want = sum / static_cast<double>(count);
    for (size_t i = 0; i < count; ++i) {
      const double d = static_cast<double>(static_cast<float>(rows[i * K + k])) - want;
      squares += d * d;
    }
    const double variance = squares / static_cast<double>(count), spread = std::sqrt(variance);
    expect(std::abs(mean[k] - want) <= 1e-6 * (spread + std::abs(want)),
           "mean is " + shown(mean[k]) + " for " + std::to_string(want));
    expect(std::abs(var[k] - variance) <= 4e-6 * variance,
           "variance is " + shown(var[k]) + " for " + std::to_string(variance));
  }
}

template <class T, int kCols, int kThreads>
void stage_one(uint64_t seed, const StageCase& t) {
  const int pixels = t.N * t.pixels, tiles = (pixels + kTileRows - 1) / kTileRows;
  const auto K = static_cast<size_t>(t.K), results = static_cast<size_t>(pixels) * K;
  auto sums = random_values<float>(results, seed);
  for (float& x : sums) x += 30;  // far from zero, where sums of squares would cancel
  // Powers of two: with other factors a fused multiply-add would round once where two operations
  // round twice.
  auto scale = small_integers<float>(K, seed + 1);
  for (float& x : scale) x = std::ldexp(x < 0 ? -1.0f : 1.0f, static_cast<int>(x));
  const auto shift = random_values<float>(K, seed + 2);
  const auto residual = random_values<T>(results, seed + 3);
  std::vector<int64_t> offsets(static_cast<size_t>(pixels));
  std::vector<T> want(results), rows(results);
  const bool nchw = t.layout == Layout::kNCHW;
  for (int i = 0; i < pixels; ++i) {
    offsets[i] = nchw ? int64_t{i / t.pixels} * t.K * t.pixels + i % t.pixels : int64_t{i} * t.K;
    for (int k = 0; k < t.K; ++k) {
      const size_t at =
          static_cast<size_t>(offsets[i]) + static_cast<size_t>(k) * (nchw ? t.pixels : 1);
      const size_t row = static_cast<size_t>(i) * K + k;
      want[at] = rows[row] = epilogue_of(t, sums[row], k, scale, shift, residual[at]);
    }
  }
  Conv2dProblem p;
  p.N = t.N;
  p.K = t.K;
  p.H = t.pixels;
  p.dtype = kDType<T>;
  p.layout = t.layout;
  p.epilogue.scale = t.scale;
  p.epilogue.shift = t.shift;
  p.epilogue.residual = t.residual;
  p.epilogue.activation = t.activation;
  p.epilogue.slope = 0.25;
  Array<float> sums_in(sums), scale_in(scale), shift_in(shift), mean(K), var(K);
  Array<T> residual_in(residual), out(results);
  Array<int64_t> offsets_in(offsets);
  Array<float> partials(static_cast<size_t>(cuda::statistics_bytes(tiles, t.K)) / sizeof(float));
  Conv2dArgs args;
  args.scale = scale_in.get();
  args.shift = shift_in.get();
  args.residual = residual_in.get();
  args.out = out.get();
  const cuda::StageTarget to = cuda::fprop_target(p, args, t.statistics ? partials.get() : nullptr);
  const bool packs = t.K * sizeof(T) % 16 == 0;
  expect(to.vector == (packs && (!nchw || t.pixels == 1)), "vector");
  SharedCarver carve;
  carve.take<float>(cuda::stage_floats(kTileRows, kCols));
  carve.take<int64_t>(kTileRows);
  launch_kernel({"stage", tiles * ((t.K + kCols - 1) / kCols), kThreads, nullptr, carve.bytes()},
                &stage_kernel<T, kCols, kThreads>, sums_in.get(), offsets_in.get(), t.K, pixels,
                to);
  const std::string what = "K = " + std::to_string(t.K) + ", " + name_of(t.layout);
  expect_equal(out.read(), want, what);
  if (!t.statistics) return;
  cuda::merge_statistics("merge", partials.get(), tiles, kTileRows, pixels, t.K, mean.get(),
                         var.get(), nullptr);
  expect_moments(rows, t.K, mean.read(), var.read());
}

template <class T>
void stage_case(uint64_t seed) {
  for (const StageCase& t : kStages) {
    stage_one<T, 64, 128>(seed, t);
    stage_one<T, 32, 64>(seed, t);
    stage_one<T, 128, 256>(seed, t);
  }
}

const Register stage_f32("stage_f32", stage_case<float>);
const Register stage_f16("stage_f16", stage_case<__half>);
const Register stage_bf16("stage_bf16", stage_case<__nv_bfloat16>);

// The input's gradient has no epilogue, and its channels are C.
void dgrad_target_case(uint64_t) {
  Conv2dProblem p;
  p.C = 16;
  p.K = 3;
  p.H = p.W = 4;
  p.dtype = DType::kFloat16;
  p.epilogue.shift = true;
  Conv2dArgs args;
  args.shift = &p;
  const auto nchw = cuda::dgrad_target(p, args);
  expect(nchw.channel_stride == 16 && !nchw.vector && nchw.channels == 16, "NCHW");
  expect(nchw.epilogue.shift == nullptr, "an epilogue");
  p.layout = Layout::kNHWC;
  expect(cuda::dgrad_target(p, args).vector, "NHWC");
  p.G = 4;
  expect(!cuda::dgrad_target(p, args).vector, "groups of 4");
}
const Register dgrad("dgrad_target", dgrad_target_case);

// ---- Statistics ----

// Many tiles, the last one short, of a mean far from zero.
void merge_case(uint64_t seed) {
  for (const int64_t tiles : {int64_t{1}, int64_t{2}, int64_t{255}, int64_t{5000}}) {
    constexpr int kPixels = 128, K = 7;
    const int64_t pixels = tiles * kPixels - 100;
    const auto noise = random_values<float>(static_cast<size_t>(tiles) * K * 2, seed);
    std::vector<float> partials(noise.size());
    std::vector<double> mean(K), var(K);
    for (int k = 0; k < K; ++k) {
      double sum = 0, squares = 0;
      const auto at = [&](int64_t tile) { return static_cast<size_t>((tile * K + k) * 2); };
      const auto count = [&](int64_t tile) {
        return static_cast<double>(tile == tiles - 1 ? kPixels - 100 : kPixels);
      };
      for (int64_t i = 0; i < tiles; ++i) {
        partials[at(i)] = 1000.0f + noise[at(i)];
        partials[at(i) + 1] = std::abs(noise[at(i) + 1]);
        sum += count(i) * static_cast<double>(partials[at(i)]);
      }
      mean[k] = sum / static_cast<double>(pixels);
      for (int64_t i = 0; i < tiles; ++i) {
        const double d = static_cast<double>(partials[at(i)]) - mean[k];
        squares += count(i) * d * d + static_cast<double>(partials[at(i) + 1]);
      }
      var[k] = squares / static_cast<double>(pixels);
    }
    Array<float> in(partials), mean_out(K), var_out(K);
    cuda::merge_statistics("merge", in.get(), tiles, kPixels, pixels, K, mean_out.get(),
                           var_out.get(), nullptr);
    const auto got_mean = mean_out.read(), got_var = var_out.read();
    for (int k = 0; k < K; ++k) {
      expect(got_mean[k] == static_cast<float>(mean[k]), "mean of tiles");
      expect(std::abs(got_var[k] - var[k]) <= 1e-7 * var[k], "variance of tiles");
    }
  }
}
const Register merge("merge_statistics", merge_case);

void merge_nan(uint64_t) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  Array<float> in({1, 0, nan, nan, 3, 0, 5, 0}), mean(2), var(2);  // two tiles, K = 2
  cuda::merge_statistics("merge", in.get(), 2, 4, 8, 2, mean.get(), var.get(), nullptr);
  expect(mean.read()[0] == 2 && var.read()[0] == 1, "the channel without NaN");
  expect(std::isnan(mean.read()[1]) && std::isnan(var.read()[1]), "the channel with NaN");
}
const Register nan("merge_statistics_nan", merge_nan);

}  // namespace
}  // namespace testing
}  // namespace fastconv
