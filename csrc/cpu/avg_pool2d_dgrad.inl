// Average and adaptive average pooling backward, one copy for each instruction set. Included by
// avg_pool2d.inl.
//
// Each output's gradient, divided by its window's divisor, is spread over the window's columns into
// a line as long as an input row; an input row is then the sum of the lines of the output rows over
// it. Outputs are added in ascending order, columns first, in the accumulator's type; the sum is
// rounded once.

namespace fastconv {
namespace FASTCONV_ISA {

// Along one axis: the first and last output whose window holds input element i (none: last <
// first). Windows start in order, so those over an element are neighbours.
struct Holders {
  std::vector<int64_t> first, last;
  int64_t most = 1;  // the largest number over one element

  template <class SpanOf>
  Holders(int64_t size, int64_t outputs, SpanOf&& span_of)
      : first(static_cast<size_t>(size), 0), last(static_cast<size_t>(size), -1) {
    for (int64_t p = outputs - 1; p >= 0; --p) {
      const AverageSpan span = span_of(p);
      for (int64_t i = span.begin; i < span.end; ++i) {
        const auto at = static_cast<size_t>(i);
        if (last[at] < 0) last[at] = p;
        first[at] = p;
        most = std::max(most, last[at] - p + 1);
      }
    }
  }
};

// What a thread keeps: the lines of the last output rows of one plane (NCHW) or image (NHWC).
template <class T>
class LineKeeper {
  using A = accumulator_t<T>;
  static constexpr int64_t L = Lanes<A>::kCount;

 public:
  explicit LineKeeper(const Pool2dProblem& t)
      : t_(t),
        channels_(t.layout == Layout::kNHWC ? t.C : 1),
        length_(t.W * channels_),
        rows_(t.H, t.P, [&](int64_t p) { return row_span(t, p); }),
        columns_(t.W, t.Q, [&](int64_t q) { return column_span(t, q); }),
        taps_(t.kind == PoolKind::kAverage && channels_ == 1 && t.stride_w <= 2),
        margin_(taps_ ? t.S : 0),
        weight_(static_cast<size_t>(t.Q + L), A(1)),
        // With margins of zeros, so that no tap asks whether its output exists.
        share_(static_cast<size_t>(margin_ + std::max(t.Q, t.W + t.pad_w) * channels_ + 3 * L),
               A(0)),
        lines_(static_cast<size_t>(rows_.most * (length_ + L))),
        over_(static_cast<size_t>(rows_.most)),
        held_(static_cast<size_t>(rows_.most), -1) {
    for (int64_t q = 0; q < t.Q; ++q) {
      weight_[static_cast<size_t>(q)] = column_weight<A>(t, column_span(t, q));
    }
    for (int64_t p = 0; p < t.P; ++p) slot_.push_back(p % rows_.most);
  }
  void start_plane(const T* grad) {
    grad_ = grad;
    std::fill(held_.begin(), held_.end(), -1);
  }
  void input_row(int64_t h, T* out);

 private:
  A* line(int64_t p) { return lines_.data() + slot_[static_cast<size_t>(p)] * (length_ + L); }
  void spread(int64_t p);
  void divide(int64_t p);
  void spread_columns(A* line) const;
  void spread_taps(A* line) const;

  const Pool2dProblem& t_;
  const int64_t channels_, length_;
  const Holders rows_, columns_;
  const bool taps_;  // NCHW of stride 1 or 2: a vector of columns at a time
  const int64_t margin_;
  std::vector<A> weight_, share_, lines_;
  std::vector<const A*> over_;        // the lines over an input row
  std::vector<int64_t> slot_, held_;  // output row p's line is in slot_[p]; held_ says whose it is
  const T* grad_ = nullptr;
};

// share_ = gradient of output row p / divisor.
template <class T>
void LineKeeper<T>::divide(int64_t p) {
  const A rows = row_weight<A>(t_, row_span(t_, p));
  A* share = share_.data() + margin_;
  const T* grad = grad_ + p * t_.Q * channels_;
  if (channels_ == 1) {
    for (int64_t q = 0; q < t_.Q; q += L) {
      const Vec<A> divisor = broadcast<A>(rows) * load(weight_.data() + q);
      store_upto(share + q, load_upto(grad + q, t_.Q - q, Vec<A>{}) / divisor, t_.Q - q);
    }
    return;
  }
  for (int64_t q = 0; q < t_.Q; ++q) {
    const Vec<A> divisor = broadcast<A>(rows * weight_[static_cast<size_t>(q)]);
    for (int64_t c = 0; c < channels_; c += L) {
      const int64_t i = q * channels_ + c, n = channels_ - c;
      store_upto(share + i, load_upto(grad + i, n, Vec<A>{}) / divisor, n);
    }
  }
}

template <class T>
void LineKeeper<T>::spread_columns(A* line) const {
  const A* share = share_.data() + margin_;
  for (int64_t w = 0; w < t_.W; ++w) {
    const int64_t first = columns_.first[static_cast<size_t>(w)];
    const int64_t last = columns_.last[static_cast<size_t>(w)];
    if (channels_ == 1) {
      A sum = last < first ? A(0) : A(0) + share[first];
      for (int64_t q = first + 1; q <= last; ++q) sum += share[q];
      line[w] = sum;
      continue;
    }
    // Vectors may pass the pixel's last channel: the next pixel overwrites what they leave there.
    for (int64_t c = 0; c < channels_; c += L) {
      Vec<A> sum{};
      for (int64_t q = first; q <= last; ++q) sum += load(share + q * channels_ + c);
      store(line + w * channels_ + c, sum);
    }
  }
}

// Column w stands at x = w + pad and is read by the taps s with x - s a multiple of the stride,
// from output (x - s) / stride. With stride 2, even and odd columns are two such sums, interleaved.
template <class T>
void LineKeeper<T>::spread_taps(A* line) const {
  const A* share = share_.data() + margin_;
  const int64_t step = t_.stride_w;  // 1 or 2
  const auto gather = [&](int64_t x) FASTCONV_INLINE_LAMBDA {
    Vec<A> sum{};
    for (int64_t s = t_.S - 1 - ((x - t_.S + 1) & (step - 1)); s >= 0; s -= step) {
      sum += load(share + (x - s) / step);
    }
    return sum;
  };
  for (int64_t w = 0; w < t_.W; w += step * L) {
    Vec<A> first = gather(w + t_.pad_w), second{};
    if (step == 2) {
      const Vec<A> even = first, odd = gather(w + 1 + t_.pad_w);
      interleave<A>(even, odd, first, second);
      if (w + L < t_.W) store(line + w + L, second);
    }
    store(line + w, first);
  }
}

template <class T>
void LineKeeper<T>::spread(int64_t p) {
  divide(p);
  if (taps_) {
    spread_taps(line(p));
  } else {
    spread_columns(line(p));
  }
  held_[static_cast<size_t>(slot_[static_cast<size_t>(p)])] = p;
}

template <class T>
void LineKeeper<T>::input_row(int64_t h, T* out) {
  const int64_t first = rows_.first[static_cast<size_t>(h)];
  const int64_t last = rows_.last[static_cast<size_t>(h)];
  for (int64_t p = first; p <= last; ++p) {
    if (held_[static_cast<size_t>(slot_[static_cast<size_t>(p)])] != p) spread(p);
  }
  const int64_t count = last - first + 1;
  for (int64_t k = 0; k < count; ++k) over_[static_cast<size_t>(k)] = line(first + k);
  for (int64_t i = 0; i < length_; i += L) {
    Vec<A> sum{};
    for (int64_t k = 0; k < count; ++k) sum += load(over_[static_cast<size_t>(k)] + i);
    store_upto(out + i, sum, length_ - i);
  }
}

// Input rows [begin, end) of the N * C * H (NCHW) or N * H (NHWC).
template <class T>
void avg_dgrad_rows(const Pool2dProblem& t, const Pool2dArgs& a, int64_t begin, int64_t end) {
  LineKeeper<T> keeper(t);
  const int64_t channels = t.layout == Layout::kNHWC ? t.C : 1;
  for (int64_t row = begin; row < end;) {
    const int64_t plane = row / t.H;
    keeper.start_plane(static_cast<const T*>(a.grad) + plane * t.P * t.Q * channels);
    for (; row < std::min(end, (plane + 1) * t.H); ++row) {
      keeper.input_row(row - plane * t.H, static_cast<T*>(a.out) + row * t.W * channels);
    }
  }
}

// Planes [begin, end) of the N * C in NCHW, images of the N in NHWC, each from one output.
template <class T>
void avg_dgrad_global(const Pool2dProblem& t, const Pool2dArgs& a, int64_t begin, int64_t end) {
  using A = accumulator_t<T>;
  constexpr int64_t L = Lanes<A>::kCount;
  const int64_t channels = t.layout == Layout::kNHWC ? t.C : 1, HW = t.H * t.W;
  const Vec<A> divisor = broadcast<A>(static_cast<A>(HW));
  for (int64_t i = begin; i < end; ++i) {
    const T* grad = static_cast<const T*>(a.grad) + i * channels;
    T* out = static_cast<T*>(a.out) + i * channels * HW;
    if (channels == 1) {
      const Vec<A> share = broadcast<A>(A(grad[0])) / divisor;
      for (int64_t hw = 0; hw < HW; hw += L) store_upto(out + hw, share, HW - hw);
      continue;
    }
    for (int64_t c = 0; c < channels; c += L) {
      const int64_t n = channels - c;
      store_upto(out + c, load_upto(grad + c, n, Vec<A>{}) / divisor, n);
    }
    for (int64_t hw = 1; hw < HW; ++hw) std::copy(out, out + channels, out + hw * channels);
  }
}

void avg_pool2d_dgrad(const Pool2dProblem& given, const Pool2dArgs& a, const Context& context) {
  if (given.input_elements() == 0) return;
  const Pool2dProblem t = as_plain_windows(given);
  const int64_t planes = t.N * (t.layout == Layout::kNCHW ? t.C : 1);
  dispatch_dtype(t.dtype, [&](auto type) {
    using T = decltype(type);
    if (is_global(t)) {
      for_ranges(context, planes, t.bytes(),
                 [&](int64_t begin, int64_t end) { avg_dgrad_global<T>(t, a, begin, end); });
    } else {
      for_ranges(context, planes * t.H, t.bytes(),
                 [&](int64_t begin, int64_t end) { avg_dgrad_rows<T>(t, a, begin, end); });
    }
  });
}

}  // namespace FASTCONV_ISA
}  // namespace fastconv
