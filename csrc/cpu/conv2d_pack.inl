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

// Columns of a matrix that is transposed: they follow one another in the source, and in the
// destination column x lies at x % inner * inner_stride + x / inner * outer_stride.
struct Columns {
  int64_t count, inner, inner_stride, outer_stride;
};

// dst[column(x) + y] = src[y * src_ld + x] for y < rows, in squares of kLanes. A vector may be read
// past its columns as long as it ends before `last`, the box's last element.
template <class Acc, class Src, class Dst>
void transpose_matrix(const Src* src, int64_t src_ld, Dst* dst, const Columns& columns,
                      int64_t rows, const Src* last) {
  constexpr int L = kLanes<Acc>;
  for (int64_t y = 0; y < rows; y += L) {
    const int64_t height = rows - y < L ? rows - y : L;
    int64_t inner = 0, at = y;  // of column x
    for (int64_t x = 0; x < columns.count; x += L) {
      const int64_t width = columns.count - x < L ? columns.count - x : L;
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
        if (height == L) {
          store(dst + at, square[i]);
        } else {
          store_part<Acc>(dst + at, square[i], height);
        }
        at += columns.inner_stride;
        if (++inner == columns.inner) {
          inner = 0;
          at += columns.outer_stride - columns.inner * columns.inner_stride;
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

// Joins dimensions that follow one another in the source and in the destination.
inline void join_dimensions(Permutation& p) {
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) {
      if (i == j || p.extent[i] == 1 || p.extent[j] == 1) continue;
      if (p.src_stride[i] == p.extent[j] * p.src_stride[j] &&
          p.dst_stride[i] == p.extent[j] * p.dst_stride[j]) {
        p.extent[j] *= p.extent[i];
        p.extent[i] = 1;
        i = -1;  // the joined dimension may have a neighbour in turn
        break;
      }
    }
  }
}

// How a permutation is carried out: a runs along the source and b along the destination, a2 carries
// on where a ends in the source; the others are loops, the nearest in the source innermost.
struct PermutationOrder {
  int a, b, a2 = -1;
  int loops[4], count = 0;
  explicit PermutationOrder(const Permutation& p)
      : a(nearest_dimension(p.extent, p.src_stride)), b(nearest_dimension(p.extent, p.dst_stride)) {
    if (a < 0) a = b = 0;
    for (int i = 0; i < 4; ++i) {
      if (i == a || i == b || p.extent[i] == 1) continue;
      if (a != b && p.src_stride[i] == p.extent[a] * p.src_stride[a]) {
        a2 = i;
        continue;
      }
      int at = count++;
      for (; at > 0 && p.src_stride[loops[at - 1]] < p.src_stride[i]; --at) {
        loops[at] = loops[at - 1];
      }
      loops[at] = i;
    }
  }
};

template <class Acc, class Src, class Dst>
void permute_plane(const Permutation& p, const PermutationOrder& order, const Src* src, Dst* dst,
                   const Src* last) {
  const int a = order.a, b = order.b, a2 = order.a2;
  const int64_t from_a = p.src_stride[a], to_a = p.dst_stride[a];
  if (a == b && from_a == 1 && to_a == 1) return copy(dst, src, p.extent[a]);
  const Columns columns = {p.extent[a] * (a2 < 0 ? 1 : p.extent[a2]), p.extent[a], to_a,
                           a2 < 0 ? 0 : p.dst_stride[a2]};
  const int64_t rows = a == b ? 1 : p.extent[b], from_b = a == b ? 0 : p.src_stride[b];
  if (a != b && from_a == 1 && p.dst_stride[b] == 1) {
    return transpose_matrix<Acc>(src, from_b, dst, columns, rows, last);
  }
  for (int64_t y = 0; y < rows; ++y) {
    for (int64_t x = 0; x < columns.count; ++x) {
      const int64_t to = x % columns.inner * to_a + x / columns.inner * columns.outer_stride;
      dst[y * p.dst_stride[b] + to] = Dst(static_cast<Acc>(src[y * from_b + x * from_a]));
    }
  }
}

template <class Acc, class Src, class Dst>
void permute(const Permutation& permutation, const Src* src, Dst* dst) {
  Permutation p = permutation;
  join_dimensions(p);
  const Src* last = src;
  for (int i = 0; i < 4; ++i) {
    if (p.extent[i] == 0) return;
    last += (p.extent[i] - 1) * p.src_stride[i];
  }
  const PermutationOrder order(p);
  int64_t index[4] = {};
  for (;;) {
    permute_plane<Acc>(p, order, src, dst, last);
    int loop = order.count - 1;
    for (; loop >= 0; --loop) {
      const int i = order.loops[loop];
      src += p.src_stride[i];
      dst += p.dst_stride[i];
      if (++index[i] < p.extent[i]) break;
      src -= p.extent[i] * p.src_stride[i];
      dst -= p.extent[i] * p.dst_stride[i];
      index[i] = 0;
    }
    if (loop < 0) return;
  }
}

}  // namespace fastconv::FASTCONV_ISA::conv2d
