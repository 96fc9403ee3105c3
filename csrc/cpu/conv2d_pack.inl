// Gathering and permuting into the small matrices that gemm multiplies. Included once for each
// instruction set: see isa.h.

namespace fastconv::FASTCONV_ISA::conv2d {

FASTCONV_INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// dst[i] = src[i]. From one vector on, the tail is a last whole vector that overlaps the one
// before.
template <class Dst, class Src>
FASTCONV_INLINE void copy(Dst* dst, const Src* src, int64_t n) {
  constexpr int L = kLanes<accumulator_t<Src>>;
  if (n < L) return copy_short(dst, src, n);
  int64_t i = 0;
  for (; i + L <= n; i += L) store(dst + i, load(src + i));
  if (i < n) store(dst + n - L, load(src + n - L));
}

template <class Acc, class T>
FASTCONV_INLINE void copy_strided(Acc* dst, const T* src, int64_t step, int64_t n) {
  if (step == 1) return copy(dst, src, n);
  if (step == 2) {  // every stem and every down-sampling layer: worth a loop of its own
    for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<Acc>(src[2 * i]);
    return;
  }
  for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<Acc>(src[i * step]);
}

template <class Acc>
FASTCONV_INLINE void zero(Acc* dst, int64_t n) {
  constexpr int L = kLanes<Acc>;
  const Vec<Acc> zeros = {};
  if (n < L) return store_part<Acc>(dst, zeros, n);
  for (int64_t i = 0; i + L <= n; i += L) store(dst + i, zeros);
  store(dst + n - L, zeros);
}

// Copies what lies in [low, high) of [begin, end), puts zeros elsewhere. src[i] goes to dst[i].
template <class Acc, class T>
FASTCONV_INLINE void copy_clipped(Acc* dst, const T* src, int64_t begin, int64_t end, int64_t low,
                                  int64_t high) {
  low = clamp(low, begin, end);
  high = clamp(high, low, end);
  if (begin < low) zero(dst + begin, low - begin);
  if (low < high) copy(dst + low, src + low, high - low);
  if (high < end) zero(dst + high, end - high);
}

// One filter row's part of one pixel: columns [k0, k1) of the tap_w * channels there are. `row`
// points at the source row's first element and w0 is the column under tap 0.
template <class Acc, class T>
FASTCONV_INLINE void gather_taps(const Gather& g, const T* row, int64_t w0, int64_t k0, int64_t k1,
                                 Acc* dst) {
  const int64_t depth = g.channels;
  if (g.w.hop == 1 && depth == g.C) {  // neighbouring taps are neighbours in memory
    const int64_t low = -w0 * depth, high = (g.w.size - w0) * depth;
    copy_clipped(dst, row - low, k0, k1, low, high);
    return;
  }
  for (int64_t tap = k0 / depth; tap * depth < k1; ++tap) {
    const int64_t w = w0 + tap * g.w.hop;
    const int64_t begin = clamp(k0, tap * depth, k1), end = clamp((tap + 1) * depth, begin, k1);
    if (w < 0 || w >= g.w.size) {
      zero(dst + begin, end - begin);
    } else {
      copy(dst + begin, row + w * g.C + g.first_channel + (begin - tap * depth), end - begin);
    }
  }
}

template <class T>
void im2row(const Gather& g, const T* src, int64_t m0, int64_t m1, int64_t k0, int64_t k1,
            accumulator_t<T>* dst, int64_t ld) {
  const int64_t width = g.w.taps * g.channels;
  if (k1 <= k0) return;
  int64_t j = m0 % g.w.count, i = m0 / g.w.count % g.h.count, n = m0 / g.w.count / g.h.count;
  for (int64_t m = m0; m < m1; ++m, dst += ld) {
    const int64_t w0 = j * g.w.step + g.w.first;
    for (int64_t tap = k0 / width; tap * width < k1; ++tap) {
      const int64_t h = i * g.h.step + g.h.first + tap * g.h.hop;
      const int64_t begin = clamp(k0 - tap * width, 0, width);
      const int64_t end = clamp(k1 - tap * width, begin, width);
      accumulator_t<T>* part = dst + tap * width - k0;
      if (h < 0 || h >= g.h.size) {
        zero(part + begin, end - begin);
      } else {
        gather_taps(g, src + (n * g.h.size + h) * g.w.size * g.C, w0, begin, end, part);
      }
    }
    if (++j == g.w.count) {
      j = 0;
      if (++i == g.h.count) {
        i = 0;
        ++n;
      }
    }
  }
}

template <class T>
void im2col(const Gather& g, const T* src, int64_t m0, int64_t m1, int64_t k0, int64_t k1,
            accumulator_t<T>* dst, int64_t ld) {
  const int64_t taps = g.taps(), grid_row = g.w.count;
  for (int64_t k = k0; k < k1; ++k, dst += ld) {
    const int64_t c = g.channel_major ? k / taps : k % g.channels;
    const int64_t tap = g.channel_major ? k % taps : k / g.channels;
    const int64_t h0 = g.h.first + tap / g.w.taps * g.h.hop;
    const int64_t w0 = g.w.first + tap % g.w.taps * g.w.hop;
    // Grid columns j with 0 <= j * step + w0 < size.
    const int64_t low = w0 >= 0 ? 0 : (-w0 + g.w.step - 1) / g.w.step;
    const int64_t high = w0 >= g.w.size ? 0 : (g.w.size - 1 - w0) / g.w.step + 1;
    int64_t j = m0 % grid_row, i = m0 / grid_row % g.h.count, n = m0 / grid_row / g.h.count;
    for (int64_t m = m0; m < m1;) {
      const int64_t j1 = grid_row - j < m1 - m ? grid_row : j + m1 - m;
      const int64_t h = i * g.h.step + h0;
      accumulator_t<T>* part = dst + (m - m0) - j;  // part[j] is grid column j
      const bool inside = h >= 0 && h < g.h.size;
      const int64_t begin = inside ? clamp(low, j, j1) : j1;
      const int64_t end = inside ? clamp(high, begin, j1) : j1;
      if (j < begin) zero(part + j, begin - j);
      if (begin < end) {
        const T* row = src + ((n * g.C + g.first_channel + c) * g.h.size + h) * g.w.size;
        copy_strided(part + begin, row + begin * g.w.step + w0, g.w.step, end - begin);
      }
      if (end < j1) zero(part + end, j1 - end);
      m += j1 - j;
      j = 0;
      if (++i == g.h.count) {
        i = 0;
        ++n;
      }
    }
  }
}

// dst[x * dst_ld + y] = src[y * src_ld + x] for x < columns, y < rows, in squares of kLanes. A
// vector may be read past its columns as long as it ends before `last`, the box's last element.
template <class Acc, class Src, class Dst>
void transpose_matrix(const Src* src, int64_t src_ld, Dst* dst, int64_t dst_ld, int64_t rows,
                      int64_t columns, const Src* last) {
  constexpr int L = kLanes<Acc>;
  for (int64_t y = 0; y < rows; y += L) {
    const int64_t height = rows - y < L ? rows - y : L;
    for (int64_t x = 0; x < columns; x += L) {
      const int64_t width = columns - x < L ? columns - x : L;
      Vec<Acc> square[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        if (i < height) {
          const Src* p = src + (y + i) * src_ld + x;
          square[i] = width == L || p + L - 1 <= last ? load(p) : load_part<Acc>(p, width);
        } else {
          square[i] = Vec<Acc>{};
        }
      }
      transpose<Acc>(square);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        if (i >= width) break;
        Dst* p = dst + (x + i) * dst_ld + y;
        if (height == L) {
          store(p, square[i]);
        } else {
          store_part<Acc>(p, square[i], height);
        }
      }
    }
  }
}

// Of the dimensions longer than 1, the one in which neighbours are nearest; -1 if there is none.
inline int nearest_dimension(const int64_t* extent, const int64_t* stride) {
  int best = -1;
  for (int i = 0; i < 4; ++i) {
    if (extent[i] > 1 && (best < 0 || stride[i] < stride[best])) best = i;
  }
  return best;
}

template <class Acc, class Src, class Dst>
void permute(const Permutation& p, const Src* src, Dst* dst) {
  int64_t last = 0;
  for (int i = 0; i < 4; ++i) {
    if (p.extent[i] == 0) return;
    last += (p.extent[i] - 1) * p.src_stride[i];
  }
  // a runs along the source, b along the destination; the others are loops around them, the nearest
  // in the source innermost.
  int a = nearest_dimension(p.extent, p.src_stride);
  int b = nearest_dimension(p.extent, p.dst_stride);
  if (a < 0) a = b = 0;
  int outer[3] = {}, count = 0;
  for (int i = 0; i < 4; ++i) {
    if (i == a || i == b) continue;
    int at = count++;
    for (; at > 0 && p.src_stride[outer[at - 1]] < p.src_stride[i]; --at) outer[at] = outer[at - 1];
    outer[at] = i;
  }
  const int c = outer[0], d = outer[1];
  const int e = count == 3 ? outer[2] : -1;
  const bool squares = a != b && p.src_stride[a] == 1 && p.dst_stride[b] == 1;
  const bool runs = a == b && p.src_stride[a] == 1 && p.dst_stride[a] == 1;
  for (int64_t x = 0; x < p.extent[c]; ++x) {
    for (int64_t y = 0; y < p.extent[d]; ++y) {
      for (int64_t z = 0; z < (e < 0 ? 1 : p.extent[e]); ++z) {
        const Src* from = src + x * p.src_stride[c] + y * p.src_stride[d];
        Dst* to = dst + x * p.dst_stride[c] + y * p.dst_stride[d];
        if (e >= 0) {
          from += z * p.src_stride[e];
          to += z * p.dst_stride[e];
        }
        if (squares) {
          transpose_matrix<Acc>(from, p.src_stride[b], to, p.dst_stride[a], p.extent[b],
                                p.extent[a], src + last);
        } else if (runs) {
          copy(to, from, p.extent[a]);
        } else {
          const int64_t rows = a == b ? 1 : p.extent[b];
          for (int64_t i = 0; i < rows; ++i) {
            for (int64_t j = 0; j < p.extent[a]; ++j) {
              to[i * p.dst_stride[b] * (a != b) + j * p.dst_stride[a]] =
                  Dst(static_cast<Acc>(from[i * p.src_stride[b] * (a != b) + j * p.src_stride[a]]));
            }
          }
        }
      }
    }
  }
}

}  // namespace fastconv::FASTCONV_ISA::conv2d
