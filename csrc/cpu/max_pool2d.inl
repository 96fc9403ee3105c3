// Max pooling forward, one copy for each instruction set.
//
// "Greater than the maximum so far, or NaN" is associative as long as operands keep their order, so
// a window may be scanned along each of its rows first and then down the rows' results: values,
// positions, signs of zero and NaN come out as in the plain scan. NCHW does that, a vector of
// outputs at a time, and keeps the rows' results for the windows below. NHWC scans a window with a
// vector of channels.
#include "cpu/lanes.inl"
#include "cpu/pool2d_columns.inl"
//
#include "cpu/max_pool2d_dgrad.inl"

namespace fastconv {
namespace FASTCONV_ISA {

// Stores n positions (a whole vector or its first n lanes) as the kind asks.
template <class A>
FASTCONV_INLINE void store_index(void* index, PoolIndex kind, int64_t i, IntVec<A> v, int64_t n) {
  constexpr int64_t L = Lanes<A>::kCount;
  typename Lanes<A>::Int lanes[L];
  store_int<A>(lanes, v);
  const auto write = [&](auto* out) {
    using To = std::remove_pointer_t<decltype(out)>;
    if (n >= L) {
      for (int64_t l = 0; l < L; ++l) out[i + l] = static_cast<To>(lanes[l]);
    } else {
      for (int64_t l = 0; l < n; ++l) out[i + l] = static_cast<To>(lanes[l]);
    }
  };
  if (kind == PoolIndex::kOffset8) {
    write(static_cast<uint8_t*>(index));
  } else if (kind == PoolIndex::kOffset32) {
    write(static_cast<int32_t*>(index));
  } else {
    write(static_cast<int64_t*>(index));
  }
}

// One step of the scan.
template <class A, bool kIndex>
FASTCONV_INLINE void take_greater(Vec<A>& best, IntVec<A>& at, Vec<A> value, IntVec<A> where) {
  const auto mask = (value > best) | (value != value);
  best = mask ? value : best;
  if constexpr (kIndex) at = mask ? where : at;
}

// What a thread keeps of one NCHW plane: for the last input rows read, the maximum of each window's
// columns and where it stood.
template <class T, bool kIndex>
class PlaneScan {
  using A = accumulator_t<T>;
  using Int = typename Lanes<A>::Int;
  static constexpr int64_t L = Lanes<A>::kCount;

 public:
  explicit PlaneScan(const Pool2dProblem& t)
      : t_(t),
        k_(t, L),
        flat_(t.index == PoolIndex::kFlatIndex64),
        batch_(rows_at_once(t)),
        depth_(std::min((t.R - 1) * t.dil_h + batch_, t.H)),
        staged_(static_cast<size_t>(batch_) * k_.staged_size(),
                -std::numeric_limits<A>::infinity()),
        linear_(static_cast<size_t>(t.W + L)),
        values_(static_cast<size_t>(depth_ * k_.padded_Q)),
        columns_(kIndex ? values_.size() : 0),
        first_(static_cast<size_t>(k_.padded_Q)),
        scanned_(static_cast<size_t>(t.H), 0) {
    for (int64_t s = 0; s < t.S; ++s) key_.push_back(column_key(s));
    for (int64_t h = 0; h < t.H; ++h) slot_.push_back(h % depth_ * k_.padded_Q);
    for (int64_t q = 0; q < t.Q; ++q) {
      first_[static_cast<size_t>(q)] =
          static_cast<Int>(column_key(first_tap(q * t.stride_w - t.pad_w, t.dil_w)));
    }
  }
  void start_plane(const T* input) {
    input_ = input;
    std::fill(scanned_.begin(), scanned_.end(), 0);
  }
  // Output row p, to out[0, Q) and, from element i on, to `index`.
  void output_row(int64_t p, T* out, void* index, int64_t i);

 private:
  // A flat position is h * W + (s * dilation - pad) + q * stride, an offset r * S + s: a row's
  // part, a tap's and, for flat ones, an output's.
  int64_t column_key(int64_t s) const { return flat_ ? s * t_.dil_w - t_.pad_w : s; }
  int64_t row_key(int64_t r, int64_t h) const { return flat_ ? h * t_.W : r * t_.S; }
  // A load that straddles stores still on their way to the cache waits for them, so short rows are
  // staged some at a time and scanned after that: 28 x 28 planes gain 2x. 512 elements leave
  // room in L1 for what is scanned; with 2,048 rows of 112 ran at half the speed.
  static int64_t rows_at_once(const Pool2dProblem& t) {
    const bool reads_every_row = t.dil_h == 1 && t.stride_h <= t.R;
    return reads_every_row ? std::max<int64_t>(1, std::min(t.H, 512 / std::max<int64_t>(t.W, 1)))
                           : 1;
  }
  void stage(int64_t h, A* staged);
  void scan_columns(int64_t h, const A* staged);

  const Pool2dProblem& t_;
  const Columns k_;
  const bool flat_;
  const int64_t batch_;  // input rows staged at once
  const int64_t depth_;  // input rows kept: what one window spans, and a batch
  std::vector<A> staged_, linear_, values_;
  std::vector<Int> columns_, first_;
  std::vector<int64_t> key_, slot_;
  std::vector<char> scanned_;  // by input row; a later row overwrites it only when it is done with
  const T* input_ = nullptr;
};

template <class T, bool kIndex>
void PlaneScan<T, kIndex>::stage(int64_t h, A* staged) {
  const Vec<A> lowest = broadcast<A>(-std::numeric_limits<A>::infinity());
  const T* row = input_ + h * t_.W;
  stage_row<A>(k_, staged, linear_.data(), [&](int64_t w) FASTCONV_INLINE_LAMBDA {
    return load_upto(row + w, t_.W - w, lowest);
  });
}

template <class T, bool kIndex>
void PlaneScan<T, kIndex>::scan_columns(int64_t h, const A* staged) {
  const int64_t* offset = k_.offset.data();
  const int64_t* key = key_.data();
  A* values = values_.data() + slot_[h];
  Int* columns = columns_.data() + (kIndex ? slot_[h] : 0);
  for (int64_t q = 0; q < k_.padded_Q; q += L) {
    Vec<A> best = load(staged + offset[0] + q);
    IntVec<A> at = load_int<A>(first_.data() + q);
    for (int64_t s = 1; s < k_.S; ++s) {
      take_greater<A, kIndex>(best, at, load(staged + offset[s] + q), broadcast_int<A>(key[s]));
    }
    store(values + q, best);
    if constexpr (kIndex) store_int<A>(columns + q, at);
  }
  scanned_[h] = 1;
}

template <class T, bool kIndex>
void PlaneScan<T, kIndex>::output_row(int64_t p, T* out, void* index, int64_t i) {
  const int64_t h0 = p * t_.stride_h - t_.pad_h;
  const int64_t r0 = first_tap(h0, t_.dil_h);
  const int64_t r1 = std::min(t_.R, ceil_div(t_.H - h0, t_.dil_h));
  for (int64_t r = r0; r < r1; ++r) {
    const int64_t h = h0 + r * t_.dil_h;
    if (scanned_[h]) continue;
    const int64_t rows = std::min(batch_, t_.H - h), size = static_cast<int64_t>(k_.staged_size());
    for (int64_t i = 0; i < rows; ++i) stage(h + i, staged_.data() + i * size);
    for (int64_t i = 0; i < rows; ++i) scan_columns(h + i, staged_.data() + i * size);
  }
  for (int64_t q = 0; q < t_.Q; q += L) {
    Vec<A> best = broadcast<A>(-std::numeric_limits<A>::infinity());
    IntVec<A> at =
        load_int<A>(first_.data() + q) + broadcast_int<A>(row_key(r0, h0 + r0 * t_.dil_h));
    for (int64_t r = r0; r < r1; ++r) {
      const int64_t h = h0 + r * t_.dil_h, slot = slot_[h] + q;
      const Vec<A> value = load(values_.data() + slot);
      IntVec<A> where{};
      if constexpr (kIndex) {
        where = load_int<A>(columns_.data() + slot) + broadcast_int<A>(row_key(r, h));
      }
      if (r == r0) {
        best = value;
        at = where;
      } else {
        take_greater<A, kIndex>(best, at, value, where);
      }
    }
    store_upto(out + q, best, t_.Q - q);
    if constexpr (kIndex) {
      if (flat_) at += ramp<A>(0, t_.stride_w) + broadcast_int<A>(q * t_.stride_w);
      store_index<A>(index, t_.index, i + q, at, t_.Q - q);
    }
  }
}

// Output rows [begin, end) of the N * C * P.
template <class T, bool kIndex>
void max_fprop_nchw(const Pool2dProblem& t, const Pool2dArgs& a, int64_t begin, int64_t end) {
  PlaneScan<T, kIndex> scan(t);
  for (int64_t row = begin; row < end;) {
    const int64_t plane = row / t.P;
    scan.start_plane(static_cast<const T*>(a.input) + plane * t.H * t.W);
    for (; row < std::min(end, (plane + 1) * t.P); ++row) {
      scan.output_row(row - plane * t.P, static_cast<T*>(a.out) + row * t.Q, a.index_out,
                      row * t.Q);
    }
  }
}

// Output pixels [begin, end) of the N * P * Q.
template <class T, bool kIndex>
void max_fprop_nhwc(const Pool2dProblem& t, const Pool2dArgs& a, int64_t begin, int64_t end) {
  using A = accumulator_t<T>;
  constexpr int64_t L = Lanes<A>::kCount;
  const bool flat = t.index == PoolIndex::kFlatIndex64;
  const Vec<A> lowest = broadcast<A>(-std::numeric_limits<A>::infinity());
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const int64_t q = pixel % t.Q, p = pixel / t.Q % t.P, n = pixel / t.Q / t.P;
    const int64_t h0 = p * t.stride_h - t.pad_h, w0 = q * t.stride_w - t.pad_w;
    const int64_t r0 = first_tap(h0, t.dil_h), s0 = first_tap(w0, t.dil_w);
    const int64_t r1 = std::min(t.R, ceil_div(t.H - h0, t.dil_h));
    const int64_t s1 = std::min(t.S, ceil_div(t.W - w0, t.dil_w));
    const auto position = [&](int64_t r, int64_t s) {
      return flat ? (h0 + r * t.dil_h) * t.W + w0 + s * t.dil_w : r * t.S + s;
    };
    const T* image = static_cast<const T*>(a.input) + n * t.H * t.W * t.C;
    const auto scan = [&](int64_t c, auto vectors) FASTCONV_INLINE_LAMBDA {
      constexpr int64_t kVectors = decltype(vectors)::value;  // 0: less than one
      constexpr int64_t kKept = kVectors == 0 ? 1 : kVectors;
      Vec<A> best[kKept];
      IntVec<A> at[kKept];
      for (int64_t v = 0; v < kKept; ++v) {
        best[v] = lowest;
        at[v] = broadcast_int<A>(position(r0, s0));
      }
      for (int64_t r = r0; r < r1; ++r) {
        const T* tap = image + ((h0 + r * t.dil_h) * t.W + w0 + s0 * t.dil_w) * t.C + c;
        for (int64_t s = s0; s < s1; ++s, tap += t.dil_w * t.C) {
          const IntVec<A> where = broadcast_int<A>(kIndex ? position(r, s) : 0);
          for (int64_t v = 0; v < kVectors; ++v) {
            take_greater<A, kIndex>(best[v], at[v], load(tap + v * L), where);
          }
          if constexpr (kVectors == 0) {
            take_greater<A, kIndex>(best[0], at[0], load_first(tap, t.C - c, lowest), where);
          }
        }
      }
      const int64_t i = pixel * t.C + c;
      for (int64_t v = 0; v < kKept; ++v) {
        const int64_t lanes = kVectors == 0 ? t.C - c : L;
        store_upto(static_cast<T*>(a.out) + i + v * L, best[v], lanes);
        if constexpr (kIndex) store_index<A>(a.index_out, t.index, i + v * L, at[v], lanes);
      }
    };
    int64_t c = 0;
    for (; c + 4 * L <= t.C; c += 4 * L) scan(c, std::integral_constant<int64_t, 4>());
    for (; c + L <= t.C; c += L) scan(c, std::integral_constant<int64_t, 1>());
    if (c < t.C) scan(c, std::integral_constant<int64_t, 0>());
  }
}

void max_pool2d_fprop(const Pool2dProblem& t, const Pool2dArgs& a, const Context& context) {
  dispatch_dtype(t.dtype, [&](auto type) {
    using T = decltype(type);
    const bool nchw = t.layout == Layout::kNCHW || t.C == 1, keeps = t.index != PoolIndex::kNone;
    const int64_t units = t.N * t.P * (nchw ? t.C : t.Q);
    if (t.C == 0 || t.Q == 0 || units == 0) return;
    for_ranges(context, units, t.bytes(), [&](int64_t begin, int64_t end) {
      if (nchw && keeps) max_fprop_nchw<T, true>(t, a, begin, end);
      if (nchw && !keeps) max_fprop_nchw<T, false>(t, a, begin, end);
      if (!nchw && keeps) max_fprop_nhwc<T, true>(t, a, begin, end);
      if (!nchw && !keeps) max_fprop_nhwc<T, false>(t, a, begin, end);
    });
  });
}

}  // namespace FASTCONV_ISA
}  // namespace fastconv
