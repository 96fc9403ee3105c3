// From accumulators to the output: scale, shift, residual, activation, one rounding. Included once
// for each instruction set: see isa.h.

namespace fastconv::FASTCONV_ISA::conv2d {

// The first n <= kLanes elements `step` apart.
template <class Acc, class T>
FASTCONV_INLINE Vec<Acc> load_some(const T* p, int64_t n, int64_t step) {
  if (step == 1) return n == kLanes<Acc> ? load(p) : load_part<Acc>(p, n);
  Acc lanes[kLanes<Acc>] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = static_cast<Acc>(p[i * step]);
  return load(lanes);
}

// The epilogue of columns [i, i + width) of a row, width <= kLanes.
template <class T>
FASTCONV_INLINE void finish(const RowEpilogue<T>& e, Vec<accumulator_t<T>> z, int64_t i,
                            int64_t width, T* out, int64_t step) {
  using Acc = accumulator_t<T>;
  constexpr int L = kLanes<Acc>;
  if (e.is_plain() && width == L && step == 1) return store(out + i, z);
  if (e.scale != nullptr) {
    z = e.per_column ? z * load_some<Acc>(e.scale + i, width, 1) : z * e.scale[0];
  }
  if (e.shift != nullptr) {
    z = e.per_column ? z + load_some<Acc>(e.shift + i, width, 1) : z + e.shift[0];
  }
  if (e.residual != nullptr) z += load_some<Acc>(e.residual + i * step, width, step);
  z = activate_vector(z, e.activation, e.slope);
  if (step != 1) {
    T lanes[L];
    store(lanes, z);
    for (int64_t l = 0; l < width; ++l) out[(i + l) * step] = lanes[l];
  } else if (width == L) {
    store(out + i, z);
  } else {
    store_part<Acc>(out + i, z, width);
  }
}

// `acc` may be read up to a whole vector beyond the last column. A row's tail is a last whole
// vector that overlaps the one before it, unless there is a residual: it may be the output itself,
// and must then be added once.
template <class T>
void store_rows(const RowEpilogue<T>& epilogue, const RowBox& box, const accumulator_t<T>* acc,
                T* out) {
  constexpr int L = kLanes<accumulator_t<T>>;
  RowEpilogue<T> e = epilogue;
  const bool overlap = box.step == 1 && box.columns >= L && e.residual == nullptr;
  for (int64_t row = 0; row < box.rows; ++row, acc += box.acc_ld, out += box.out_ld) {
    if (epilogue.residual != nullptr) e.residual = epilogue.residual + row * box.out_ld;
    int64_t i = 0;
    for (; i + L <= box.columns; i += L) finish(e, load(acc + i), i, L, out, box.step);
    if (i == box.columns) continue;
    if (overlap) {
      i = box.columns - L;
      finish(e, load(acc + i), i, L, out, 1);
    } else {
      finish(e, load(acc + i), i, box.columns - i, out, box.step);
    }
  }
}

// bgrad: sums in float64 cost nothing where memory is the limit, and make the order irrelevant to
// the error.
template <class T>
void add_rows(const T* src, int64_t rows, int64_t ld, int64_t n, double* sum) {
  for (int64_t row = 0; row < rows; ++row) {
    const T* p = src + row * ld;
    for (int64_t i = 0; i < n; ++i)
      sum[i] += static_cast<double>(static_cast<accumulator_t<T>>(p[i]));
  }
}
template <class T>
double sum_run(const T* src, int64_t n) {
  constexpr int kWays = 16;  // independent sums, so that additions overlap
  double ways[kWays] = {};
  int64_t i = 0;
  for (; i + kWays <= n; i += kWays) {
    for (int w = 0; w < kWays; ++w) {
      ways[w] += static_cast<double>(static_cast<accumulator_t<T>>(src[i + w]));
    }
  }
  for (int w = 0; i < n; ++i, ++w)
    ways[w] += static_cast<double>(static_cast<accumulator_t<T>>(src[i]));
  double sum = 0;
  for (const double way : ways) sum += way;
  return sum;
}

}  // namespace fastconv::FASTCONV_ISA::conv2d
