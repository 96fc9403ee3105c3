// Depthwise convolution of NCHW planes: a vector of pixels at a time, a tap is a shift of the
// plane. Included once for each instruction set: see isa.h.

namespace fastconv::FASTCONV_ISA::conv2d {

template <class T>
void copy_plane(const DepthwisePlane& p, const T* source, accumulator_t<T>* plane) {
  for (int64_t phase = 0; phase < p.phases; ++phase) {
    const PhaseCopy& c = p.copies[phase];
    for (int64_t row = 0; row < c.rows; ++row) {
      copy_strided(plane + c.plane + row * p.row_ld, source + c.source + row * c.source_row,
                   c.source_column, c.columns);
    }
  }
}

// Pixels are numbered along the plane's rows; the sums between the end of one output row and the
// start of the next are dropped. Four vectors hide the latency of a multiply-add.
template <class T>
void depthwise_plane(const DepthwisePlane& p, const accumulator_t<T>* plane,
                     const accumulator_t<T>* filter, accumulator_t<T>* sums,
                     const RowEpilogue<T>& epilogue, T* out) {
  using Acc = accumulator_t<T>;
  constexpr int L = kLanes<Acc>, kVectors = 4;
  const int64_t n = (p.rows - 1) * p.row_ld + p.columns;
  int64_t i = 0;
  for (; i + (kVectors - 1) * L < n; i += kVectors * L) {
    Vec<Acc> acc[kVectors] = {};
    for (int64_t t = 0; t < p.taps; ++t) {
      const Acc* x = plane + p.offsets[t] + i;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[v] += filter[t] * load(x + v * L);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(sums + i + v * L, acc[v]);
  }
  for (; i < n; i += L) {
    Vec<Acc> acc = {};
    for (int64_t t = 0; t < p.taps; ++t) acc += filter[t] * load(plane + p.offsets[t] + i);
    store(sums + i, acc);
  }
  RowEpilogue<T> e = epilogue;
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t at = row * p.out_row;
    if (epilogue.residual != nullptr) e.residual = epilogue.residual + at;
    for (int64_t j = 0; j < p.columns; j += L) {
      finish(e, load(sums + row * p.row_ld + j), j, p.columns - j < L ? p.columns - j : L, out + at,
             p.out_column);
    }
  }
}

template <class Acc, int kTaps>
FASTCONV_INLINE void plane_products(const Acc* plane, const int64_t* offsets, const Acc* grad,
                                    int64_t n, Acc* sum) {
  constexpr int L = kLanes<Acc>;
  Vec<Acc> acc[kTaps] = {};
  for (int64_t i = 0; i < n; i += L) {
    const Vec<Acc> g = load(grad + i);
#pragma GCC unroll 8
    for (int t = 0; t < kTaps; ++t) acc[t] += g * load(plane + offsets[t] + i);
  }
  for (int t = 0; t < kTaps; ++t) {
    Acc total = 0;
    for (int l = 0; l < L; ++l) total += acc[t][l];
    sum[t] += total;
  }
}

template <class Acc>
void depthwise_plane_wgrad(const DepthwisePlane& p, const Acc* plane, const Acc* grad, Acc* sum) {
  const int64_t n = (p.rows - 1) * p.row_ld + p.columns;
  int64_t t = 0;
  for (; t + 8 <= p.taps; t += 8) plane_products<Acc, 8>(plane, p.offsets + t, grad, n, sum + t);
  for (; t + 3 <= p.taps; t += 3) plane_products<Acc, 3>(plane, p.offsets + t, grad, n, sum + t);
  for (; t < p.taps; ++t) plane_products<Acc, 1>(plane, p.offsets + t, grad, n, sum + t);
}

}  // namespace fastconv::FASTCONV_ISA::conv2d
