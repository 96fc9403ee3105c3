// Depthwise convolution of NHWC rows: a vector of channels at a time, every tap a multiply-add with
// an operand from memory. Included once for each instruction set: see isa.h.

namespace fastconv::FASTCONV_ISA::conv2d {

// The channels [c, c + width) of a pixel.
template <bool kWhole, class T>
FASTCONV_INLINE Vec<accumulator_t<T>> load_channels(const T* p, int64_t width) {
  if constexpr (kWhole) {
    return load(p);
  } else {
    return load_part<accumulator_t<T>>(p, width);
  }
}

// kPixels neighbouring pixels from j on, under taps [t0, t1), of channels [c, c + width), which are
// kVectors vectors, or a part of one.
template <int kPixels, int kVectors, bool kWhole, class T>
FASTCONV_INLINE void depthwise_tile(const DepthwiseRow<T>& row, const RowEpilogue<T>& epilogue,
                                    int64_t j, int64_t t0, int64_t t1, int64_t c, int64_t width) {
  using Acc = accumulator_t<T>;
  constexpr int L = kLanes<Acc>, kSums = kPixels * kVectors;
  Vec<Acc> acc[kSums] = {};
  const int64_t pixel = row.w.step * row.channels;
  for (int64_t r = 0; r < row.rows; ++r) {
    const T* x = row.source[r] + (j * row.w.step + row.w.first) * row.channels + c;
    for (int64_t t = t0; t < t1; ++t) {
      const Acc* filter = row.filter[r] + t * row.filter_ld + c;
      const T* p = x + t * row.w.hop * row.channels;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Vec<Acc> f = load(filter + v * L);
#pragma GCC unroll 8
        for (int i = 0; i < kPixels; ++i) {
          acc[i * kVectors + v] += f * load_channels<kWhole>(p + i * pixel + v * L, width);
        }
      }
    }
  }
  T* out = row.out + j * row.out_step;
  if (kWhole && epilogue.is_plain()) {
#pragma GCC unroll 8
    for (int i = 0; i < kSums; ++i) {
      store(out + i / kVectors * row.out_step + c + i % kVectors * L, acc[i]);
    }
    return;
  }
  // One copy of the epilogue's code, and not eight: the accumulators wait in memory.
  Acc waiting[kSums * L];
#pragma GCC unroll 8
  for (int i = 0; i < kSums; ++i) store(waiting + i * L, acc[i]);
#pragma GCC unroll 1
  for (int i = 0; i < kSums; ++i) {
    RowEpilogue<T> e = epilogue;
    if (e.residual != nullptr) e.residual += (j + i / kVectors) * row.out_step;
    finish(e, load(waiting + i * L), c + i % kVectors * L, width, out + i / kVectors * row.out_step,
           1);
  }
}

// One pixel takes four vectors of channels at a time, so that as many multiply-adds are in flight
// as there are with four pixels.
template <int kPixels, class T>
void depthwise_pixels(const DepthwiseRow<T>& row, const RowEpilogue<T>& epilogue, int64_t j,
                      int64_t t0, int64_t t1) {
  constexpr int L = kLanes<accumulator_t<T>>, kVectors = kPixels == 1 ? 4 : 1;
  int64_t c = 0;
  if constexpr (kVectors > 1) {
    for (; c + kVectors * L <= row.channels; c += kVectors * L) {
      depthwise_tile<kPixels, kVectors, true>(row, epilogue, j, t0, t1, c, L);
    }
  }
  for (; c + L <= row.channels; c += L) {
    depthwise_tile<kPixels, 1, true>(row, epilogue, j, t0, t1, c, L);
  }
  if (c < row.channels) {
    depthwise_tile<kPixels, 1, false>(row, epilogue, j, t0, t1, c, row.channels - c);
  }
}

// The grid points at which every tap is inside the source: [low, high).
struct Inside {
  int64_t low, high;
  explicit Inside(const GatherAxis& a) {
    const int64_t reach = (a.taps - 1) * a.hop;
    const int64_t first = a.first + (reach < 0 ? reach : 0);
    const int64_t last = a.first + (reach > 0 ? reach : 0);
    low = first >= 0 ? 0 : (-first + a.step - 1) / a.step;
    low = low < a.count ? low : a.count;
    high = last >= a.size ? 0 : (a.size - 1 - last) / a.step + 1;
    high = high < a.count ? high : a.count;
    if (high < low) high = low;
  }
};

// The taps [t0, t1) that are inside at grid point j.
FASTCONV_INLINE void taps_inside(const GatherAxis& a, int64_t j, int64_t& t0, int64_t& t1) {
  const auto inside = [&](int64_t t) {
    const int64_t w = j * a.step + a.first + t * a.hop;
    return w >= 0 && w < a.size;
  };
  for (t0 = 0; t0 < a.taps && !inside(t0);) ++t0;
  for (t1 = t0; t1 < a.taps && inside(t1);) ++t1;
}

template <class T>
void depthwise_row(const DepthwiseRow<T>& row, const RowEpilogue<T>& epilogue) {
  const Inside inside(row.w);
  int64_t j = 0;
  while (j < row.w.count) {
    if (j < inside.low || j >= inside.high) {
      int64_t t0, t1;
      taps_inside(row.w, j, t0, t1);
      depthwise_pixels<1>(row, epilogue, j, t0, t1);
      j += 1;
    } else if (j + 8 <= inside.high) {
      depthwise_pixels<8>(row, epilogue, j, 0, row.w.taps);
      j += 8;
    } else if (j + 4 <= inside.high) {
      depthwise_pixels<4>(row, epilogue, j, 0, row.w.taps);
      j += 4;
    } else {
      depthwise_pixels<1>(row, epilogue, j, 0, row.w.taps);
      j += 1;
    }
  }
}

// kTaps taps from t on, of pixels [j0, j1), in registers.
template <int kTaps, bool kWhole, class T>
FASTCONV_INLINE void depthwise_wgrad_tile(int64_t channels, const GatherAxis& w, const T* grad,
                                          const T* source, int64_t t, int64_t j0, int64_t j1,
                                          int64_t width, accumulator_t<T>* sum, int64_t ld) {
  using Acc = accumulator_t<T>;
  Vec<Acc> acc[kTaps] = {};
  for (int64_t j = j0; j < j1; ++j) {
    const Vec<Acc> g = load_channels<kWhole>(grad + j * channels, width);
    const T* x = source + (j * w.step + w.first + t * w.hop) * channels;
#pragma GCC unroll 4
    for (int i = 0; i < kTaps; ++i) {
      acc[i] += g * load_channels<kWhole>(x + i * w.hop * channels, width);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kTaps; ++i) store(sum + (t + i) * ld, load(sum + (t + i) * ld) + acc[i]);
}

template <bool kWhole, class T>
FASTCONV_INLINE void depthwise_wgrad_channels(int64_t channels, const GatherAxis& w, const T* grad,
                                              const T* source, int64_t width, accumulator_t<T>* sum,
                                              int64_t ld) {
  const Inside inside(w);
  int64_t t = 0;
  for (; t + 4 <= w.taps; t += 4) {
    depthwise_wgrad_tile<4, kWhole>(channels, w, grad, source, t, inside.low, inside.high, width,
                                    sum, ld);
  }
  for (; t + 3 <= w.taps; t += 3) {
    depthwise_wgrad_tile<3, kWhole>(channels, w, grad, source, t, inside.low, inside.high, width,
                                    sum, ld);
  }
  for (; t < w.taps; ++t) {
    depthwise_wgrad_tile<1, kWhole>(channels, w, grad, source, t, inside.low, inside.high, width,
                                    sum, ld);
  }
  for (int64_t j = 0; j < w.count; ++j) {
    if (j == inside.low) j = inside.high;
    if (j >= w.count) break;
    int64_t t0, t1;
    taps_inside(w, j, t0, t1);
    for (t = t0; t < t1; ++t) {
      depthwise_wgrad_tile<1, kWhole>(channels, w, grad, source, t, j, j + 1, width, sum, ld);
    }
  }
}

template <class T>
void depthwise_wgrad_row(int64_t channels, const GatherAxis& w, const T* grad, const T* source,
                         accumulator_t<T>* sum, int64_t ld) {
  constexpr int L = kLanes<accumulator_t<T>>;
  int64_t c = 0;
  for (; c + L <= channels; c += L) {
    depthwise_wgrad_channels<true>(channels, w, grad + c, source + c, L, sum + c, ld);
  }
  if (c < channels) {
    depthwise_wgrad_channels<false>(channels, w, grad + c, source + c, channels - c, sum + c, ld);
  }
}

}  // namespace fastconv::FASTCONV_ISA::conv2d
