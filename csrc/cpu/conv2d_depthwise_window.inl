// The register tile of depthwise convolution with large filters: see conv2d_depthwise_window.h.
// Included once for each instruction set: see isa.h.
#include "cpu/conv2d_window.inl"

namespace fastconv::FASTCONV_ISA::conv2d {

// Pixels of a tile, times two rows: 14 of AVX-512's 32 registers, 12 of the others' 16. Seven
// divides 56, 28, 14 and 7; per 14 multiply-adds 9 vectors are loaded.
constexpr int kDepthwisePixels = FASTCONV_VECTOR_BYTES == 64 ? 7 : 6;

// Adds `rows` source rows to the sums of the first output row, the second or both.
template <bool kFirst, bool kSecond, class Acc>
FASTCONV_INLINE void add_source_rows(const DepthwiseTile& shape, int64_t rows, const Acc*& window,
                                     const Acc*& filter, Vec<Acc>* first, Vec<Acc>* second) {
  constexpr int L = kLanes<Acc>;
  const int64_t taps = shape.taps, tap = shape.window_tap, to_second = shape.second;
  for (; rows > 0; --rows, window += shape.window_row, filter += shape.filter_row) {
    const Acc* x = window;
    const Acc* f = filter;
    for (int64_t t = 0; t < taps; ++t, x += tap, f += L) {
      const Vec<Acc> f0 = load(kFirst ? f : f + to_second);
      const Vec<Acc> f1 = kFirst && kSecond ? load(f + to_second) : f0;
#pragma GCC unroll 8
      for (int j = 0; j < kDepthwisePixels; ++j) {
        const Vec<Acc> v = load(x + j * L);
        if (kFirst) first[j] += f0 * v;
        if (kSecond) second[j] += f1 * v;
      }
    }
  }
}

template <class Acc, int kRows>
void depthwise_window_tile(const DepthwiseTile& shape, const Acc* window, const Acc* filter,
                           Acc* D) {
  constexpr int kPixels = kDepthwisePixels;
  Vec<Acc> acc[2][kPixels] = {};
  if (kRows == 1) {
    add_source_rows<true, false>(shape, shape.lead, window, filter, acc[0], acc[1]);
  } else if (shape.second_leads) {
    add_source_rows<false, true>(shape, shape.lead, window, filter, acc[0], acc[1]);
    add_source_rows<true, true>(shape, shape.both, window, filter, acc[0], acc[1]);
    add_source_rows<true, false>(shape, shape.tail, window, filter, acc[0], acc[1]);
  } else {
    add_source_rows<true, false>(shape, shape.lead, window, filter, acc[0], acc[1]);
    add_source_rows<true, true>(shape, shape.both, window, filter, acc[0], acc[1]);
    add_source_rows<false, true>(shape, shape.tail, window, filter, acc[0], acc[1]);
  }
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kPixels; ++j) {
      Acc* d = D + r * shape.row_ld + j * shape.pixel_ld;
      store(d, shape.accumulate ? load(d) + acc[r][j] : acc[r][j]);
    }
  }
}

template <class T>
inline const DepthwiseWindowOps<T>& depthwise_window() {
  using Acc = accumulator_t<T>;
  static const DepthwiseWindowOps<T> table = {
      kLanes<Acc>,
      kDepthwisePixels,
      {depthwise_window_tile<Acc, 1>, depthwise_window_tile<Acc, 2>},
      copy_pixels<T>};
  return table;
}

}  // namespace fastconv::FASTCONV_ISA::conv2d
