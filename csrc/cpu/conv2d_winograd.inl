// The three transforms of Winograd's convolution, one copy for each instruction set (isa.h).
//
// One dimension of F(m, 3) takes a patch of m + 2 inputs and a filter of 3 to m outputs:
//   y = A' [(G g) . (B' d)],  . element by element,
// where the rows of G and A evaluate polynomials at m + 1 points and at infinity. Two dimensions
// apply each matrix from both sides.
#include "cpu/lanes.inl"

namespace fastconv::FASTCONV_ISA::winograd {

template <int kTile>
struct Transform;

// F(2, 3) at 0, 1, -1: additions and exact halves, so small integers come out exact.
template <>
struct Transform<2> {
  template <class V>
  FASTCONV_INLINE static void filter(const V* g, V* u) {
    const V even = (g[0] + g[2]) * 0.5, odd = g[1] * 0.5;
    u[0] = g[0];
    u[1] = even + odd;
    u[2] = even - odd;
    u[3] = g[2];
  }
  template <class V>
  FASTCONV_INLINE static void input(const V* d, V* v) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[1] - d[3];
  }
  template <class V>
  FASTCONV_INLINE static void output(const V* m, V* y) {
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = (m[1] - m[2]) - m[3];
  }
};

// F(4, 3) at 0, a, -a, b, -b with a = 3/4, b = 3/2. The usual 1 and 2 give 2 to 3 times the error:
// what matters is that powers of the points stay near 1. These are sums of few powers of two, so
// that every constant below but those of the filter is exact.
template <>
struct Transform<4> {
  static constexpr float a = 0.75f, b = 1.5f;
  static constexpr float a2 = a * a, b2 = b * b;

  template <class V>
  FASTCONV_INLINE static void filter(const V* g, V* u) {
    constexpr double A2 = a2, B2 = b2;
    // The value at a point, over the product of its differences from the others.
    const V even_a = (g[0] + g[2] * A2) * (0.5 / (A2 * (A2 - B2)));
    const V odd_a = g[1] * (a * 0.5 / (A2 * (A2 - B2)));
    const V even_b = (g[0] + g[2] * B2) * (0.5 / (B2 * (B2 - A2)));
    const V odd_b = g[1] * (b * 0.5 / (B2 * (B2 - A2)));
    u[0] = g[0] * (1 / (A2 * B2));
    u[1] = even_a + odd_a;
    u[2] = even_a - odd_a;
    u[3] = even_b + odd_b;
    u[4] = even_b - odd_b;
    u[5] = g[2];
  }
  template <class V>
  FASTCONV_INLINE static void input(const V* d, V* v) {
    const V even_a = d[4] - d[2] * b2, odd_a = d[3] - d[1] * b2;
    const V even_b = d[4] - d[2] * a2, odd_b = d[3] - d[1] * a2;
    v[0] = d[0] * (a2 * b2) + (d[4] - d[2] * (a2 + b2));
    v[1] = even_a + odd_a * a;
    v[2] = even_a - odd_a * a;
    v[3] = even_b + odd_b * b;
    v[4] = even_b - odd_b * b;
    v[5] = d[1] * (a2 * b2) + (d[5] - d[3] * (a2 + b2));
  }
  template <class V>
  FASTCONV_INLINE static void output(const V* m, V* y) {
    const V sum_a = m[1] + m[2], difference_a = m[1] - m[2];
    const V sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    y[0] = m[0] + (sum_a + sum_b);
    y[1] = difference_a * a + difference_b * b;
    y[2] = sum_a * a2 + sum_b * b2;
    y[3] = difference_a * (a * a2) + (difference_b * (b * b2) + m[5]);
  }
};

// g[channel][tap][width] -> u[matrix][channel][width]. In float64, rounded once: what the filter's
// transform loses would be lost in every product.
template <int kTile>
void transform_filter(const float* g, int64_t channels, int64_t width, float* u, int64_t ld) {
  constexpr int P = kTile + 2;
  constexpr int64_t L = Lanes<double>::kCount;
  typedef float Narrow __attribute__((vector_size(FASTCONV_VECTOR_BYTES / 2)));
  for (int64_t c = 0; c < channels; ++c, g += 9 * width, u += width) {
    for (int64_t k = 0; k < width; k += L) {
      Vec<double> half[P][3];  // transformed along the filter's rows
#pragma GCC unroll 3
      for (int s = 0; s < 3; ++s) {
        Vec<double> column[3], out[P];
#pragma GCC unroll 3
        for (int r = 0; r < 3; ++r) {
          Narrow narrow;
          __builtin_memcpy(&narrow, g + (3 * r + s) * width + k, sizeof(narrow));
          column[r] = __builtin_convertvector(narrow, Vec<double>);
        }
        Transform<kTile>::filter(column, out);
#pragma GCC unroll 6
        for (int i = 0; i < P; ++i) half[i][s] = out[i];
      }
#pragma GCC unroll 6
      for (int i = 0; i < P; ++i) {
        Vec<double> out[P];
        Transform<kTile>::filter(half[i], out);
#pragma GCC unroll 6
        for (int j = 0; j < P; ++j) {
          const Narrow narrow = __builtin_convertvector(out[j], Narrow);
          __builtin_memcpy(u + (i * P + j) * ld + k, &narrow, sizeof(narrow));
        }
      }
    }
  }
}

// One vector of channels from `at`, a pointer for each element of the patch; kPart: only the first
// `n` of them exist. The next tile's lie `ahead`; fetching them now saves a fifth. The 36 vectors
// between the two dimensions pass through memory, by loops that are not unrolled: GCC spills
// several times as much when it sees them all at once.
template <int kTile, bool kPart>
FASTCONV_INLINE void transform_patch(const float* const* at, int64_t ahead, int64_t c, int64_t n,
                                     float* v, int64_t ld) {
  constexpr int P = kTile + 2;
  constexpr int64_t L = Lanes<float>::kCount;
  alignas(64) float half[P * P * L];
#pragma GCC unroll 1
  for (int j = 0; j < P; ++j) {
    Vec<float> column[P], out[P];
#pragma GCC unroll 6
    for (int i = 0; i < P; ++i) {
      const float* source = at[j * P + i] + c;
      column[i] = kPart ? load_first(source, n, Vec<float>{}) : load(source);
      __builtin_prefetch(source + ahead);
    }
    Transform<kTile>::input(column, out);
#pragma GCC unroll 6
    for (int i = 0; i < P; ++i) store(half + (i * P + j) * L, out[i]);
  }
#pragma GCC unroll 1
  for (int i = 0; i < P; ++i) {
    Vec<float> row[P], out[P];
#pragma GCC unroll 6
    for (int j = 0; j < P; ++j) row[j] = load(half + (i * P + j) * L);
    Transform<kTile>::input(row, out);
    float* to = v + i * P * ld + c;
#pragma GCC unroll 6
    for (int j = 0; j < P; ++j) store(to + j * ld, out[j]);
  }
}

// A patch of NHWC input -> v[matrix][channel], whole vectors of channels.
template <int kTile>
void transform_input(const WinogradPatch& p, float* v, int64_t ld) {
  constexpr int P = kTile + 2;
  constexpr int64_t L = Lanes<float>::kCount;
  const float* at[P * P];  // column by column
  for (int64_t i = 0; i < P; ++i) {
    for (int64_t j = 0; j < P; ++j) {
      const bool inside = i >= p.top && i < p.bottom && j >= p.left && j < p.right;
      at[j * P + i] = inside ? p.image + p.first + i * p.row + j * p.pixel : p.zeros;
    }
  }
  int64_t c = 0;
  const int64_t ahead = kTile * p.pixel;
  for (; c + L <= p.channels; c += L) transform_patch<kTile, false>(at, ahead, c, L, v, ld);
  if (c < p.channels) transform_patch<kTile, true>(at, ahead, c, p.channels - c, v, ld);
}

// m[matrix][column] -> y[pixel of the tile][column], whole vectors of columns. Returns whether all
// of them are finite.
template <int kTile>
bool transform_output(const float* m, int64_t ld, int64_t columns, float* y, int64_t y_ld) {
  constexpr int P = kTile + 2;
  constexpr int64_t L = Lanes<float>::kCount;
  alignas(64) float half[kTile * P * L];
  Vec<float> check = {};
  for (int64_t k = 0; k < columns; k += L) {
#pragma GCC unroll 1
    for (int j = 0; j < P; ++j) {
      Vec<float> column[P], out[kTile];
      const float* from = m + j * ld + k;
#pragma GCC unroll 6
      for (int i = 0; i < P; ++i) column[i] = load(from + i * P * ld);
      Transform<kTile>::output(column, out);
#pragma GCC unroll 4
      for (int i = 0; i < kTile; ++i) store(half + (i * P + j) * L, out[i]);
    }
#pragma GCC unroll 1
    for (int i = 0; i < kTile; ++i) {
      Vec<float> row[P], out[kTile];
#pragma GCC unroll 6
      for (int j = 0; j < P; ++j) row[j] = load(half + (i * P + j) * L);
      Transform<kTile>::output(row, out);
#pragma GCC unroll 4
      for (int j = 0; j < kTile; ++j) {
        store(y + (i * kTile + j) * y_ld + k, out[j]);
        check += out[j] * 0.0f;  // NaN from infinity and NaN
      }
    }
  }
  bool finite = true;
  for (int64_t l = 0; l < L; ++l) finite &= check[l] == 0.0f;
  return finite;
}

template <int kTile>
inline const WinogradOps& ops() {
  static const WinogradOps table = {transform_filter<kTile>, transform_input<kTile>,
                                    transform_output<kTile>};
  return table;
}

}  // namespace fastconv::FASTCONV_ISA::winograd
