// The register tiles of grouped convolution: see conv2d_grouped.h. Included once for each
// instruction set: see isa.h.
#include "cpu/conv2d_window.inl"

namespace fastconv::FASTCONV_ISA::conv2d {

// AVX-512's 32 registers: 14 accumulators, the 3 taps' 4 channels of filters, 4 permutations'
// indices and the permuted pixel are 31. Each pixel is permuted 4 times for 12 multiply-adds, on
// another port. The other instruction sets have 16: 7 accumulators, 3 filters, an index and a
// pixel.
constexpr bool kManyRegisters = FASTCONV_VECTOR_BYTES == 64;
constexpr int kGroupedLong = kManyRegisters ? 14 : 7;
constexpr int kGroupedShort = 7;
constexpr int kGroupedChannels = kManyRegisters ? 4 : 1;

// Lane l of lanes_of_group(group, c) is channel c of the group that lane l belongs to.
template <class Acc>
FASTCONV_INLINE typename Simd<Acc>::Int lanes_of_group(int64_t group, int64_t c) {
  using Int = typename Simd<Acc>::Int;
  using Lane = std::conditional_t<sizeof(Acc) == 4, int32_t, int64_t>;
  Int lane = {};
  for (int l = 0; l < kLanes<Acc>; ++l) lane[l] = l;
  return (lane & static_cast<Lane>(-group)) + static_cast<Lane>(c);
}

// The channel of a pixel that each lane multiplies.
template <bool kPermuted, class Acc>
FASTCONV_INLINE Vec<Acc> spread(const Acc* pixel, int64_t c, typename Simd<Acc>::Int index) {
  if constexpr (kPermuted) {
    return __builtin_shuffle(load(pixel), index);
  } else {
    return Vec<Acc>{} + pixel[c];
  }
}

// T pixels of one slab. kStep 0: any distance between pixels, of one tap.
template <class Acc, int T, int S, int kStep, bool kPermuted>
void grouped_tile(const GroupedTile& shape, const Acc* window, const Acc* filter, Acc* D) {
  using Int = typename Simd<Acc>::Int;
  constexpr int L = kLanes<Acc>, kC = kGroupedChannels;
  constexpr int kPixels = (T - 1) * (kStep == 0 ? 1 : kStep) + S;
  const int64_t pitch = (kPermuted ? L : shape.pitch) * (kStep == 0 ? shape.step : 1);
  Vec<Acc> acc[T] = {};
  for (int64_t step = 0; step < shape.steps; ++step) {
    const Acc* row = window + shape.window[step];
    const Acc* taps = filter + shape.filter[step];
    for (int64_t c0 = 0; c0 < shape.channels; c0 += kC) {
      Vec<Acc> f[S][kC];
      Int index[kC];
#pragma GCC unroll 4
      for (int c = 0; c < kC; ++c) {
        index[c] = lanes_of_group<Acc>(shape.group, c0 + c);
#pragma GCC unroll 3
        for (int s = 0; s < S; ++s) f[s][c] = load(taps + s * shape.tap_ld + (c0 + c) * L);
      }
      const Acc* pixel = row;
#pragma GCC unroll 32
      for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 4
        for (int c = 0; c < kC; ++c) {
          const Vec<Acc> x = spread<kPermuted>(pixel, c0 + c, index[c]);
#pragma GCC unroll 3
          for (int s = 0; s < S; ++s) {
            constexpr int kApart = kStep == 0 ? 1 : kStep;
            const int t = (i - s) / kApart;
            if (i >= s && (i - s) % kApart == 0 && t < T) acc[t] += x * f[s][c];
          }
        }
        pixel += pitch;
        // One pointer and not one a pixel; and nothing of later pixels is begun before, which would
        // spill.
        asm("" : "+r"(pixel));
      }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    Acc* d = D + t * shape.ldd;
    store(d, shape.accumulate ? load(d) + acc[t] : acc[t]);
  }
}

// Channels of a wgrad tile: with three taps 12 accumulators, or 6 where registers are few.
template <int S>
constexpr int kWgradChannels = kManyRegisters || S == 1 ? 4 : 2;

// The taps of source pixel i, which output pixel i - s meets under tap s. kEdge: not all are there.
template <bool kEdge, bool kPermuted, int S, int kC, class Acc>
FASTCONV_INLINE void add_pixel(const Acc* pixel, int64_t c0, const typename Simd<Acc>::Int* index,
                               const Acc* grad, int64_t i, int64_t columns, Vec<Acc> (*acc)[kC]) {
  Vec<Acc> x[kC];
#pragma GCC unroll 4
  for (int c = 0; c < kC; ++c) x[c] = spread<kPermuted>(pixel, c0 + c, index[c]);
#pragma GCC unroll 3
  for (int s = 0; s < S; ++s) {
    if (kEdge && (i < s || i - s >= columns)) continue;
    const Vec<Acc> g = load(grad + (i - s) * kLanes<Acc>);
#pragma GCC unroll 4
    for (int c = 0; c < kC; ++c) acc[s][c] += g * x[c];
  }
}

// kNeighbours: taps and output pixels are one source pixel apart, so that a permuted pixel serves
// all S taps.
template <class Acc, int S, bool kNeighbours, bool kPermuted>
void grouped_wgrad(const GroupedWgradTile& t, const Acc* window, const Acc* grad, Acc* sums) {
  constexpr int L = kLanes<Acc>, kC = kWgradChannels<S>;
  const int64_t pitch = kPermuted ? L : t.pitch;
  for (int64_t c0 = 0; c0 < t.channels; c0 += kC) {
    Vec<Acc> acc[S][kC] = {};
    typename Simd<Acc>::Int index[kC];
#pragma GCC unroll 4
    for (int c = 0; c < kC; ++c) index[c] = lanes_of_group<Acc>(t.group, c0 + c);
    for (int64_t row = 0; row < t.rows; ++row) {
      const Acc* x = window + row * t.window_ld;
      const Acc* g = grad + row * t.grad_ld;
      if constexpr (kNeighbours) {
        const int64_t pixels = t.columns + S - 1;
        const int64_t inner = S - 1 < t.columns ? S - 1 : pixels;
        int64_t i = 0;
        for (; i < inner; ++i) {
          add_pixel<true, kPermuted, S, kC>(x + i * pitch, c0, index, g, i, t.columns, acc);
        }
        for (; i < t.columns; ++i) {
          add_pixel<false, kPermuted, S, kC>(x + i * pitch, c0, index, g, i, t.columns, acc);
        }
        for (; i < pixels; ++i) {
          add_pixel<true, kPermuted, S, kC>(x + i * pitch, c0, index, g, i, t.columns, acc);
        }
      } else {
        const int64_t next = t.step * pitch, hop = t.hop * pitch;
        for (int64_t j = 0; j < t.columns; ++j) {
          const Vec<Acc> v = load(g + j * L);
#pragma GCC unroll 3
          for (int s = 0; s < S; ++s) {
#pragma GCC unroll 4
            for (int c = 0; c < kC; ++c) {
              acc[s][c] += v * spread<kPermuted>(x + j * next + s * hop, c0 + c, index[c]);
            }
          }
        }
      }
    }
#pragma GCC unroll 3
    for (int s = 0; s < S; ++s) {
#pragma GCC unroll 4
      for (int c = 0; c < kC; ++c) {
        Acc* sum = sums + (s * t.channels + c0 + c) * L;
        store(sum, load(sum) + acc[s][c]);
      }
    }
  }
}

template <bool kPermuted, class T>
void fill_grouped(GroupedOps<T>& ops) {
  using Acc = accumulator_t<T>;
  constexpr int kLong = kGroupedLong, kShort = kGroupedShort;
  auto& tile = ops.tile;
  tile[kOneTap][kPermuted][0] = grouped_tile<Acc, kLong, 1, 0, kPermuted>;
  tile[kOneTap][kPermuted][1] = grouped_tile<Acc, kShort, 1, 0, kPermuted>;
  tile[kTwoTaps][kPermuted][0] = grouped_tile<Acc, kLong, 2, 1, kPermuted>;
  tile[kTwoTaps][kPermuted][1] = grouped_tile<Acc, kShort, 2, 1, kPermuted>;
  tile[kThreeTaps][kPermuted][0] = grouped_tile<Acc, kLong, 3, 1, kPermuted>;
  tile[kThreeTaps][kPermuted][1] = grouped_tile<Acc, kShort, 3, 1, kPermuted>;
  tile[kThreeApart][kPermuted][0] = grouped_tile<Acc, kLong, 3, 2, kPermuted>;
  tile[kThreeApart][kPermuted][1] = grouped_tile<Acc, kShort, 3, 2, kPermuted>;
  ops.wgrad[kOneTap][kPermuted] = grouped_wgrad<Acc, 1, false, kPermuted>;
  ops.wgrad[kThreeTaps][kPermuted] = grouped_wgrad<Acc, 3, true, kPermuted>;
  ops.wgrad[kThreeApart][kPermuted] = grouped_wgrad<Acc, 3, false, kPermuted>;
}

// Groups are multiples of 4 channels: vectors of 4 lanes span one at most.
template <class T>
inline const GroupedOps<T>& grouped() {
  using Acc = accumulator_t<T>;
  static const GroupedOps<T> table = [] {
    GroupedOps<T> ops = {};
    ops.lanes = kLanes<Acc>;
    ops.pixels[0] = kGroupedLong;
    ops.pixels[1] = kGroupedShort;
    ops.copy = copy_pixels<T>;
    fill_grouped<false>(ops);
    if constexpr (kLanes<Acc> > 4) fill_grouped<true>(ops);
    return ops;
  }();
  return table;
}

}  // namespace fastconv::FASTCONV_ISA::conv2d
