// The register-tiled matrix product under every implicit-GEMM row. Included once for each
// instruction set: see isa.h.

namespace fastconv::FASTCONV_ISA::conv2d {

// Rows of A held in registers, against two vectors of B. AVX-512 has 32 registers: 14 * 2
// accumulators + 2 of B + 1 of A; 14 also divides ResNet's and VGG's widths (56, 28, 14, 7). AVX2
// and SSE have 16: 6 * 2 + 2 + 1.
constexpr int kTileM = FASTCONV_VECTOR_BYTES == 64 ? 14 : 6;
constexpr int kTileVectors = 2;
constexpr int kRegisters = FASTCONV_VECTOR_BYTES == 64 ? 32 : 16;
static_assert(kTileM * kTileVectors + kTileVectors + 1 <= kRegisters, "the tile spills");

// D[MR x NV vectors] (+)= A * B, in one of two addressings (GemmShape). The product is summed by
// itself before it is added to D, so that a long reduction is a sum of short ones and its error
// stays small.
template <class Acc, int MR, int NV, bool kTable>
void tile(const GemmShape& shape, const Acc* A, const Acc* B, Acc* D) {
  constexpr int L = kLanes<Acc>;
  constexpr int kBases = (MR + 2) / 3;
  const int64_t lda = shape.lda, ldb = shape.ldb, ldd = shape.ldd;
  Vec<Acc> acc[MR][NV] = {};
  for (int64_t s = 0; s < shape.segments; ++s) {
    // Rows 3i, 3i+1, 3i+2 are base, base + lda and base + 2 * lda: forms an address can take. So a
    // third as many pointers are live as there are rows, and none spills.
    const Acc* base[kBases];
#pragma GCC unroll 8
    for (int i = 0; i < kBases; ++i) {
      base[i] = A + (kTable ? 0 : shape.offsets[s]) + 3 * i * lda;
      asm("" : "+r"(base[i]));
    }
#pragma GCC unroll 4
    for (int64_t k = 0; k < shape.length; ++k) {
      const Acc* row = kTable ? B + shape.offsets[k] : B;
      Vec<Acc> b[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) b[v] = load(row + v * L);
      if (!kTable) B += ldb;
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        const Acc a = base[m / 3][(m % 3) * lda + k];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) acc[m][v] += a * b[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      Acc* d = D + m * ldd + v * L;
      store(d, shape.accumulate ? load(d) + acc[m][v] : acc[m][v]);
    }
  }
}

template <class Acc>
using TileFn = void (*)(const GemmShape&, const Acc*, const Acc*, Acc*);

template <class Acc, bool kTable, int... I>
TileFn<Acc> find_tile(int64_t rows, int64_t vectors, std::integer_sequence<int, I...>) {
  static constexpr TileFn<Acc> tiles[kTileVectors][kTileM] = {{tile<Acc, I + 1, 1, kTable>...},
                                                              {tile<Acc, I + 1, 2, kTable>...}};
  return tiles[vectors - 1][rows - 1];
}

// Two vectors of B stay in the first-level cache while the rows of A pass by. Rows are dealt out
// evenly: 49 rows are 13 + 12 + 12 + 12 and not 14 + 14 + 14 + 7.
template <class Acc, bool kTable>
void gemm_tiles(const GemmShape& shape, int64_t M, int64_t n0, int64_t N, const Acc* A,
                const Acc* B, Acc* D) {
  constexpr int L = kLanes<Acc>;
  const int64_t tiles = (M + kTileM - 1) / kTileM;
  for (int64_t n = n0; n < N; n += kTileVectors * L) {
    const int64_t vectors = N - n > L ? 2 : 1;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t m0 = t * M / tiles, m1 = (t + 1) * M / tiles;
      const auto fn =
          find_tile<Acc, kTable>(m1 - m0, vectors, std::make_integer_sequence<int, kTileM>{});
      fn(shape, A + m0 * shape.lda, B + n, D + m0 * shape.ldd + n);
    }
  }
}

template <class Acc>
void gemm(const GemmShape& shape, int64_t M, int64_t N, const Acc* A, const Acc* B, Acc* D) {
  gemm_tiles<Acc, false>(shape, M, 0, N, A, B, D);
}

// One, two or three rows (depthwise, or the gradient of a picture) take wider tiles, so that enough
// multiply-adds are in flight: one has a latency of four.
template <class Acc>
void gemm_table(const GemmShape& shape, int64_t M, int64_t N, const Acc* A, const Acc* B, Acc* D) {
  constexpr int kWide = 4;
  constexpr int kWidth = kWide * kLanes<Acc>;
  int64_t n = 0;
  if (M <= 3) {
    constexpr TileFn<Acc> wide[3] = {tile<Acc, 1, kWide, true>, tile<Acc, 2, kWide, true>,
                                     tile<Acc, 3, kWide - 1, true>};
    const int64_t width = M == 3 ? kWidth - kLanes<Acc> : kWidth;
    if (M > 0) {
      for (; n + width <= N; n += width) wide[M - 1](shape, A, B + n, D + n);
    }
  }
  gemm_tiles<Acc, true>(shape, M, n, N, A, B, D);
}

}  // namespace fastconv::FASTCONV_ISA::conv2d
