// Two kernels make every copy.
//
// Blocks: where the channels of the copy lie apart in the source, a thread turns a square of them
// round in its registers: as many 16-byte loads along x (pixels, or in a filter its taps or its
// other channels) as a unit has channels, as many 16-byte stores along the channels. Eight lanes
// side by side along the channels fill the 128-byte lines that they store, and the warp's four
// along x read 64 bytes of each channel: whole sectors on both sides, so shared memory would save
// nothing.
//
// Rows: where the channels are neighbours already, a thread pads 16 bytes of the copy.
#include <numeric>
#include <stdexcept>

#include "cuda/conv2d.h"
#include "cuda/conv2d_layout.h"

namespace fastconv {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kMostLanesLog2 = 3;  // 8 lanes of 16 bytes along the channels: a line
static_assert(kPackBytes << kMostLanesLog2 == 128, "a line");

// to[outer][inner][x][channel] = from[outer][inner][channel][x]: strides in elements; those of the
// source's x and the copy's channel are 1.
struct BlockCopy {
  int64_t outer, X;
  int inner, channels;
  int64_t from_outer, from_inner, from_channel;
  int64_t to_outer, to_inner, to_x;
};

struct BlockParams {
  BlockCopy copy;
  const void* from;
  void* to;
  int64_t lo;      // elements from a number's hi to its lo
  int64_t blocks;  // threads
  int x_packs, units, unit_groups, lanes_log2;
};

struct RowParams {
  const void* from;
  void* to;
  int64_t lo, packs;
  int channels, units;  // a row
};

template <class T, bool kSplit>
__device__ inline void store_unit(T* to, int64_t lo, const Pack<T, kPackSize<T>>& values) {
  if constexpr (kSplit) {
    Pack<T, kPackSize<T>> high, low;
#pragma unroll
    for (int i = 0; i < kPackSize<T>; ++i) {
      const Tf32Pair pair = split_tf32(values.at[i]);
      high.at[i] = __uint_as_float(pair.hi);
      low.at[i] = __uint_as_float(pair.lo);
    }
    store_pack(to, high);
    store_pack(to + lo, low);
  } else {
    store_pack(to, values);
  }
}

// A pack of which the first `count` elements exist, by loads of kLoad; `count` counts whole loads.
template <int kLoad, class T>
__device__ inline Pack<T, kPackSize<T>> load_unit(const T* from, int64_t count) {
  Pack<T, kPackSize<T>> values = {};
#pragma unroll
  for (int i = 0; i < kPackSize<T>; i += kLoad) {
    if (i < count) {
      const Pack<T, kLoad> part = load_pack<T, kLoad>(from + i);
#pragma unroll
      for (int e = 0; e < kLoad; ++e) values.at[i + e] = part.at[e];
    }
  }
  return values;
}

template <class T, int kLoad, bool kSplit>
__global__ void __launch_bounds__(kThreads) copy_blocks_kernel(const BlockParams t) {
  constexpr int kPack = kPackSize<T>;
  const BlockCopy& c = t.copy;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < t.blocks;
       i += gridDim.x * int64_t{kThreads}) {
    const Division by_x = divide(i >> t.lanes_log2, t.x_packs);
    const Division by_unit = divide(by_x.quotient, t.unit_groups);
    const Division by_inner = divide(by_unit.quotient, c.inner);
    const int lane = static_cast<int>(i) & ((1 << t.lanes_log2) - 1);
    const int unit = (by_unit.remainder << t.lanes_log2) + lane;
    if (unit >= t.units) continue;
    const int64_t x = int64_t{by_x.remainder} * kPack, left = c.X - x;
    const int channel = unit * kPack;

    const T* from = static_cast<const T*>(t.from) + by_inner.quotient * c.from_outer +
                    by_inner.remainder * c.from_inner + channel * c.from_channel + x;
    Pack<T, kPack> source[kPack];
#pragma unroll
    for (int y = 0; y < kPack; ++y) {
      source[y] =
          load_unit<kLoad>(from + y * c.from_channel, channel + y < c.channels ? left : int64_t{0});
    }
    T* to = static_cast<T*>(t.to) + by_inner.quotient * c.to_outer +
            by_inner.remainder * c.to_inner + x * c.to_x + channel;
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      if (e >= left) break;
      Pack<T, kPack> turned;
#pragma unroll
      for (int y = 0; y < kPack; ++y) turned.at[y] = source[y].at[e];
      store_unit<T, kSplit>(to + e * c.to_x, t.lo, turned);
    }
  }
}

template <class T, int kLoad, bool kSplit>
__global__ void __launch_bounds__(kThreads) copy_rows_kernel(const RowParams t) {
  constexpr int kPack = kPackSize<T>;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < t.packs;
       i += gridDim.x * int64_t{kThreads}) {
    const Division by_unit = divide(i, t.units);
    const int channel = by_unit.remainder * kPack;
    const T* from = static_cast<const T*>(t.from) + by_unit.quotient * t.channels + channel;
    store_unit<T, kSplit>(static_cast<T*>(t.to) + i * kPack, t.lo,
                          load_unit<kLoad>(from, t.channels - channel));
  }
}

// ---- Launches ------------------------------------------------------------------------------

struct Tensors {
  const char* name;
  DType dtype;
  const void* from;
  void* to;
  int64_t lo;  // 0: no split
  void* stream;
};

// Calls f(element, load, split): the type to copy, how many of it a load may take where every load
// begins at a multiple of `common` elements, and whether to split.
template <class F>
void dispatch_copy(const Tensors& t, int64_t common, F&& f) {
  const auto with_load = [&](auto element, auto split) {
    using T = decltype(element);
    constexpr int kPack = kPackSize<T>;
    if (common % kPack == 0 && is_aligned(t.from, kPackBytes)) {
      f(element, std::integral_constant<int, kPack>{}, split);
    } else if (common % (kPack / 2) == 0 && is_aligned(t.from, kPackBytes / 2)) {
      f(element, std::integral_constant<int, kPack / 2>{}, split);
    } else {
      f(element, std::integral_constant<int, 1>{}, split);
    }
  };
  if (t.dtype == DType::kFloat64) {
    throw std::logic_error(std::string(t.name) + ": float64 has no tensor-core layout");
  }
  if (size_of(t.dtype) == 2) {
    with_load(uint16_t{}, std::false_type{});
  } else if (t.lo == 0) {
    with_load(float{}, std::false_type{});
  } else {
    with_load(float{}, std::true_type{});
  }
}

int64_t common_of(std::initializer_list<int64_t> values) {
  int64_t common = 0;
  for (int64_t value : values) common = std::gcd(common, value);
  return common;
}

void copy_blocks(const Tensors& tensors, const BlockCopy& copy) {
  if (copy.outer * copy.inner * copy.X * copy.channels == 0) return;
  const int64_t common = common_of({copy.X, copy.from_channel, copy.inner > 1 ? copy.from_inner : 0,
                                    copy.outer > 1 ? copy.from_outer : 0});
  dispatch_copy(tensors, common, [&](auto element, auto load, auto split) {
    using T = decltype(element);
    constexpr int kPack = kPackSize<T>;
    BlockParams t = {};
    t.copy = copy;
    t.from = tensors.from;
    t.to = tensors.to;
    t.lo = tensors.lo;
    t.x_packs = to_int(ceil_div(copy.X, kPack));
    t.units = to_int(ceil_div(copy.channels, kPack));
    while (t.lanes_log2 < kMostLanesLog2 && 1 << t.lanes_log2 < t.units) ++t.lanes_log2;
    t.unit_groups = to_int(ceil_div(t.units, int64_t{1} << t.lanes_log2));
    t.blocks = copy.outer * copy.inner * t.unit_groups * t.x_packs << t.lanes_log2;
    launch_kernel({tensors.name, blocks_for(t.blocks, kThreads), kThreads, tensors.stream},
                  &copy_blocks_kernel<T, decltype(load)::value, decltype(split)::value>, t);
  });
}

void copy_rows(const Tensors& tensors, int64_t rows, int64_t channels) {
  if (rows * channels == 0) return;
  dispatch_copy(tensors, channels, [&](auto element, auto load, auto split) {
    using T = decltype(element);
    RowParams t = {};
    t.from = tensors.from;
    t.to = tensors.to;
    t.lo = tensors.lo;
    t.channels = to_int(channels);
    t.units = to_int(ceil_div(channels, kPackSize<T>));
    t.packs = rows * t.units;
    launch_kernel({tensors.name, blocks_for(t.packs, kThreads), kThreads, tensors.stream},
                  &copy_rows_kernel<T, decltype(load)::value, decltype(split)::value>, t);
  });
}

// Elements of one part of a filter's copy.
int64_t filter_copy_elements(const Conv2dProblem& p, FilterOrder order) {
  if (order == FilterOrder::kKRSC) {
    return p.K * p.R * p.S * padded_channels(p.C / p.G, p.dtype);
  }
  return p.C * p.R * p.S * padded_channels(p.K / p.G, p.dtype);
}

}  // namespace

void copy_activations(const char* name, DType dtype, Layout layout, const void* from, void* to,
                      int64_t N, int64_t C, int64_t pixels, void* stream, int64_t G) {
  const Tensors tensors = {name, dtype, from, to, 0, stream};
  const int64_t channels = C / G, padded = padded_channels(channels, dtype);
  if (layout == Layout::kNHWC || pixels == 1) {
    copy_rows(tensors, N * pixels * G, channels);
    return;
  }
  BlockCopy copy = {};
  copy.outer = N;
  copy.inner = to_int(G);
  copy.X = pixels;
  copy.channels = to_int(channels);
  copy.from_outer = C * pixels;
  copy.from_inner = channels * pixels;
  copy.from_channel = pixels;
  copy.to_outer = pixels * G * padded;
  copy.to_inner = padded;
  copy.to_x = G * padded;
  copy_blocks(tensors, copy);
}

int64_t activation_copy_bytes(DType dtype, int64_t N, int64_t C, int64_t pixels, int64_t G) {
  return N * pixels * G * padded_channels(C / G, dtype) * size_of(dtype);
}

void copy_filter(const char* name, const Conv2dProblem& p, const FilterCopy& copy, const void* from,
                 void* to, void* stream) {
  const int64_t taps = p.R * p.S, channels = p.C / p.G, filters = p.K / p.G;
  const bool krsc = p.filter_layout == Layout::kNHWC || taps == 1;
  const Tensors tensors = {
      name, p.dtype, from, to, copy.split ? filter_copy_elements(p, copy.order) : 0, stream};
  if (copy.order == FilterOrder::kKRSC && krsc) {
    copy_rows(tensors, p.K * taps, channels);
    return;
  }
  BlockCopy turn = {};
  turn.inner = 1;
  if (copy.order == FilterOrder::kKRSC) {  // K images of C/G channels and R * S pixels
    turn.outer = p.K;
    turn.X = taps;
    turn.channels = to_int(channels);
    turn.from_outer = channels * taps;
    turn.from_channel = taps;
    turn.to_x = padded_channels(channels, p.dtype);
    turn.to_outer = taps * turn.to_x;
  } else {  // G images of K/G channels
    turn.outer = p.G;
    turn.channels = to_int(filters);
    turn.from_outer = filters * channels * taps;
    turn.from_channel = channels * taps;
    const int64_t padded = padded_channels(filters, p.dtype);
    turn.to_outer = channels * taps * padded;
    if (krsc) {  // the taps of a channel go from between x and K to beyond x
      turn.inner = to_int(taps);
      turn.X = channels;
      turn.from_inner = channels;
      turn.to_inner = padded;
      turn.to_x = taps * padded;
    } else {
      turn.X = channels * taps;
      turn.to_x = padded;
    }
  }
  copy_blocks(tensors, turn);
}

int64_t filter_copy_bytes(const Conv2dProblem& p, const FilterCopy& copy) {
  return filter_copy_elements(p, copy.order) * size_of(p.dtype) * (copy.split ? 2 : 1);
}

}  // namespace cuda
}  // namespace fastconv
