// Average and adaptive average pooling forward, one copy for each instruction set.
//
// NCHW: a sum over a window is separable: its rows are added first, a vector of columns at a time,
// then the columns of that sum, which also rounds less than one long sum. NHWC adds a vector of
// channels at a time.
// Division comes last and is a division, so that sums of small integers give the exact quotient
// rounded once.
#include "cpu/lanes.inl"
#include "cpu/pool2d_columns.inl"
//
#include "cpu/avg_pool2d_dgrad.inl"

namespace fastconv {
namespace FASTCONV_ISA {

template <class T>
class PlaneAverage {
  using A = accumulator_t<T>;
  static constexpr int64_t L = Lanes<A>::kCount;

 public:
  explicit PlaneAverage(const Pool2dProblem& t)
      : t_(t),
        adaptive_(t.kind == PoolKind::kAdaptiveAverage),
        // 512 elements: rows short enough that a load would meet a store still under way are
        // staged some at a time (see max_pool2d.inl).
        batch_(std::max<int64_t>(1, std::min(t.P, 512 / std::max<int64_t>(t.W, 1)))),
        k_(adaptive_ ? plain_columns(t) : t, L),
        staged_(static_cast<size_t>(batch_) * k_.staged_size(), A(0)),
        linear_(static_cast<size_t>(t.W + L)),
        weight_(static_cast<size_t>(t.Q + L), A(1)) {
    for (int64_t q = 0; q < t.Q; ++q) {
      columns_.push_back(column_span(t, q));
      weight_[static_cast<size_t>(q)] = column_weight<A>(t, columns_.back());
    }
  }
  // Output rows [begin, end) of one plane.
  void output_rows(const T* input, int64_t begin, int64_t end, T* out) {
    const int64_t size = static_cast<int64_t>(k_.staged_size());
    for (int64_t p = begin; p < end; p += batch_) {
      const int64_t rows = std::min(batch_, end - p);
      for (int64_t i = 0; i < rows; ++i) {
        add_rows(input, row_span(t_, p + i), staged_.data() + i * size);
      }
      for (int64_t i = 0; i < rows; ++i) {
        add_columns(row_span(t_, p + i), staged_.data() + i * size, out + (p + i) * t_.Q);
      }
    }
  }

 private:
  // Adaptive windows differ in width, so their columns are added one by one: no phases to split.
  static Pool2dProblem plain_columns(Pool2dProblem t) {
    t.S = t.stride_w = t.dil_w = 1;
    t.pad_w = 0;
    t.Q = t.W;
    return t;
  }
  void add_rows(const T* input, const AverageSpan& rows, A* staged) {
    stage_row<A>(k_, staged, linear_.data(), [&](int64_t w) FASTCONV_INLINE_LAMBDA {
      Vec<A> sum{};
      if (w + L <= t_.W) {
        for (int64_t h = rows.begin; h < rows.end; ++h) sum += load(input + h * t_.W + w);
      } else if (w < t_.W) {
        for (int64_t h = rows.begin; h < rows.end; ++h) {
          sum += load_first(input + h * t_.W + w, t_.W - w, Vec<A>{});
        }
      }
      return sum;
    });
  }
  void add_columns(const AverageSpan& rows, const A* staged, T* out) const {
    const Vec<A> rows_weight = broadcast<A>(row_weight<A>(t_, rows));
    for (int64_t q = 0; q < t_.Q; q += L) {
      Vec<A> sum{};
      if (adaptive_) {
        A lanes[L] = {};
        for (int64_t l = 0; l < std::min(L, t_.Q - q); ++l) {
          const AverageSpan& span = columns_[static_cast<size_t>(q + l)];
          for (int64_t w = span.begin; w < span.end; ++w) lanes[l] += staged[w];
        }
        sum = load(lanes);
      } else {
        for (int64_t s = 0; s < t_.S; ++s) sum += load(staged + k_.offset[s] + q);
      }
      store_upto(out + q, sum / (rows_weight * load(weight_.data() + q)), t_.Q - q);
    }
  }

  const Pool2dProblem& t_;
  const bool adaptive_;
  const int64_t batch_;  // output rows staged at once
  const Columns k_;
  std::vector<A> staged_, linear_, weight_;
  std::vector<AverageSpan> columns_;
};

// Output rows [begin, end) of the N * C * P.
template <class T>
void avg_fprop_nchw(const Pool2dProblem& t, const Pool2dArgs& a, int64_t begin, int64_t end) {
  PlaneAverage<T> average(t);
  for (int64_t row = begin; row < end;) {
    const int64_t plane = row / t.P, plane_end = std::min(end, (plane + 1) * t.P);
    average.output_rows(static_cast<const T*>(a.input) + plane * t.H * t.W, row - plane * t.P,
                        plane_end - plane * t.P, static_cast<T*>(a.out) + plane * t.P * t.Q);
    row = plane_end;
  }
}

// The sum of n neighbouring elements: four at a time in A, those sums in float64.
template <class T>
double sum_contiguous(const T* x, int64_t n) {
  using A = accumulator_t<T>;
  constexpr int64_t L = Lanes<A>::kCount;
  Wide<A> sum;
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    sum += Wide<A>((load(x + i) + load(x + i + L)) + (load(x + i + 2 * L) + load(x + i + 3 * L)));
  }
  Vec<A> rest{};
  for (; i + L <= n; i += L) rest += load(x + i);
  if (i < n) rest += load_first(x + i, n - i, Vec<A>{});
  sum += Wide<A>(rest);
  return sum.over_lanes();
}

// Planes [begin, end) of the N * C, each averaged to one element.
template <class T>
void avg_fprop_global_nchw(const Pool2dProblem& t, const Pool2dArgs& a, int64_t begin,
                           int64_t end) {
  using A = accumulator_t<T>;
  const int64_t HW = t.H * t.W;
  const T* input = static_cast<const T*>(a.input);
  for (int64_t plane = begin; plane < end; ++plane) {
    const A sum = static_cast<A>(sum_contiguous(input + plane * HW, HW));
    static_cast<T*>(a.out)[plane] = T(sum / static_cast<A>(HW));
  }
}

// Channels of one output pixel that a thread takes at once: enough pixels times groups to go
// round when the output is one pixel.
constexpr int64_t kAverageChannels = 256;
// A sum in A, with the members of Wide that averaging uses.
template <class A>
struct Narrow {
  Vec<A> sum{};
  Narrow() = default;
  FASTCONV_INLINE explicit Narrow(Vec<A> v) : sum(v) {}
  FASTCONV_INLINE Vec<A> rounded() const { return sum; }
  FASTCONV_INLINE Narrow& operator+=(const Narrow& other) {
    sum += other.sum;
    return *this;
  }
};

// Neighbours in a row that are added before their sum joins the window's.
constexpr int64_t kRun = 8;

// Units [begin, end) of the N * P * Q * ceil(C / kAverageChannels). Sum: Narrow<A> or Wide<A>.
template <class T, class Sum>
void avg_fprop_nhwc(const Pool2dProblem& t, const Pool2dArgs& a, int64_t begin, int64_t end) {
  using A = accumulator_t<T>;
  constexpr int64_t L = Lanes<A>::kCount;
  const int64_t groups = ceil_div(t.C, kAverageChannels);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t pixel = unit / groups, first = unit % groups * kAverageChannels;
    const int64_t channels_end = std::min(t.C, first + kAverageChannels);
    const int64_t q = pixel % t.Q, p = pixel / t.Q % t.P, n = pixel / t.Q / t.P;
    const AverageSpan rows = row_span(t, p), columns = column_span(t, q);
    const bool empty = average_is_empty(rows, columns);
    const A divisor = empty ? A(1) : static_cast<A>(average_divisor(t, rows, columns));
    const T* image = static_cast<const T*>(a.input) + n * t.H * t.W * t.C;
    T* out = static_cast<T*>(a.out) + pixel * t.C;
    const auto average = [&](int64_t c, auto vectors) FASTCONV_INLINE_LAMBDA {
      constexpr int64_t kVectors = decltype(vectors)::value;  // 0: less than one
      constexpr int64_t kKept = kVectors == 0 ? 1 : kVectors;
      Sum sum[kKept];
      for (int64_t h = rows.begin; h < rows.end; ++h) {
        const T* x = image + (h * t.W + columns.begin) * t.C + c;
        for (int64_t w = columns.begin; w < columns.end; w += kRun) {
          Vec<A> run[kKept] = {};
          for (int64_t i = 0; i < std::min(kRun, columns.end - w); ++i, x += t.C) {
            for (int64_t v = 0; v < kVectors; ++v) run[v] += load(x + v * L);
            if constexpr (kVectors == 0) run[0] += load_first(x, t.C - c, Vec<A>{});
          }
          for (int64_t v = 0; v < kKept; ++v) sum[v] += Sum(run[v]);
        }
      }
      for (int64_t v = 0; v < kKept; ++v) {
        const Vec<A> mean = sum[v].rounded() / broadcast<A>(divisor);
        store_upto(out + c + v * L, mean, kVectors == 0 ? t.C - c : L);
      }
    };
    int64_t c = first;
    for (; c + 4 * L <= channels_end; c += 4 * L) average(c, std::integral_constant<int64_t, 4>());
    for (; c + L <= channels_end; c += L) average(c, std::integral_constant<int64_t, 1>());
    if (c < channels_end) average(c, std::integral_constant<int64_t, 0>());
  }
}

void avg_pool2d_fprop(const Pool2dProblem& given, const Pool2dArgs& a, const Context& context) {
  if (given.output_elements() == 0) return;
  const Pool2dProblem t = as_plain_windows(given);
  dispatch_dtype(t.dtype, [&](auto type) {
    using T = decltype(type);
    using A = accumulator_t<T>;
    if (t.layout == Layout::kNHWC && t.C > 1) {
      const int64_t units = t.N * t.P * t.Q * ceil_div(t.C, kAverageChannels);
      for_ranges(context, units, t.bytes(), [&](int64_t begin, int64_t end) {
        if (is_global(t)) {
          avg_fprop_nhwc<T, Wide<A>>(t, a, begin, end);
        } else {
          avg_fprop_nhwc<T, Narrow<A>>(t, a, begin, end);
        }
      });
    } else if (is_global(t)) {
      for_ranges(context, t.N * t.C, t.bytes(),
                 [&](int64_t begin, int64_t end) { avg_fprop_global_nchw<T>(t, a, begin, end); });
    } else {
      for_ranges(context, t.N * t.C * t.P, t.bytes(),
                 [&](int64_t begin, int64_t end) { avg_fprop_nchw<T>(t, a, begin, end); });
    }
  });
}

}  // namespace FASTCONV_ISA
}  // namespace fastconv
